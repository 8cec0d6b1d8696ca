"""Text-to-text tasks: which records they read, and how records become inputs and targets.

A task's template is text with {field} names; it ends where the target begins. A classification task
has a verbalizer for each label: the target's text, with its leading space. A free-text task has
none: the answer itself is the target. A task reads three splits: train, validation (selects a
delta) and test (is reported).
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from softprompt.data.sources import FORMATS
from softprompt.errors import UserError, nearest, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitRule:
    """Which examples of a source make up one of a task's splits.

    Attributes:
        split: the source's own split; "" where the source is one file.
        start: where the share of those examples begins, 0 to 1.
        stop: where it ends.
        by_hash: an example belongs to the share when the hash of its content (of its id, where the
            task has an `id_field`) lies between `start` and `stop`. So it stays in its split when
            other examples come or go, equal contents share a split, and sizes are approximate.
            Without, the share is cut from all examples in the order of their hashed ids, and its
            size is exact.
    """

    split: str
    start: float = 0.0
    stop: float = 1.0
    by_hash: bool = False


OWN_SPLITS = {name: SplitRule(name) for name in SPLITS}

# A file without splits of its own is divided.
ONE_FILE = {
    "train": SplitRule("", 0, 0.8, by_hash=True),
    "validation": SplitRule("", 0.8, 0.9, by_hash=True),
    "test": SplitRule("", 0.9, 1, by_hash=True),
}

# Catalogue data with hidden test labels: the development set is the test split, and a tenth of
# train, which is then not trained on, the validation split.
HIDDEN_TEST = {
    "train": SplitRule("train", 0, 0.9),
    "validation": SplitRule("train", 0.9, 1),
    "test": SplitRule("validation"),
}

# As in the paper: all of train is trained on, and the development set both selects and is reported.
# The number reported is then the best of several looks at its own test set.
DEVELOPMENT = {
    "train": SplitRule("train"),
    "validation": SplitRule("validation"),
    "test": SplitRule("validation"),
}

# The metrics of either kind of task, by the evaluator that measures them.
LABEL_METRICS = {
    "ranking": ("accuracy", "macro_f1"),
    "generation": ("generated_accuracy", "generated_macro_f1", "illegal"),
}
ANSWER_METRICS = {"generation": ("exact_match", "f1")}


@dataclass(frozen=True)
class Task:
    """What a model is asked to do with some records.

    Attributes:
        name: the task's name in results.
        source: "tfds:NAME", "jsonl:PATH", "tsv:PATH" or "csv:PATH"; {split} in a PATH is replaced
            by the split's name.
        template: the input's text, with {field} names.
        verbalizers: label to target text, in the order of the candidates; empty for a free-text
            task.
        splits: the rules for train, validation and test.
        label_field: the field that holds the label, or a free-text task's answers; "" where nothing
            is labelled.
        id_field: the field that holds the id; "" where there is none.
        about: one line for a list of tasks.
    """

    name: str
    source: str
    template: str
    verbalizers: Mapping[str, str]
    splits: Mapping[str, SplitRule] = field(default_factory=lambda: dict(OWN_SPLITS))
    label_field: str = "label"
    id_field: str = ""
    about: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the candidates."""
        return tuple(self.verbalizers)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the template names."""
        return tuple(dict.fromkeys(name for _, name in parse_template(self.template) if name))

    @property
    def metrics(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the metrics that each evaluator measures on this task."""
        return LABEL_METRICS if self.verbalizers else ANSWER_METRICS


def parse_template(template: str) -> list[tuple[str, str]]:
    """Returns a template as pairs: literal text, and the name of the field after it or "".

    Raises:
        UserError: braces do not match, or a field has no plain name.
    """
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"template {template!r}: {error} (a literal brace is doubled)") from error
    for _, name, form, conversion in parsed:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise UserError(
                f"template {template!r}: {{{name}}} is not a field's name; write {{text}} for the "
                "field text, and double a literal brace"
            )
    return [(literal, name or "") for literal, name, _, _ in parsed]


def target_text(task: Task, label: str) -> str:
    """Returns the target of a record with this label, or with this answer of a free-text task.

    A space comes before an answer unless the template ends with white space.
    """
    if task.verbalizers:
        return task.verbalizers[label]
    return label if task.template[-1:].isspace() else f" {label}"


def _snippets(config: str, name: str, about: str) -> Task:
    """A sentiment task. All four share a template, so a prompt for one can be tried on another."""
    return Task(
        name=name,
        source=f"tfds:snippet_sentiment/{config}:1.0.0",
        template="Review: {text}\nSentiment:",
        verbalizers={"negative": " negative", "positive": " positive"},
        about=about,
    )


def _catalogue(name: str, dataset: str, template: str, labels: Sequence[str]) -> Task:
    """A task of TFDS's catalogue, with the labels' names as verbalizers, as in the paper."""
    return Task(
        name=name,
        source=f"tfds:{dataset}",
        template=template,
        verbalizers={label: f" {label}" for label in labels},
        splits=HIDDEN_TEST,
        about=f"TFDS {dataset}; test is its development set, validation a tenth of train",
    )


_PREMISE = "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"

_TASKS = (
    _snippets("movie", "movie_sentiment", "sentiment of movie snippets, 2 classes"),
    _snippets("amazon", "amazon_sentiment", "sentiment of product review sentences, 2 classes"),
    _snippets("tweets", "tweets_sentiment", "sentiment of tweets, 2 classes"),
    _snippets("nyt", "nyt_sentiment", "sentiment of editorial sentences, 2 classes"),
    Task(
        name="sarcasm",
        source="tfds:sarcastic_headlines:1.0.0",
        template="Headline: {text}\nSarcastic:",
        verbalizers={"serious": " no", "sarcastic": " yes"},
        about="sarcastic or serious headlines, 2 classes",
    ),
    Task(
        name="sms_spam",
        source="tfds:sms_spam:1.0.0",
        template="Message: {text}\nSpam:",
        verbalizers={"ham": " no", "spam": " yes"},
        about="spam among text messages, 2 classes, 13 % spam",
    ),
    Task(
        name="question_type",
        source="tfds:question_type:1.0.0",
        template="Question: {text}\nAnswer type:",
        verbalizers={
            "abbreviation": " abbreviation",
            "description": " description",
            "entity": " entity",
            "human": " person",
            "location": " location",
            "number": " number",
        },
        about="what kind of answer a question asks for, 6 classes",
    ),
    _catalogue(
        "sst2", "glue/sst2:2.0.0", "Review: {sentence}\nSentiment:", ["negative", "positive"]
    ),
    _catalogue(
        "mrpc",
        "glue/mrpc:2.0.0",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nRelation:",
        ["equivalent", "not_equivalent"],
    ),
    _catalogue(
        "glue_rte",
        "glue/rte:2.0.0",
        "Premise: {sentence1}\nHypothesis: {sentence2}\nRelation:",
        ["entailment", "not_entailment"],
    ),
    _catalogue("rte", "super_glue/rte:1.0.2", _PREMISE, ["entailment", "not_entailment"]),
    _catalogue("cb", "super_glue/cb:1.0.2", _PREMISE, ["entailment", "contradiction", "neutral"]),
    _catalogue(
        "boolq",
        "super_glue/boolq:1.0.2",
        "Passage: {passage}\nQuestion: {question}\nAnswer:",
        ["False", "True"],
    ),
    _catalogue(
        "copa",
        "super_glue/copa:1.0.2",
        "Premise: {premise}\nchoice1: {choice1}\nchoice2: {choice2}\n"
        "Which is the {question} of the premise?",
        ["choice1", "choice2"],
    ),
    _catalogue(
        "wic",
        "super_glue/wic:1.0.2",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nThe word {word} means the same in both:",
        ["False", "True"],
    ),
)


def _with_development(task: Task) -> list[Task]:
    """A task, and for catalogue data also "NAME_dev", which selects as the paper does."""
    if task.splits is not HIDDEN_TEST:
        return [task]
    about = f"{task.name}, selected and reported on its development set as in the paper"
    return [task, replace(task, name=f"{task.name}_dev", splits=DEVELOPMENT, about=about)]


TASKS: dict[str, Task] = {task.name: task for first in _TASKS for task in _with_development(first)}


def get_task(config: Mapping[str, Any]) -> Task:
    """Returns the task that a config's `task` section describes.

    With a `source` it is a task over the user's own data: a free-text task unless the config has
    verbalizers. Otherwise it is the built-in task of that name; a template or verbalizers of the
    config replace the task's.

    Args:
        config: has name, source, template, verbalizers, label_field and id_field.

    Raises:
        UserError: the name or source is unknown, or the template or verbalizers cannot be used.
    """
    verbalizers = dict(config["verbalizers"])
    if config["source"]:
        task = _own_task(config, verbalizers)
    elif config["name"] not in TASKS:
        raise unknown("task", config["name"], TASKS)
    else:
        task = TASKS[config["name"]]
        for key, usual in (("label_field", Task.label_field), ("id_field", Task.id_field)):
            if config[key] != usual:
                raise UserError(
                    f"config key 'task.{key}' is {config[key]!r}; allowed: {usual!r} without a "
                    "task.source"
                )
        template = config["template"] or task.template
        task = replace(task, template=template, verbalizers=verbalizers or task.verbalizers)
    _check(task)
    return task


def _own_task(config: Mapping[str, Any], verbalizers: dict[str, str]) -> Task:
    """The task over a user's own data."""
    name, source = config["name"], config["source"]
    if name in TASKS:
        raise UserError(f"task.name {name!r} is a built-in task; give own data a name of its own")
    kind, _, path = source.partition(":")
    if kind not in (*FORMATS, "tfds") or not path:
        allowed = ", ".join(f"{form}:PATH" for form in FORMATS)
        raise UserError(
            f"task.source {source!r}{nearest(kind, FORMATS)}; allowed: {allowed} or tfds:NAME"
        )
    return Task(
        name=name,
        source=source,
        template=config["template"],
        verbalizers=verbalizers,
        splits=OWN_SPLITS if kind == "tfds" or "{split}" in path else ONE_FILE,
        label_field=config["label_field"],
        id_field=config["id_field"],
    )


def _check(task: Task) -> None:
    """Checks what can be known of template and verbalizers without the data."""
    if not task.fields:
        raise UserError(f"template {task.template!r} of task {task.name!r} names no {{field}}")
    for name in task.fields:
        said = f"template {task.template!r} of task {task.name!r} names {{{name}}}"
        if name == task.label_field:
            raise UserError(f"{said}, which is the label; allowed: fields of the input")
        reserved = ("id", "label") if task.verbalizers else ("id", "label", "answers")
        if name in reserved and name != task.id_field:
            raise UserError(f"{said}, as records call their own {name}; allowed: another name")
    targets = list(task.verbalizers.values())
    for label, target in task.verbalizers.items():
        if not target.strip():
            raise UserError(f"verbalizer of label {label!r} is {target!r}; expected some text")
        if targets.count(target) > 1:
            raise UserError(f"verbalizer {target!r} stands for more than one label")
    if len(targets) == 1:
        raise UserError(f"task {task.name!r} has one verbalizer, {targets[0]!r}; expected two")
