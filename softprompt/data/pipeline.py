"""Batches of fixed shape: packed rows for training."""

import functools
from dataclasses import replace
from typing import Protocol

import grain
import jax
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.data.packing import RowShape, Template, plan_template
from softprompt.data.rows import (
    DECODER_LAYOUT,
    RowLayout,
    TrainBatch,
    Widths,
    empty_rows,
    train_example,
    write_row,
)
from softprompt.errors import UserError


def train_lengths(
    encoded: Encoded, layout: RowLayout = DECODER_LAYOUT
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of each example in the row that has its input, and its target tokens, both [N].

    In a decoder's row the target follows the input. Its last token is only ever predicted, so it is
    not in the row.

    Raises:
        UserError: an example has no target.
    """
    for name, tokens, target in zip(encoded.ids, encoded.inputs, encoded.targets, strict=True):
        if not len(target):
            raise UserError(f"example {name!r} has no target: training needs a label")
        assert len(tokens), f"{name}: the first target is predicted from the last input token"
    inputs_N = np.array([len(tokens) for tokens in encoded.inputs])
    targets_N = np.array([len(target) for target in encoded.targets])
    return inputs_N + (layout.input_slots if layout.encoder else targets_N - 1), targets_N


def train_template(
    encoded: Encoded, *, examples: int, layout: RowLayout = DECODER_LAYOUT
) -> Template:
    """The template of an encoded split for `examples` a step (see `plan_template`)."""
    return plan_template(*train_lengths(encoded, layout), examples=examples)


def train_batch(
    encoded: Encoded,
    examples_B: np.ndarray,
    rows_B: np.ndarray,
    shape: RowShape,
    layout: RowLayout = DECODER_LAYOUT,
) -> TrainBatch:
    """Packs one step, in int32; the weights are float32.

    Args:
        encoded: the split.
        examples_B: which example stands at each place.
        rows_B: the row of each place.
        shape: rows, tokens and targets of the step.
        layout: where the model wants them.
    """
    batch = empty_batch(shape, layout)
    for row in range(shape.rows):
        numbers = examples_B[rows_B == row].tolist()
        write_row(batch, row, [train_example(layout, encoded, n) for n in numbers])
    batch.loss_weights[:] /= batch.loss_weights.sum()
    return batch


def empty_batch(shape: RowShape, layout: RowLayout) -> TrainBatch:
    """A step's arrays without an example."""
    size = shape.rows, shape.targets
    return TrainBatch(
        rows=empty_rows(layout, shape.rows, train_widths(shape, layout)),
        targets=np.zeros(size, np.int32),
        loss_weights=np.zeros(size, np.float32),
    )


def row_examples(examples_B: np.ndarray, rows_B: np.ndarray, shape: RowShape) -> np.ndarray:
    """Which example each segment of each row is, int32 [R, E]: segment 1 comes first, 0 is spare.

    Args:
        examples_B: which example stands at each place of a step.
        rows_B: the row of each place.
        shape: of the step; E is its `examples`.
    """
    ids_RE = np.zeros((shape.rows, shape.examples), np.int32)
    for row in range(shape.rows):
        own = examples_B[rows_B == row]
        ids_RE[row, : len(own)] = own
    return ids_RE


def train_widths(shape: RowShape, layout: RowLayout) -> Widths:
    """Positions in a row. An encoder-decoder's `shape.tokens` are those of its encoder."""
    if not layout.encoder:
        return Widths(shape.tokens, shape.targets)
    own = shape.targets + shape.examples * layout.target_slots
    return Widths(own, shape.targets, shape.tokens)


def pad_rows(batch: TrainBatch, multiple: int) -> TrainBatch:
    """Adds empty rows until their number is a multiple, such as of a mesh's data axis.

    An empty row is all zeros: segment 0 everywhere and no weight.
    """

    def pad(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, -len(array) % multiple)] + [(0, 0)] * (array.ndim - 1))

    padded: TrainBatch = jax.tree.map(pad, batch)
    return padded


class BatchSource(Protocol):
    """The batch of any global step, a pure function of the step."""

    @property
    def examples(self) -> int:
        """Examples of a step."""

    def __getitem__(self, step: int) -> TrainBatch: ...

    def tokens(self, step: int) -> int:
        """Positions of a step's rows that are not padding."""

    def fill(self, step: int) -> float:
        """The share of a step's positions that hold a token."""


class TrainSource:
    """The batch of any global step, a pure function of (split, template, seed, step).

    Args:
        encoded: the training split.
        template: its packing, from `train_template` with the same layout.
        seed: chooses the order of the data, nothing else.
        layout: where the model wants an example.
        ids: batches have `Rows.examples` (see `row_examples`), by which dropout goes.
    """

    def __init__(
        self,
        encoded: Encoded,
        template: Template,
        seed: int,
        layout: RowLayout = DECODER_LAYOUT,
        *,
        ids: bool = False,
    ):
        self.encoded, self.template, self.seed, self.layout = encoded, template, seed, layout
        self.ids = ids
        self.lengths_N, _ = train_lengths(encoded, layout)
        self._plan = functools.lru_cache(maxsize=2)(functools.partial(template.epoch, seed))

    @property
    def examples(self) -> int:
        """Examples of a step."""
        return self.template.examples

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The example and the row of each place of a step, both [B]."""
        epoch, nth = divmod(step, self.template.steps)
        plan = self._plan(epoch)
        return plan.examples_SB[nth], plan.rows_SB[nth]

    def __getitem__(self, step: int) -> TrainBatch:
        places, shape = self.places(step), self.template.shape
        batch = train_batch(self.encoded, *places, shape, self.layout)
        if not self.ids:
            return batch
        rows = replace(batch.rows, examples=row_examples(*places, shape))
        return replace(batch, rows=rows)

    def tokens(self, step: int) -> int:
        """Positions of a step's rows (an encoder-decoder's encoder's) that are not padding."""
        return int(self.lengths_N[self.places(step)[0]].sum())

    def fill(self, step: int) -> float:
        """The share of a step's positions that hold a token, before `pad_rows`."""
        return self.tokens(step) / (self.template.shape.rows * self.template.shape.tokens)

    def epoch_fill(self, epoch: int = 0) -> float:
        """The mean fill of an epoch's steps."""
        steps = self.template.steps
        return sum(map(self.fill, range(epoch * steps, (epoch + 1) * steps))) / steps


def train_batches(
    source: BatchSource, *, start: int, stop: int, row_multiple: int = 1
) -> grain.IterDataset[TrainBatch]:
    """The batches of steps start to stop, one thread ahead of whoever iterates.

    The only state is the step: starting at k gives what an uninterrupted run would give from k on.
    """
    steps = grain.MapDataset.range(start, stop)
    batches = steps.map(lambda step: pad_rows(source[step], row_multiple))
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
