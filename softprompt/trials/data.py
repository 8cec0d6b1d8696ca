"""A trial's examples as token ids, and their packing into the rows of batches."""

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from softprompt.config import ConfigDict, method_settings
from softprompt.data.builtin_tasks import get_task
from softprompt.data.encode import Encoded, common_opening, encode, mix, summary, target_advice
from softprompt.data.eval_batches import EvalShape, eval_batches, eval_shape
from softprompt.data.packing import Template
from softprompt.data.pipeline import TrainSource, train_template
from softprompt.data.rows import EvalBatch, RowLayout
from softprompt.data.sources import Record
from softprompt.data.splits import overlaps, read_split
from softprompt.data.subsets import balanced_subset, seeded_sample
from softprompt.data.tasks import SPLITS, Task
from softprompt.errors import UserError
from softprompt.evaluation.evaluators import Split
from softprompt.evaluation.ranking import scoring_budget
from softprompt.pretrained.loading import Loaded

Say = Callable[[str], None]

# Fewest tokens of an opening. A method without a prompt runs the layers once more for it: a step of
# LoRA with 32 examples (SmolLM2-135M in bfloat16, two CPU cores) took 1.03 of its time with an
# opening of 2 tokens in the context, 0.97 with 5 and 0.79 with 8. The built-in templates begin
# with fewer tokens, so their trials have no opening.
MIN_OPENING = 8


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's splits as token ids.

    Attributes:
        task: the task.
        train: the training examples.
        validation: the examples that select the delta.
        test: the examples of the reported scores.
        shared_texts: number of texts that occur in two splits.
    """

    task: Task
    train: Encoded
    validation: Encoded
    test: Encoded
    shared_texts: int = 0

    def split(self, name: str) -> Encoded:
        """Returns a split by name: train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    @property
    def ranked(self) -> bool:
        """Whether the task has candidates."""
        return "ranking" in self.task.metrics

    def each(self, change: Callable[[Encoded], Encoded]) -> "TaskData":
        """Returns the task with `change` applied to each split."""
        changed: dict[str, Any] = {name: change(self.split(name)) for name in SPLITS}
        return dataclasses.replace(self, **changed)


@dataclasses.dataclass(frozen=True, eq=False)
class TrialData:
    """The encoded tasks of a trial, and caches of their packed batches.

    Attributes:
        tasks: the trial's task, or those of its mixture, in order; see `mixture`.
        train: the training examples of all tasks.
    """

    tasks: tuple[TaskData, ...]
    train: Encoded
    _cache: dict[Hashable, Any] = dataclasses.field(default_factory=dict, init=False)

    def only(self, task: str) -> "TrialData":
        """Returns the data of one task of a mixture; its examples keep the task's index."""
        (of_task,) = (one for one in self.tasks if one.task.name == task)
        return TrialData((of_task,), of_task.train)

    @property
    def opening(self) -> tuple[int, ...]:
        """The tokens that all inputs of all tasks and splits begin with; () if they are few."""

        def find() -> tuple[int, ...]:
            return long_opening(
                ids for one in self.tasks for name in SPLITS for ids in one.split(name).inputs
            )

        return self._once("opening", find)

    def without_opening(self, count: int, say: Say) -> "TrialData":
        """Returns the data without the first `count` tokens of every input."""

        def make() -> TrialData:
            say(f"all inputs begin with {count} tokens, which are computed once")
            tasks = (one.each(lambda part: part.without_opening(count)) for one in self.tasks)
            return TrialData(tuple(tasks), self.train.without_opening(count))

        return self._once(("without", count), make) if count else self

    def template(self, batch: int, layout: RowLayout, say: Say) -> Template:
        """The packing of `batch` training examples per step; it does not depend on seeds."""

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
        """Packs a split of each task for ranking; validation and test share a shape.

        Tasks without candidates have no batches.

        If several `deltas` are scored side by side, a batch has that many times fewer rows.
        """
        shape = self.eval_shape(split, mesh=mesh, layout=layout, deltas=deltas)
        return self._once(
            (split, layout, shape),
            lambda: [
                eval_batches(one.split(split), shape, layout=layout) if one.ranked else []
                for one in self.tasks
            ],
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
                *(
                    one.split(name)
                    for one in self.tasks
                    for name in SPLITS
                    if one.ranked and name in names
                ),
                budget=budget,
                row_multiple=rows,
                layout=layout,
            ),
        )

    def task_splits(self, split: str, *, mesh: Mesh, layout: RowLayout) -> list[Split]:
        """A split of each task, as the input of evaluators."""

        def packed(number: int) -> list[EvalBatch]:
            return self.eval_batches(split, mesh=mesh, layout=layout)[number]

        return [
            Split(one.task, one.split(split), functools.partial(packed, number))
            for number, one in enumerate(self.tasks)
        ]

    @property
    def digests(self) -> dict[str, str]:
        """The digests of all splits, by "split", or for a mixture by "task/split"."""
        several = len(self.tasks) > 1
        return {
            f"{one.task.name}/{name}" if several else name: one.split(name).digest
            for one in self.tasks
            for name in SPLITS
        }

    def _once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        if key not in self._cache:
            self._cache[key] = make()
        return self._cache[key]


def mixture(tasks: Sequence[TaskData]) -> TrialData:
    """The data of one task, or of several; then each example has its task's index."""
    if len(tasks) == 1:
        return TrialData(tuple(tasks), tasks[0].train)
    numbered = (one.each(functools.partial(with_number, n)) for n, one in enumerate(tasks))
    return TrialData(tuple(numbered), mix({one.task.name: one.train for one in tasks}))


def with_number(number: int, encoded: Encoded) -> Encoded:
    """Marks examples as those of task `number` of a mixture."""
    return dataclasses.replace(encoded, tasks=np.full(len(encoded.ids), number, np.int32))


def long_opening(inputs: Iterable[np.ndarray]) -> tuple[int, ...]:
    """The tokens that all inputs begin with (see `common_opening`); () for too few."""
    opening = tuple(common_opening(inputs).tolist())
    return opening if len(opening) >= MIN_OPENING else ()


def evaluators_of(task: Task, config: ConfigDict) -> list[str]:
    """The evaluators of a task: those of `eval.metrics`, or by default the task's first.

    The evaluator of `eval.metric`, which selects the delta, is always included.

    Raises:
        UserError: the task does not have a metric; lists those that it has.
    """
    known = {metric: name for name, metrics in task.metrics.items() for metric in metrics}
    named = [metric.strip() for metric in config.eval.metrics.split(",") if metric.strip()]
    requested = [("eval.metrics", metric) for metric in named]
    if method_settings(config).trains:
        requested.append(("eval.metric", config.eval.metric))
    for key, metric in requested:
        if metric not in known:
            raise UserError(
                f"config key {key!r} is {metric!r}; allowed for task {task.name!r}: "
                f"{', '.join(known)}"
            )
    wanted = {known[metric] for _, metric in requested}
    if not named:
        wanted.add(next(iter(task.metrics)))
    return [name for name in task.metrics if name in wanted]


def read_task(config: ConfigDict, loaded: Loaded, *, bos: bool, say: Say) -> TaskData:
    """Reads a task's splits, takes subsets of the config's sizes and encodes them.

    Args:
        config: of one task.
        loaded: the model, for its tokenizer. Inputs of an encoder-decoder end with EOS if its
            tokenizer adds one.
        bos: whether each text begins with the tokenizer's BOS.
        say: called with a line about each split.
    """
    task, sizes = get_task(config.task), config.data
    read, splits = {}, {}
    for name in SPLITS:
        records = read_split(task, name) if name in task.splits else []
        if name == "train" and sizes.train_examples:
            records = balanced_subset(records, sizes.train_examples, sizes.subset_seed)
        if name == "train" and 0 < sizes.cap < len(records):
            records = balanced_subset(records, sizes.cap, sizes.subset_seed)
        limit = {"validation": sizes.validation_examples, "test": sizes.test_examples}
        read[name] = records = seeded_sample(records, limit.get(name, 0))
        splits[name] = encode_records(config, loaded, task, records, bos=bos)
        if records:
            say(f"{task.name} {name}: {split_line(splits[name])}")
    shared_texts, warnings = overlaps(task, read)
    for line in warnings:
        say(line)
    if advice := target_advice(splits["train"], config.eval.score):
        say(f"{task.name}: {advice}")
    return TaskData(task, **splits, shared_texts=shared_texts)


def encode_records(
    config: ConfigDict, loaded: Loaded, task: Task, records: Sequence[Record], *, bos: bool
) -> Encoded:
    """Encodes records as a model's token ids, with the config's `task` section."""
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


def split_line(encoded: Encoded) -> str:
    """A line about a split: examples, labels, lengths, and truncated inputs."""
    facts = summary(encoded)
    labels = [f"{count:,} {label}" for label, count in facts["labels"].items()]
    if facts["unlabelled"]:
        labels.append(f"{facts['unlabelled']:,} unlabelled")
    listed = f" ({', '.join(labels)})" if labels else ""
    return (
        f"{facts['examples']:,} examples{listed}, {facts['input_tokens_mean']:.0f} "
        f"tokens on average and {facts['input_tokens_max']} at most, {facts['truncated']} truncated"
    )
