"""Objectives: how pieces of a running text become rows, and what is predicted in them.

The text is the documents one after another, each followed by EOS. It is cut into pieces of equal
length. Every row of a step is made from its own piece (prefix LM: from two), so that a batch is a
pure function of (text, recipe, step).

| objective | row | predicted |
| --- | --- | --- |
| causal | a piece; a token sees its own document | the next token, everywhere |
| span corruption | encoder: a piece with sentinels for its spans, EOS | sentinels and spans, EOS |
| prefix LM | encoder: the beginnings of two pieces | their ends |
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import numpy as np

from softprompt.analysis.flops import Work
from softprompt.data.rows import TrainBatch
from softprompt.models.rows import Rows

DENSITY, SPAN = 0.15, 3.0  # share of corrupted tokens, and mean length of a span
Piece = tuple[np.ndarray, ...]
Make = Callable[[Piece, np.random.Generator], TrainBatch]


class Pieces:
    """The batch of any step; see `softprompt.data.pipeline.TrainSource`.

    Args:
        pieces_NL: the pieces, int32.
        make: pieces of one row, and random numbers -> the row.
        rows: rows of a step.
        each: pieces of a row.
        seed: chooses the order of the pieces, which differs in every epoch, and what is corrupted.
        text: tokens of text in a piece.
    """

    def __init__(
        self, pieces_NL: np.ndarray, make: Make, *, rows: int, each: int, seed: int, text: int
    ):
        self.pieces_NL, self.make, self.examples = pieces_NL, make, rows
        self.each, self.seed, self.text = each, seed, text
        self._order = functools.lru_cache(maxsize=2)(self._shuffled)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return len(self.pieces_NL) // (self.examples * self.each)

    def _shuffled(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.pieces_NL))

    def __getitem__(self, step: int) -> TrainBatch:
        epoch, nth = divmod(step, self.steps)
        taken = self.examples * self.each
        numbers_RE = self._order(epoch)[nth * taken : (nth + 1) * taken].reshape(-1, self.each)
        rows = [
            self.make(tuple(self.pieces_NL[numbers_E]), np.random.default_rng([self.seed, step, n]))
            for n, numbers_E in enumerate(numbers_RE)
        ]
        batch: TrainBatch = jax.tree.map(lambda *parts: np.stack(parts), *rows)
        weights = batch.loss_weights / batch.loss_weights.sum()
        return replace(batch, loss_weights=weights.astype(np.float32))

    def tokens(self, step: int) -> int:
        """Tokens of text in a step."""
        return self.examples * self.each * self.text

    def fill(self, step: int) -> float:
        """The share of positions that hold a token: all of them."""
        return 1.0


def cut(text_X: np.ndarray, length: int, *, overlap: int = 0) -> np.ndarray:
    """Pieces [N, length + overlap] of a text; the rest of it is dropped."""
    count = (len(text_X) - overlap) // length
    begins_N = np.arange(count) * length
    return text_X[begins_N[:, None] + np.arange(length + overlap)].astype(np.int32)


def causal(piece: Piece, rng: np.random.Generator, *, eos: int) -> TrainBatch:
    """A row of the piece without its last token; a document begins with the EOS before it."""
    tokens_T, targets_T = piece[0][:-1], piece[0][1:]
    begins_T = tokens_T == eos
    begins_T[0] = True
    segments_T = np.cumsum(begins_T)
    return TrainBatch(_row(tokens_T, segments_T), targets_T, np.ones(len(targets_T)))


def span_lengths(length: int) -> tuple[int, int, int]:
    """Corrupted tokens, spans, and positions of the encoder's row with EOS, for a piece's length.

    Source: `random_spans_helper` of T5's preprocessors.
    """
    corrupted = min(max(int(np.round(length * DENSITY)), 1), length - 1)
    spans = max(int(np.round(corrupted / SPAN)), 1)
    return corrupted, spans, length - corrupted + spans + 1


def piece_length(row: int) -> int:
    """The longest piece whose corrupted text and EOS fit an encoder's row."""
    return max(n for n in range(2, 2 * row) if span_lengths(n)[2] <= row)


def spans_of(length: int, rng: np.random.Generator) -> list[tuple[int, int]]:
    """Random spans [begin, end) of a piece, which begins outside and ends inside of one.

    Source: `random_spans_noise_mask` of T5's preprocessors.
    """
    corrupted, spans, _ = span_lengths(length)

    def parts(total: int) -> np.ndarray:
        cuts = np.sort(rng.choice(total - 1, spans - 1, replace=False)) + 1
        return np.diff([0, *cuts, total])

    lengths = np.stack([parts(length - corrupted), parts(corrupted)], axis=1).ravel()
    return [(int(a), int(b)) for a, b in np.cumsum(lengths).reshape(-1, 2)]


def corrupt(
    piece_L: np.ndarray, spans: Sequence[tuple[int, int]], sentinels: Sequence[int], eos: int
) -> tuple[np.ndarray, np.ndarray]:
    """The piece with a sentinel for each span, and the targets: each sentinel, then its span.

    Both end with EOS, and with no further sentinel, as T5's do.
    """
    inputs: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    last = 0
    for sentinel, (begin, end) in zip(sentinels, spans, strict=False):
        inputs += [piece_L[last:begin], np.array([sentinel])]
        targets += [np.array([sentinel]), piece_L[begin:end]]
        last = end
    return (
        np.concatenate([*inputs, piece_L[last:], [eos]]).astype(np.int32),
        np.concatenate([*targets, [eos]]).astype(np.int32),
    )


def span_corruption(
    piece: Piece, rng: np.random.Generator, *, sentinels: Sequence[int], eos: int, start: int
) -> TrainBatch:
    """A row of one corrupted piece. Source: arXiv 1910.10683, section 3.1.4."""
    inputs, targets = corrupt(piece[0], spans_of(len(piece[0]), rng), sentinels, eos)
    return _pair([inputs], [targets], start)


def prefix_lm(pieces: Piece, rng: np.random.Generator, *, start: int) -> TrainBatch:
    """A row of two pieces, split at a random place and at its mirror image: both rows are full.

    Source: `pack_prefix_lm_encoder_decoder` of T5's preprocessors.
    """
    one, other = pieces
    at = int(rng.integers(1, len(one)))
    back = len(one) - at
    return _pair([one[:at], other[:back]], [one[at:], other[back:]], start)


def _pair(inputs: list[np.ndarray], targets: list[np.ndarray], start: int) -> TrainBatch:
    """A row of several (input, target) pairs, each a segment."""
    shifted = [np.array([start, *target[:-1]]) for target in targets]

    def packed(parts: list[np.ndarray]) -> Rows:
        numbers = np.repeat(np.arange(len(parts)) + 1, [len(part) for part in parts])
        return _row(np.concatenate(parts), numbers)

    rows = replace(packed(shifted), encoder=replace(packed(inputs), index=None))
    target_M = np.concatenate(targets)
    return TrainBatch(rows, target_M, np.ones(len(target_M)))


def _row(tokens_T: np.ndarray, segments_T: np.ndarray) -> Rows:
    """A row whose every position has logits; positions count from each segment's beginning."""
    index_T = np.arange(len(tokens_T), dtype=np.int32)
    begins_T = np.flatnonzero(np.diff(segments_T, prepend=0))
    positions_T = index_T - begins_T[segments_T - 1]
    return Rows(
        tokens=tokens_T.astype(np.int32),
        segments=segments_T.astype(np.int32),
        positions=positions_T.astype(np.int32),
        index=index_T,
    )


def work(batch: TrainBatch) -> Work:
    """The useful work of a step: keys of other segments do not count."""
    rows = batch.rows
    counts = {"tokens": rows.tokens.size, "keys": int((rows.positions + 1).sum())}
    counts["targets"] = batch.targets.size
    if rows.encoder is not None:
        inside = rows.encoder.segments[:, :, None] == rows.encoder.segments[:, None]
        across = rows.segments[:, :, None] == rows.encoder.segments[:, None]
        counts |= {"inputs": rows.encoder.tokens.size, "input_keys": int(inside.sum())}
        counts["cross_keys"] = int(across.sum())
    return Work(**counts)
