"""How examples lie in the rows of a batch, for both kinds of model.

Everything an example puts into a row is a struct of arrays with one axis. A packed row is the
examples' arrays one after another; a batch has R rows, padded with zeros to the same lengths.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from flax import struct

from softprompt.data.encode import Encoded
from softprompt.models.rows import Array, Rows


@struct.dataclass
class TrainBatch:
    """A step's rows, and what is to be predicted at the positions `rows.index` [R, M].

    Attributes:
        rows: what the model reads.
        targets: [R, M], the token that follows each position.
        loss_weights: [R, M], 1 / target tokens in the step; 0 where nothing is predicted.
    """

    rows: Rows
    targets: Array
    loss_weights: Array


@struct.dataclass
class Pairs:
    """Tokens to be scored, each at a position: C pairs in a row.

    Attributes:
        position: [R, C], which of the row's positions `rows.index` predicts the token.
        token: [R, C], the token.
    """

    position: Array
    token: Array


@struct.dataclass
class EvalBatch:
    """Rows whose sequences are scored: the log-probability of one is the sum over its pairs.

    Attributes:
        rows: what the model reads; its branches are the sequences.
        pairs: the tokens of all sequences.
        example: [R, C], the example of each pair, -1 where there is none.
        candidate: [R, C], the candidate of each pair, -1 where there is none.
    """

    rows: Rows
    pairs: Pairs
    example: Array
    candidate: Array


Batch = TypeVar("Batch", TrainBatch, EvalBatch)


@dataclass(frozen=True)
class RowLayout:
    """Where a model wants an example's input, targets and prompt.

    Attributes:
        start: the id that each of an encoder-decoder's target sequences begins with; None for a
            decoder-only model, in whose row the target follows the input.
        input_slots: prompt vectors that stand inline before each input in the encoder's row.
        target_slots: prompt vectors that stand inline before each target sequence.
        prompts: the number of a mixture's prompts, one for each task (in an encoder-decoder, before
            the input); 0 if all examples have the same prompt.
    """

    start: int | None = None
    input_slots: int = 0
    target_slots: int = 0
    prompts: int = 0

    @property
    def encoder(self) -> bool:
        """Whether the input goes into a row of its own."""
        return self.start is not None


DECODER_LAYOUT = RowLayout()


class Widths(NamedTuple):
    """Positions in a row: its own (T), those with logits (M), and in the encoder's row (S)."""

    tokens: int
    targets: int
    inputs: int = 0


def train_example(layout: RowLayout, encoded: Encoded, number: int) -> TrainBatch:
    """An example of a split, for training.

    The last token of its target is only ever predicted, so it is not in the row.
    """
    tokens, target = encoded.inputs[number], encoded.targets[number]
    if layout.start is None:
        own = _sequence(np.concatenate([tokens, target[:-1]]))
    else:
        own = _sequence(np.array([layout.start, *target[:-1]]), layout.target_slots)
    end = len(own.tokens)
    rows = replace(own, index=np.arange(end - len(target), end))
    rows = _with_input(layout, rows, tokens, encoded.task(number))
    return TrainBatch(rows, target, np.ones(len(target)))


def scored_example(
    layout: RowLayout, encoded: Encoded, number: int, scored: Sequence[np.ndarray]
) -> EvalBatch:
    """An example of a split with sequences that are scored after its input, each a branch.

    A decoder-only model shares the input between them. An encoder-decoder has its input elsewhere,
    and each sequence whole: the relative bias counts positions in the row.
    """
    tokens = encoded.inputs[number]
    if layout.start is None:
        rows, position = _branches_of_input(tokens, scored)
    else:
        rows = _branches(layout.start, layout.target_slots, scored)
        position = np.arange(len(rows.index))
    lengths = [len(one) for one in scored]
    return EvalBatch(
        rows=_with_input(layout, rows, tokens, encoded.task(number)),
        pairs=Pairs(position, np.concatenate(scored)),
        example=np.full(len(position), number),
        candidate=np.repeat(np.arange(len(scored)), lengths),
    )


def _sequence(tokens: np.ndarray, slots: int = 0, *, first: int = 0) -> Rows:
    """The `slots` positions of an inline prompt, whose rows begin at `first`, then the tokens."""
    index = np.arange(slots + len(tokens)) - slots
    return Rows(
        tokens=np.concatenate([np.zeros(slots, np.int32), tokens]),
        segments=np.ones(len(index), np.int32),
        positions=np.maximum(index, 0),
        prompt_index=np.where(index < 0, first + slots + index, -1) if slots else None,
    )


def _with_input(layout: RowLayout, rows: Rows, tokens: np.ndarray, task: int) -> Rows:
    """An example's row with its encoder's, and with the prompt of its task where it has one."""
    assert not layout.prompts or 0 <= task < layout.prompts, f"no prompt for task {task}"
    if layout.encoder:
        first = task * layout.input_slots if layout.prompts else 0
        return replace(rows, encoder=_sequence(tokens, layout.input_slots, first=first))
    return replace(rows, which=np.full(len(rows.tokens), task)) if layout.prompts else rows


def _branches_of_input(tokens: np.ndarray, scored: Sequence[np.ndarray]) -> tuple[Rows, np.ndarray]:
    """An input, then each sequence without its last token as a branch; and the targets of pairs.

    The input's last position predicts the first token of every sequence.
    """
    own = [len(one) - 1 for one in scored]
    end, total = len(tokens), sum(own)
    rows = Rows(
        tokens=np.concatenate([tokens, *(one[:-1] for one in scored)]),
        segments=np.ones(end + total, np.int32),
        positions=np.concatenate([np.arange(end), *(end + np.arange(n) for n in own)]),
        index=np.arange(end - 1, end + total),
        branches=np.repeat(np.arange(len(scored) + 1), [end, *own]),
    )
    targets = np.split(np.arange(total) + 1, np.cumsum(own)[:-1])
    return rows, np.concatenate([[0, *position] for position in targets])


def _branches(start: int, slots: int, scored: Sequence[np.ndarray]) -> Rows:
    """Sequences without their last tokens, each behind slots and the start token."""
    sequences = [_sequence(np.array([start, *one[:-1]]), slots) for one in scored]
    rows: Rows = jax.tree.map(lambda *parts: np.concatenate(parts), *sequences)
    lengths = [len(one.tokens) for one in sequences]
    index = np.flatnonzero(rows.prompt_index < 0) if slots else np.arange(sum(lengths))
    branches = np.repeat(np.arange(len(scored)) + 1, lengths)
    return replace(rows, index=index, branches=branches)


def empty_rows(layout: RowLayout, rows: int, widths: Widths, *, branches: bool = False) -> Rows:
    """Rows of zeros, which are padding: no example sees what stands there.

    Args:
        layout: where the model wants examples.
        rows: R.
        widths: positions in a row.
        branches: the rows are for scoring.
    """

    def zeros(width: int) -> np.ndarray:
        return np.zeros((rows, width), np.int32)

    encoder = None
    if layout.encoder:
        encoder = Rows(
            tokens=zeros(widths.inputs),
            segments=zeros(widths.inputs),
            positions=zeros(widths.inputs),
            prompt_index=zeros(widths.inputs) if layout.input_slots else None,
        )
    return Rows(
        tokens=zeros(widths.tokens),
        segments=zeros(widths.tokens),
        positions=zeros(widths.tokens),
        index=zeros(widths.targets),
        prompt_index=zeros(widths.tokens) if layout.target_slots else None,
        which=zeros(widths.tokens) if layout.prompts and not layout.encoder else None,
        branches=zeros(widths.tokens) if branches else None,
        encoder=encoder,
    )


def write_row(batch: Batch, row: int, examples: Sequence[Batch]) -> None:
    """Writes examples, one after another, into an empty row of a batch (in place)."""
    if not examples:
        return
    tokens, targets, placed = 0, 0, []
    for segment, example in enumerate(examples, 1):
        placed.append(_placed(example, segment, tokens=tokens, targets=targets))
        tokens, targets = tokens + len(example.rows.tokens), targets + len(example.rows.index)

    def write(array: np.ndarray, *parts: np.ndarray) -> None:
        values = np.concatenate(parts)
        width = array.shape[1]
        assert len(values) <= width, (
            f"row {row} is too short: {width} positions, needs {len(values)}"
        )
        array[row, : len(values)] = values

    jax.tree.map(write, batch, *placed)


def _placed(
    example: TrainBatch | EvalBatch, segment: int, *, tokens: int, targets: int
) -> TrainBatch | EvalBatch:
    """An example as a segment of its row, behind so many tokens and positions with logits."""
    rows, encoder = example.rows, example.rows.encoder
    if encoder is not None:
        encoder = replace(encoder, segments=encoder.segments * segment)
    rows = replace(
        rows, segments=rows.segments * segment, index=rows.index + tokens, encoder=encoder
    )
    if isinstance(example, EvalBatch):
        pairs = replace(example.pairs, position=example.pairs.position + targets)
        return replace(example, rows=rows, pairs=pairs)
    return replace(example, rows=rows)
