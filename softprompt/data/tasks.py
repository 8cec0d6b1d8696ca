"""Text-to-text tasks: which records, how they become text, what the answers are called.

A task's template is text with {field} names and ends where the target begins; a label's verbalizer
is the target's text, with its leading space. A task reads three splits: train, validation (to
select by) and test (to report).
"""

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from softprompt.data.sources import FORMATS, Record, read_file
from softprompt.data.subsets import seeded_order
from softprompt.errors import UserError, nearest, unknown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Part:
    """A share of one of a source's own splits.

    Attributes:
        split: as the source calls it.
        start: where the share begins, as a fraction of the examples ordered by the SHA-256 of their
            ids.
        stop: where it ends.
    """

    split: str
    start: float = 0.0
    stop: float = 1.0


OWN_SPLITS = {name: Part(name) for name in SPLITS}

# One file without splits of its own.
ONE_FILE = {"train": Part("", 0, 0.8), "validation": Part("", 0.8, 0.9), "test": Part("", 0.9, 1)}

# Catalogue data whose test labels are hidden: report on the development set, and select on a tenth
# of train that is then not trained on.
HIDDEN_TEST = {
    "train": Part("train", 0, 0.9),
    "validation": Part("train", 0.9, 1),
    "test": Part("validation"),
}

# The same, as the paper has it: train on all of train, select and report on the development set.
# The number reported is then the best of several looks at its own test set.
DEVELOPMENT = {
    "train": Part("train"),
    "validation": Part("validation"),
    "test": Part("validation"),
}


@dataclass(frozen=True)
class Task:
    """What a model is asked to do with some records.

    Attributes:
        name: as results call it.
        source: "tfds:NAME", "jsonl:PATH", "tsv:PATH" or "csv:PATH"; {split} in a PATH is replaced
            by the split's name.
        template: the input's text, with {field} names.
        verbalizers: label to target text, in the order of the candidates; empty where the label
            itself is the target (generation).
        metrics: names of the metrics to report, the first one selects.
        splits: what train, validation and test are in the source.
        label_field: the field that holds the label; "" where nothing is labelled.
        id_field: the field that holds the id; "" numbers the records.
        about: one line for a list of tasks.
    """

    name: str
    source: str
    template: str
    verbalizers: Mapping[str, str]
    metrics: tuple[str, ...] = ("accuracy", "macro_f1")
    splits: Mapping[str, Part] = field(default_factory=lambda: dict(OWN_SPLITS))
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
        return tuple(dict.fromkeys(name for _, name in pieces(self.template) if name))


def pieces(template: str) -> list[tuple[str, str]]:
    """Cuts a template into (literal text, name of the field that follows it or "").

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
    """The text that answers a record with this label; a generated one follows white space."""
    if task.verbalizers:
        return task.verbalizers[label]
    return label if task.template[-1:].isspace() else f" {label}"


def _snippets(config: str, name: str, about: str) -> Task:
    """All four share a template, so that a prompt trained on one can be tried on another."""
    return Task(
        name=name,
        source=f"tfds:snippet_sentiment/{config}:1.0.0",
        template="Review: {text}\nSentiment:",
        verbalizers={"negative": " negative", "positive": " positive"},
        about=about,
    )


def _catalogue(name: str, dataset: str, template: str, labels: Sequence[str]) -> Task:
    """A catalogue task: verbalizers are the labels' own names, as in the paper."""
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
    """A task, and for catalogue data its twin "NAME_dev" that selects as the paper does."""
    if task.splits is not HIDDEN_TEST:
        return [task]
    about = f"{task.name} selected and reported on its development set, as in the paper"
    return [task, replace(task, name=f"{task.name}_dev", splits=DEVELOPMENT, about=about)]


TASKS: dict[str, Task] = {task.name: task for first in _TASKS for task in _with_development(first)}


def get_task(config: Mapping[str, Any]) -> Task:
    """Returns the task that a config's `task` section describes.

    A built-in task by its name, its template and verbalizers replaced where the config has some;
    or, where `source` is set, own data under a name of its own.

    Args:
        config: with name, source, template, verbalizers, label_field and id_field.

    Raises:
        UserError: unknown name or source, or a template or verbalizers that cannot be used.
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
    """A task over a user's own data."""
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
        metrics=("accuracy", "macro_f1") if verbalizers else ("accuracy",),
        splits=OWN_SPLITS if kind == "tfds" or "{split}" in path else ONE_FILE,
        label_field=config["label_field"],
        id_field=config["id_field"],
    )


def _check(task: Task) -> None:
    """What template and verbalizers must be, whatever the data."""
    if not task.fields:
        raise UserError(f"template {task.template!r} of task {task.name!r} names no {{field}}")
    for name in task.fields:
        said = f"template {task.template!r} of task {task.name!r} names {{{name}}}"
        if name == task.label_field:
            raise UserError(f"{said}, which is the label; allowed: fields of the input")
        if name in ("id", "label") and name != task.id_field:
            raise UserError(f"{said}, as records call their own {name}; allowed: another name")
    targets = list(task.verbalizers.values())
    for label, target in task.verbalizers.items():
        if not target.strip():
            raise UserError(f"verbalizer of label {label!r} is {target!r}; expected some text")
        if targets.count(target) > 1:
            raise UserError(f"verbalizer {target!r} stands for more than one label")
    if len(targets) == 1:
        raise UserError(f"task {task.name!r} has one verbalizer, {targets[0]!r}; expected two")


def read_split(task: Task, split: str) -> list[Record]:
    """Reads a task's train, validation or test records.

    Args:
        task: the task.
        split: "train", "validation" or "test". Unlabelled records are allowed in test alone.

    Raises:
        UserError: the source cannot be read or has a bad line (see `read_file` and `read_tfds`),
            the split is empty, or a record to train or select on has no label.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    part = task.splits[split]
    records = _take(_read(task, part), part)
    origin = _origin(task, part)
    if not records:
        raise UserError(
            f"{split} split of task {task.name!r} is empty: {origin} has no examples for it"
        )
    for record in records if split != "test" else ():
        if record["label"] is None:
            raise UserError(
                f"{split} split of task {task.name!r}: example {record['id']!r} of {origin} has no "
                "label"
            )
    return records


def _origin(task: Task, part: Part) -> str:
    """Where a part comes from, for messages."""
    kind, _, path = task.source.partition(":")
    return f"tfds:{path}, {part.split}" if kind == "tfds" else path.replace("{split}", part.split)


def _read(task: Task, part: Part) -> list[Record]:
    """All records of one of the source's own splits."""
    kind, _, path = task.source.partition(":")
    labels = task.labels or None
    if kind == "tfds":
        from softprompt.data.tfds_reader import read_tfds

        return read_tfds(
            path,
            part.split,
            fields=task.fields,
            label_field=task.label_field,
            id_field=task.id_field,
            labels=labels,
        )
    return read_file(
        path.replace("{split}", part.split),
        kind,
        fields=task.fields,
        label_field=task.label_field,
        id_field=task.id_field,
        labels=labels,
        id_prefix=part.split or "row",
    )


def _take(records: list[Record], part: Part) -> list[Record]:
    """The part's share of the records, in their own order."""
    if (part.start, part.stop) == (0, 1):
        return records
    order = seeded_order([record["id"] for record in records], 0)
    count = len(records)
    chosen = order[round(part.start * count) : round(part.stop * count)]
    return [records[index] for index in sorted(chosen)]
