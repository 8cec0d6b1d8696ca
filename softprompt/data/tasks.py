"""Text-to-text tasks: which records they read, and how records become inputs and targets.

A task's template is text with {field} names; it ends where the target begins. A classification task
has a verbalizer for each label: the target's text, with its leading space. A free-text task has
none: the answer itself is the target. If its template names no field either, a prompt for it models
the answers as a language. A task reads three splits: train, validation (selects a delta) and test
(is reported).
"""

import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from softprompt.data.sources import Columns, Record, Row
from softprompt.errors import UserError

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

# Data that is only tested on: a prompt for another task is evaluated on it.
TEST_ONLY = {"test": SplitRule("")}

# Metrics of ranked candidates, which generated answers also have as `generated_NAME`; those of
# generated free text; and that of right answers' probabilities. Larger is better.
LABEL_METRICS = ("accuracy", "macro_f1", "f1", "group_match", "task_score")
ANSWER_METRICS = ("exact_match", "f1")
LIKELIHOOD = "log_likelihood"


def generated(names: Iterable[str]) -> tuple[str, ...]:
    """Returns the names of metrics as they are called when generated answers are measured."""
    return tuple(f"generated_{name}" for name in names)


@dataclass(frozen=True)
class Task:
    """What a model is asked to do with some records.

    Attributes:
        name: the task's name in results.
        source: "tfds:NAME", or one of `FORMATS` and a path, as in "jsonl:PATH"; {split} in a path
            is replaced by the split's name, and {cache} by the cache folder.
        template: the input's text, with {field} names.
        verbalizers: label to target text, in the order of the candidates; empty for a free-text
            task.
        splits: the rules for train, validation and test.
        label_field: the field that holds the label, or a free-text task's answers; "" where nothing
            is labelled. Like the other fields, one inside of others is named as in "answers.text".
        id_field: the field that holds the id; "" where there is none.
        group_field: the field that holds what examples are grouped by, such as their question; ""
            where they are not. A group is never divided between splits.
        candidates_field: the field that holds the example's own candidates; "" for none.
        correct_field: the field that says whether the answer is the right one; "" where all are.
        about: one line for a list of tasks.
        positive: the label whose F1 is a metric; "" for none.
        reported: the metrics whose mean is `task_score`; () for none.
        exact: whether a generated answer has to be the label itself, rather than to begin with it.
        clean: changes each text of an example; None for none.
        transform_row: changes each row before its fields are read; None for none.
        t5: what T5's form of the task replaces; None where it only has another template.
        expand_record: the training examples that a record becomes; None for itself.
        words: what class-label initialisation begins with, for a task without verbalizers.
        counts: rows of the source's train and development splits; () where they are not known.
        url: where to download the source from, if it is a file.
    """

    name: str
    source: str
    template: str
    verbalizers: Mapping[str, str]
    splits: Mapping[str, SplitRule] = field(default_factory=lambda: dict(OWN_SPLITS))
    label_field: str = "label"
    id_field: str = ""
    group_field: str = ""
    candidates_field: str = ""
    correct_field: str = ""
    about: str = ""
    positive: str = ""
    reported: tuple[str, ...] = ()
    exact: bool = False
    clean: Callable[[str], str] | None = None
    transform_row: Callable[[Row], Row] | None = None
    t5: Mapping[str, Any] = field(default_factory=dict)
    expand_record: Callable[[Record], list[Record]] | None = None
    words: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    url: str = ""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of the candidates."""
        return tuple(self.verbalizers)

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that the template names."""
        return tuple(dict.fromkeys(name for _, name in parse_template(self.template) if name))

    @property
    def content(self) -> tuple[str, ...]:
        """What tells records apart: the template's fields, or the answer where it names none."""
        return self.fields or ("label",)

    @property
    def columns(self) -> Columns:
        """Which fields of the source's rows hold the parts of a record."""
        return Columns(
            texts=self.fields,
            label=self.label_field,
            id=self.id_field,
            group=self.group_field,
            candidates=self.candidates_field,
            correct=self.correct_field,
            labels=self.labels or None,
            clean=self.clean,
            transform_row=self.transform_row,
        )

    @property
    def metrics(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the metrics that each evaluator measures on this task."""
        more = ["group_match"] if self.group_field else []
        score = ["task_score"] if self.reported else []
        if self.verbalizers:
            f1 = ["f1"] if self.positive else []
            names = ("accuracy", "macro_f1", *f1, *more, *score)
            return {"ranking": names, "generation": (*generated(names), "illegal")}
        if self.correct_field:
            return {"generation": generated(["accuracy", *score])}
        answers = (*ANSWER_METRICS, *generated([*more, *score]))
        likelihood = {"likelihood": (LIKELIHOOD, "perplexity")}
        if self.candidates_field:
            ranked = {"ranking": ("accuracy", *more), "generation": (*answers, "illegal")}
            return ranked | likelihood
        return {"generation": answers} | likelihood

    def in_t5_form(self) -> "Task":
        """The same task with T5's text: `name: value` pairs and the bare label.

        Source: arXiv 1910.10683, appendix D, without the leading name of the task.
        """
        pairs = " ".join(f"{name}: {{{name}}}" for name in self.fields)
        return replace(self, **{"template": pairs, "exact": True, **self.t5})


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
