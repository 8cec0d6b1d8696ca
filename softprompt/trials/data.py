"""A trial's examples as token ids, and how they lie in the rows of batches."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from softprompt.config import ConfigDict, method_settings
from softprompt.data.encode import Encoded, encode, mix, summary, target_advice
from softprompt.data.eval_batches import EvalShape, eval_batches, eval_shape
from softprompt.data.packing import Template
from softprompt.data.pipeline import TrainSource, train_template
from softprompt.data.rows import EvalBatch, RowLayout
from softprompt.data.sources import Record
from softprompt.data.subsets import balanced_subset, seeded_sample
from softprompt.data.tasks import SPLITS, Task, get_task, overlaps, read_split
from softprompt.errors import UserError
from softprompt.evaluation.evaluators import Split
from softprompt.evaluation.ranking import scoring_budget
from softprompt.pretrained.loading import Loaded

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's splits as token ids.

    Attributes:
        task: the task.
        train: its examples to train on.
        validation: its examples to select by.
        test: its examples to report.
        shared_texts: how many texts stand in two splits.
    """

    task: Task
    train: Encoded
    validation: Encoded
    test: Encoded
    shared_texts: int = 0

    def split(self, name: str) -> Encoded:
        """The split of this name: train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def each(self, change: Callable[[Encoded], Encoded]) -> "TaskData":
        """The same task, its splits changed."""
        train, validation, test = (change(self.split(name)) for name in SPLITS)
        return TaskData(self.task, train, validation, test, self.shared_texts)


class TrialData:
    """The tasks of a trial, encoded once, and their batches, each packed once.

    Attributes:
        tasks: the trial's task, or those of its mixture, in order.
        train: the examples that are trained on, of all tasks.
    """

    def __init__(self, tasks: Sequence[TaskData]) -> None:
        if len(tasks) == 1:
            self.tasks, self.train = tuple(tasks), tasks[0].train
        else:
            self.tasks = tuple(one.each(_of_task(n)) for n, one in enumerate(tasks))
            self.train = mix({one.task.name: one.train for one in tasks})
        self._made: dict[Hashable, Any] = {}

    def only(self, task: str) -> "TrialData":
        """One task of a mixture, which keeps its number."""
        data = TrialData.__new__(TrialData)
        data.tasks = tuple(one for one in self.tasks if one.task.name == task)
        data.train, data._made = data.tasks[0].train, {}
        return data

    def template(self, batch: int, layout: RowLayout, say: Say) -> Template:
        """The packing of `batch` training examples a step; it depends on the data, not on seeds."""

        def make() -> Template:
            made = train_template(self.train, examples=batch, layout=layout)
            shape, fill = made.shape, TrainSource(self.train, made, 0, layout).epoch_fill()
            say(
                f"{batch} examples a step in {shape.rows} rows of {shape.tokens} tokens, "
                f"{fill:.1%} full"
            )
            return made

        return self._once(("template", batch, layout), make)

    def eval_batches(
        self, split: str, *, mesh: Mesh, layout: RowLayout, deltas: int = 1
    ) -> list[list[EvalBatch]]:
        """A split of each task packed for ranking; validation and test share a shape.

        With several `deltas` scored side by side a batch has so many times fewer rows.
        """
        shape = self.eval_shape(split, mesh=mesh, layout=layout, deltas=deltas)
        return self._once(
            (split, layout, shape),
            lambda: [eval_batches(one.split(split), shape, layout=layout) for one in self.tasks],
        )

    def eval_shape(
        self, split: str, *, mesh: Mesh, layout: RowLayout, deltas: int = 1
    ) -> EvalShape:
        """The shape of `eval_batches`."""
        rows, budget = mesh.shape["data"], scoring_budget() // deltas
        names = {"validation", "test", split}
        return self._once(
            ("shape", tuple(sorted(names)), rows, budget, layout),
            lambda: eval_shape(
                *(one.split(name) for one in self.tasks for name in SPLITS if name in names),
                budget=budget,
                row_multiple=rows,
                layout=layout,
            ),
        )

    def parts(self, split: str, *, mesh: Mesh, layout: RowLayout) -> list[Split]:
        """A split of each task, as evaluators take it."""

        def packed(number: int) -> list[EvalBatch]:
            return self.eval_batches(split, mesh=mesh, layout=layout)[number]

        return [
            Split(one.task, one.split(split), functools.partial(packed, number))
            for number, one in enumerate(self.tasks)
        ]

    @property
    def digests(self) -> dict[str, str]:
        """The digest of every split, by "split", or of a mixture by "task/split"."""
        several = len(self.tasks) > 1
        return {
            f"{one.task.name}/{name}" if several else name: one.split(name).digest
            for one in self.tasks
            for name in SPLITS
        }

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def _of_task(number: int) -> Callable[[Encoded], Encoded]:
    """Marks the examples of a split as those of task `number` of a mixture."""

    def mark(encoded: Encoded) -> Encoded:
        return dataclasses.replace(encoded, tasks=np.full(len(encoded.ids), number, np.int32))

    return mark


def evaluators_of(task: Task, config: ConfigDict) -> list[str]:
    """The evaluators that measure a task: those of `eval.metrics`, or by default the task's first.

    What selects the delta is measured besides.

    Raises:
        UserError: the task has no such metric; names those that it has.
    """
    known = {metric: name for name, metrics in task.metrics.items() for metric in metrics}
    named = [metric.strip() for metric in config.eval.metrics.split(",") if metric.strip()]
    asked = [("eval.metrics", metric) for metric in named]
    if method_settings(config).trains:
        asked.append(("eval.metric", config.eval.metric))
    for key, metric in asked:
        if metric not in known:
            raise UserError(
                f"config key {key!r} is {metric!r}; allowed for task {task.name!r}: "
                f"{', '.join(known)}"
            )
    wanted = {known[metric] for _, metric in asked}
    if not named:
        wanted.add(next(iter(task.metrics)))
    return [name for name in task.metrics if name in wanted]


def read_task(config: ConfigDict, loaded: Loaded, *, bos: bool, say: Say) -> TaskData:
    """Reads a task's splits, cuts them to the config's sizes and encodes them for a model.

    Args:
        config: of one task.
        loaded: the model, for its tokenizer. An encoder-decoder's inputs end with EOS where its
            tokenizer says that they do.
        bos: whether each text begins with the tokenizer's BOS.
        say: is given a line about each split.
    """
    task, sizes = get_task(config.task), config.data
    read, splits = {}, {}
    for name in SPLITS:
        records = read_split(task, name)
        if name == "train" and sizes.train_examples:
            records = balanced_subset(records, sizes.train_examples, sizes.subset_seed)
        if name == "train" and 0 < sizes.cap < len(records):
            records = balanced_subset(records, sizes.cap, sizes.subset_seed)
        limit = {"validation": sizes.validation_examples, "test": sizes.test_examples}
        read[name] = records = seeded_sample(records, limit.get(name, 0))
        splits[name] = encode_records(config, loaded, task, records, bos=bos)
        say(f"{task.name} {name}: {describe(splits[name])}")
    shared_texts, warnings = overlaps(task, read)
    for line in warnings:
        say(line)
    if advice := target_advice(splits["train"], config.eval.score):
        say(f"{task.name}: {advice}")
    return TaskData(task, **splits, shared_texts=shared_texts)


def encode_records(
    config: ConfigDict, loaded: Loaded, task: Task, records: Sequence[Record], *, bos: bool
) -> Encoded:
    """Records as a model's token ids, by the config's `task` section."""
    return encode(
        records,
        task,
        loaded.tokenizer,
        max_input=config.task.max_input,
        max_target=config.task.max_target,
        bos=bos,
        eos=config.task.eos,
        input_eos=loaded.encoder_decoder and loaded.tokenizer.add_eos,
    )


def describe(encoded: Encoded) -> str:
    """One line about a split: examples, labels, lengths, and how many inputs were cut."""
    facts = summary(encoded)
    labels = [f"{count:,} {label}" for label, count in facts["labels"].items()]
    if facts["unlabelled"]:
        labels.append(f"{facts['unlabelled']:,} unlabelled")
    listed = f" ({', '.join(labels)})" if labels else ""
    return (
        f"{facts['examples']:,} examples{listed}, {facts['input_tokens_mean']:.0f} "
        f"tokens on average and {facts['input_tokens_max']} at most, {facts['truncated']} truncated"
    )
