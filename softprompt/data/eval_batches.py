"""Packed rows for rank scoring: an input, run once, and every candidate beside it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from softprompt.data.encode import Encoded
from softprompt.data.packing import TARGET_FILL, best_fit
from softprompt.data.rows import (
    DECODER_LAYOUT,
    EvalBatch,
    Pairs,
    RowLayout,
    Widths,
    empty_rows,
    scored_example,
    write_row,
)
from softprompt.errors import UserError

Score = Literal["candidates", "targets"]


@dataclass(frozen=True)
class EvalShape:
    """The shape of a scoring batch: R rows of T tokens, M targets (positions with logits), C pairs.

    `inputs`: S, for an encoder-decoder.
    """

    rows: int
    tokens: int
    targets: int
    pairs: int
    inputs: int = 0

    @property
    def widths(self) -> Widths:
        """Positions in a row."""
        return Widths(self.tokens, self.targets, self.inputs)


def eval_shape(
    *splits: Encoded,
    budget: int = 2048,
    row_multiple: int = 1,
    score: Score = "candidates",
    layout: RowLayout = DECODER_LAYOUT,
) -> EvalShape:
    """Chooses one shape for scoring one or several splits, from the data alone.

    T (an encoder-decoder's S) is the shortest multiple of 8 that fills 0.95 of the rows of all
    splits, or fills most, of those up to twice the longest example.

    Args:
        splits: splits that should share a compiled program.
        budget: tokens in a batch, about.
        row_multiple: R is a multiple of this, such as of a mesh's data axis.
        score: what is scored, see `eval_batches`.
        layout: where the model wants an example.
    """
    sizes = [_sizes(split, score, layout) for split in splits]
    used = sum(int(size_N4[:, 0].sum()) for size_N4 in sizes)
    longest = -(-max(int(size_N4[:, 0].max()) for size_N4 in sizes) // 8) * 8
    best_fill, tokens, packed = 0.0, longest, []
    for candidate in range(longest, 2 * longest + 1, 8):
        rows = [_pack(size_N4[:, 0], candidate) for size_N4 in sizes]
        fill = used / (candidate * sum(map(len, rows)))
        if fill > best_fill:
            best_fill, tokens, packed = fill, candidate, rows
        if fill >= TARGET_FILL:
            break
    most = max(map(len, packed))
    batches = -(-most * tokens // max(budget, tokens))
    per_batch = -(-most // batches // row_multiple) * row_multiple
    own, targets, pairs = np.max(
        [
            size_N4[row, 1:].sum(axis=0)
            for size_N4, rows in zip(sizes, packed, strict=True)
            for row in rows
        ],
        axis=0,
    )
    lengths = (int(own), tokens) if layout.encoder else (tokens, 0)
    return EvalShape(per_batch, lengths[0], int(targets), int(pairs), inputs=lengths[1])


def coarse_shape(encoded: Encoded, *, rows: int, layout: RowLayout = DECODER_LAYOUT) -> EvalShape:
    """A shape for scoring a few examples, one of few, so that few programs are compiled."""
    sizes_N4 = _sizes(encoded, "candidates", layout)
    longest, own, targets, pairs = map(int, sizes_N4.max(axis=0))
    packed = -(-longest // 64) * 64
    shortest = int(sizes_N4[:, 0].min())
    examples = 1 << (packed // shortest - 1).bit_length()  # the shortest fill a row
    lengths = (examples * own, packed) if layout.encoder else (packed, 0)
    return EvalShape(rows, lengths[0], examples * targets, examples * pairs, inputs=lengths[1])


def eval_batches(
    encoded: Encoded,
    shape: EvalShape,
    *,
    score: Score = "candidates",
    layout: RowLayout = DECODER_LAYOUT,
) -> list[EvalBatch]:
    """Packs a split for scoring; every example is in it once, and all batches have one shape.

    Args:
        encoded: the split; labels are not read.
        shape: from `eval_shape` over splits that include this one, with the same `score` and
            `layout`.
        score: "candidates" scores every candidate after every input; "targets" scores each
            example's own target, as its candidate 0 (perplexity).
        layout: where the model wants an example.
    """
    rows = _pack(_sizes(encoded, score, layout)[:, 0], shape.inputs or shape.tokens)
    return [
        _eval_batch(encoded, rows[first : first + shape.rows], shape, score, layout)
        for first in range(0, len(rows), shape.rows)
    ]


def collect(
    batches: Sequence[EvalBatch], log_probs: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums the pairs' log-probabilities by example and candidate.

    Args:
        batches: from `eval_batches`.
        log_probs: for each batch, the log-probability of each of its pairs, [R, C].

    Returns:
        The sums (float64) and the number of tokens summed, both [examples, candidates].

    Raises:
        UserError: a log-probability that is no number.
    """
    example = np.concatenate([np.ravel(batch.example) for batch in batches])
    candidate = np.concatenate([np.ravel(batch.candidate) for batch in batches])
    values = np.concatenate([np.asarray(array, np.float64).ravel() for array in log_probs])
    real = example >= 0
    if wrong := np.count_nonzero(~np.isfinite(values[real])):
        raise UserError(
            f"{wrong:,} of {np.count_nonzero(real):,} log-probabilities are no finite number: the "
            "delta, or what the model makes of it, is broken"
        )
    where = example[real], candidate[real]
    sums_NC = np.zeros((example.max() + 1, candidate.max() + 1))
    lengths_NC = np.zeros(sums_NC.shape, np.int64)
    np.add.at(sums_NC, where, values[real])
    np.add.at(lengths_NC, where, 1)
    return sums_NC, lengths_NC


def _scored(encoded: Encoded, example: int, score: Score) -> Sequence[np.ndarray]:
    """The token sequences whose probability is wanted after an example's input."""
    return encoded.ranked(example) if score == "candidates" else (encoded.targets[example],)


def _sizes(encoded: Encoded, score: Score, layout: RowLayout) -> np.ndarray:
    """The size of each example, [N, 4]: in the row that is packed, then of T, M and C.

    Raises:
        UserError: a target that is to be scored is missing.
    """
    sizes_N4 = np.zeros((len(encoded.inputs), 4), np.int64)
    for example, tokens in enumerate(encoded.inputs):
        lengths = [len(scored) for scored in _scored(encoded, example, score)]
        if not lengths or not min(lengths):
            raise UserError(f"example {encoded.ids[example]!r} has no {score} to score")
        if layout.encoder:
            own = sum(lengths) + layout.target_slots * len(lengths)
            sizes_N4[example] = layout.input_slots + len(tokens), own, sum(lengths), sum(lengths)
        else:
            own = sum(lengths) - len(lengths)
            sizes_N4[example] = len(tokens) + own, len(tokens) + own, 1 + own, sum(lengths)
    return sizes_N4


def _pack(sizes_N: np.ndarray, tokens: int) -> list[list[int]]:
    """The examples of each row, by best-fit decreasing."""
    order = np.argsort(-sizes_N, kind="stable")
    row_of = best_fit(sizes_N[order].tolist(), tokens)
    rows: list[list[int]] = [[] for _ in range(1 + max(row_of))]
    for example, row in zip(order.tolist(), row_of, strict=True):
        rows[row].append(example)
    return rows


def _eval_batch(
    encoded: Encoded, rows: list[list[int]], shape: EvalShape, score: Score, layout: RowLayout
) -> EvalBatch:
    """Packs rows of examples, given by their numbers, in int32."""
    none_RC = np.full((shape.rows, shape.pairs), -1, np.int32)
    batch = EvalBatch(
        rows=empty_rows(layout, shape.rows, shape.widths, branches=True),
        pairs=Pairs(np.zeros_like(none_RC), np.zeros_like(none_RC)),
        example=none_RC,
        candidate=none_RC.copy(),
    )
    for row, numbers in enumerate(rows):
        scored = [scored_example(layout, encoded, n, _scored(encoded, n, score)) for n in numbers]
        write_row(batch, row, scored)
    return batch
