"""Batches of fixed shape: packed rows for training and for scoring.

A batch is a dict of numpy arrays whose names end in their shape: R rows of T tokens, M positions in
a row whose logits are needed, C pairs in a row that are scored. Segment 0 is padding; the examples
of a row are its segments 1, 2, ...; an example's positions start at 0.
"""

import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import grain
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.data.packing import ENOUGH, RowShape, Template, best_fit, plan_template
from softprompt.errors import UserError

Batch = dict[str, np.ndarray]
Score = Literal["candidates", "targets"]
ROW = ("tokens_RT", "segments_RT", "positions_RT", "index_RM")
TRAIN = (*ROW, "target_RM", "weight_RM")
EVAL = (*ROW, "branches_RT", "pair_head_RC", "pair_token_RC")
PAIR = ("pair_example_RC", "pair_candidate_RC")


def train_lengths(encoded: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each example takes in a row, and its target tokens, both [N].

    The last target token is only ever predicted, so that it takes no place.

    Raises:
        UserError: an example has no target.
    """
    for name, tokens, target in zip(encoded.ids, encoded.inputs, encoded.targets, strict=True):
        if not len(target):
            raise UserError(f"example {name!r} has no target: training needs a label")
        assert len(tokens), f"{name}: the first target is predicted from the last input token"
    targets_N = np.array([len(target) for target in encoded.targets])
    return np.array([len(tokens) for tokens in encoded.inputs]) + targets_N - 1, targets_N


def train_template(encoded: Encoded, *, examples: int) -> Template:
    """The template of an encoded split for `examples` a step (see `plan_template`)."""
    return plan_template(*train_lengths(encoded), examples=examples)


def train_batch(
    encoded: Encoded, examples_B: np.ndarray, rows_B: np.ndarray, shape: RowShape
) -> Batch:
    """Packs one step.

    Args:
        encoded: the split.
        examples_B: which example stands at each place.
        rows_B: the row of each place.
        shape: rows, tokens and targets of the step.

    Returns:
        tokens_RT, segments_RT, positions_RT (int32); index_RM, the positions whose hidden state
        predicts a target, target_RM (int32), and weight_RM (float32): 1 / target tokens in the
        step, 0 where nothing is predicted.
    """
    batch = _empty(shape.rows, {"T": shape.tokens, "M": shape.targets}, TRAIN)
    batch["weight_RM"] = batch["weight_RM"].astype(np.float32)
    for row in range(shape.rows):
        used: Counter[str] = Counter()
        for segment, example in enumerate(examples_B[rows_B == row].tolist(), 1):
            target = encoded.targets[example]
            tokens = np.concatenate([encoded.inputs[example], target[:-1]])
            piece = {
                "tokens_RT": tokens,
                "segments_RT": np.full(len(tokens), segment),
                "positions_RT": np.arange(len(tokens)),
                "index_RM": np.arange(len(tokens) - len(target), len(tokens)),
                "target_RM": target,
                "weight_RM": np.ones(len(target)),
            }
            _append(batch, row, used, piece)
    batch["weight_RM"] /= batch["weight_RM"].sum()
    return batch


def pad_rows(batch: Batch, multiple: int) -> Batch:
    """Adds empty rows until their number is a multiple, such as of a mesh's data axis.

    An empty row is all zeros: segment 0 everywhere and no weight.
    """
    return {
        name: np.pad(array, [(0, -len(array) % multiple)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
    }


class TrainSource:
    """The batch of any global step, a pure function of (split, template, seed, step).

    Args:
        encoded: the training split.
        template: its packing, from `train_template`.
        seed: chooses the order of the data, nothing else.
    """

    def __init__(self, encoded: Encoded, template: Template, seed: int):
        self.encoded, self.template, self.seed = encoded, template, seed
        self.lengths_N, _ = train_lengths(encoded)
        self._plan = functools.lru_cache(maxsize=2)(functools.partial(template.epoch, seed))

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The example and the row of each place of a step, both [B]."""
        epoch, nth = divmod(step, self.template.steps)
        plan = self._plan(epoch)
        return plan.examples_SB[nth], plan.rows_SB[nth]

    def __getitem__(self, step: int) -> Batch:
        return train_batch(self.encoded, *self.places(step), self.template.shape)

    def example_ids(self, step: int) -> list[str]:
        """The ids of a step's examples, in the order of its places."""
        return [self.encoded.ids[example] for example in self.places(step)[0]]

    def tokens(self, step: int) -> int:
        """Tokens in a step that are not padding."""
        return int(self.lengths_N[self.places(step)[0]].sum())

    def fill(self, step: int) -> float:
        """The share of a step's positions that hold a token, before `pad_rows`."""
        return self.tokens(step) / (self.template.shape.rows * self.template.shape.tokens)

    def epoch_fill(self, epoch: int = 0) -> float:
        """The mean fill of an epoch's steps."""
        steps = self.template.steps
        return sum(map(self.fill, range(epoch * steps, (epoch + 1) * steps))) / steps


def train_batches(
    source: TrainSource, *, start: int, stop: int, row_multiple: int = 1
) -> grain.IterDataset[Batch]:
    """The batches of steps start to stop, one thread ahead of whoever iterates.

    The only state is the step: starting at k gives what an uninterrupted run would give from k on.
    """
    steps = grain.MapDataset.range(start, stop)
    batches = steps.map(lambda step: pad_rows(source[step], row_multiple))
    return batches.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))


@dataclass(frozen=True)
class EvalShape:
    """The shape of a scoring batch: R rows of T tokens, M heads (places with logits), C pairs."""

    rows: int
    tokens: int
    heads: int
    pairs: int


@dataclass(frozen=True)
class EvalBatch:
    """Examples whose candidates are scored, each input once.

    A candidate's log-probability is a sum over pairs: the log-probability of token pair_token_RC at
    the position index_RM[pair_head_RC].

    Attributes:
        arrays: tokens_RT, segments_RT, positions_RT, branches_RT (0: an input, seen by all of its
            segment; c + 1: the tokens of candidate c, seen by itself alone), index_RM,
            pair_head_RC and pair_token_RC, all int32.
        pair_example_RC: the example of each pair, -1 where there is none.
        pair_candidate_RC: the candidate of each pair, -1 where there is none.
    """

    arrays: Batch
    pair_example_RC: np.ndarray
    pair_candidate_RC: np.ndarray


def eval_shape(
    *splits: Encoded, budget: int = 2048, row_multiple: int = 1, score: Score = "candidates"
) -> EvalShape:
    """Chooses one shape for scoring one or several splits, from the data alone.

    T is the shortest multiple of 8 that fills 0.95 of the rows of all splits, or fills most, of
    those up to twice the longest example.

    Args:
        splits: splits that should share a compiled program.
        budget: tokens in a batch, about.
        row_multiple: R is a multiple of this, such as of a mesh's data axis.
        score: what is scored, see `eval_batches`.
    """
    sizes = [_sizes(split, score) for split in splits]
    used = sum(int(size_N3[:, 0].sum()) for size_N3 in sizes)
    longest = -(-max(int(size_N3[:, 0].max()) for size_N3 in sizes) // 8) * 8
    best_fill, tokens, packed = 0.0, longest, []
    for candidate in range(longest, 2 * longest + 1, 8):
        rows = [_pack(size_N3[:, 0], candidate) for size_N3 in sizes]
        fill = used / (candidate * sum(map(len, rows)))
        if fill > best_fill:
            best_fill, tokens, packed = fill, candidate, rows
        if fill >= ENOUGH:
            break
    most = max(map(len, packed))
    batches = -(-most * tokens // max(budget, tokens))
    per_batch = -(-most // batches // row_multiple) * row_multiple
    heads, pairs = np.max(
        [
            size_N3[row, 1:].sum(axis=0)
            for size_N3, rows in zip(sizes, packed, strict=True)
            for row in rows
        ],
        axis=0,
    )
    return EvalShape(per_batch, tokens, int(heads), int(pairs))


def eval_batches(
    encoded: Encoded, shape: EvalShape, *, score: Score = "candidates"
) -> list[EvalBatch]:
    """Packs a split for scoring; every example is in it once, and all batches have one shape.

    Args:
        encoded: the split; labels are not read.
        shape: from `eval_shape` over splits that include this one, with the same `score`.
        score: "candidates" scores every candidate after every input; "targets" scores each
            example's own target, as its candidate 0 (perplexity).
    """
    rows = _pack(_sizes(encoded, score)[:, 0], shape.tokens)
    return [
        _eval_batch(encoded, rows[first : first + shape.rows], shape, score)
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
    """
    example = np.concatenate([batch.pair_example_RC.ravel() for batch in batches])
    candidate = np.concatenate([batch.pair_candidate_RC.ravel() for batch in batches])
    values = np.concatenate([np.asarray(array, np.float64).ravel() for array in log_probs])
    real = example >= 0
    where = example[real], candidate[real]
    sums_NC = np.zeros((example.max() + 1, candidate.max() + 1))
    lengths_NC = np.zeros(sums_NC.shape, np.int64)
    np.add.at(sums_NC, where, values[real])
    np.add.at(lengths_NC, where, 1)
    return sums_NC, lengths_NC


def _empty(rows: int, widths: dict[str, int], names: Sequence[str]) -> Batch:
    """Zeros for each name, as wide as the letter that it ends in."""
    return {name: np.zeros((rows, widths[name[-1]]), np.int32) for name in names}


def _append(batch: Batch, row: int, used: Counter[str], piece: Batch) -> None:
    """Writes an example's arrays behind what its row already holds (in place).

    Args:
        batch: the arrays of all rows.
        row: where to write.
        used: tokens (T), positions with logits (M) and pairs (C) that the row holds; is advanced.
        piece: the example's arrays; indices count from its own first token or head.
    """
    offsets = {"index_RM": used["T"], "pair_head_RC": used["M"]}
    for name, values in piece.items():
        first = used[name[-1]]
        assert first + len(values) <= batch[name].shape[1], f"{name}: row {row} is too short"
        batch[name][row, first : first + len(values)] = values + offsets.get(name, 0)
    used.update({name[-1]: len(values) for name, values in piece.items()})


def _scored(encoded: Encoded, example: int, score: Score) -> Sequence[np.ndarray]:
    """The token sequences whose probability is wanted after an example's input."""
    return encoded.candidates if score == "candidates" else (encoded.targets[example],)


def _sizes(encoded: Encoded, score: Score) -> np.ndarray:
    """For each example the tokens, heads and pairs that it takes in a row, [N, 3].

    Raises:
        UserError: a target that is to be scored is missing.
    """
    sizes_N3 = np.zeros((len(encoded.inputs), 3), np.int64)
    for example, tokens in enumerate(encoded.inputs):
        lengths = [len(scored) for scored in _scored(encoded, example, score)]
        if not lengths or not min(lengths):
            raise UserError(f"example {encoded.ids[example]!r} has no {score} to score")
        own = sum(lengths) - len(lengths)
        sizes_N3[example] = len(tokens) + own, 1 + own, sum(lengths)
    return sizes_N3


def _pack(sizes_N: np.ndarray, tokens: int) -> list[list[int]]:
    """The examples of each row, by best-fit decreasing."""
    order = np.argsort(-sizes_N, kind="stable")
    row_of = best_fit(sizes_N[order].tolist(), tokens)
    rows: list[list[int]] = [[] for _ in range(1 + max(row_of))]
    for example, row in zip(order.tolist(), row_of, strict=True):
        rows[row].append(example)
    return rows


def _eval_batch(
    encoded: Encoded, rows: list[list[int]], shape: EvalShape, score: Score
) -> EvalBatch:
    widths = {"T": shape.tokens, "M": shape.heads, "C": shape.pairs}
    batch = _empty(shape.rows, widths, EVAL + PAIR)
    for name in PAIR:
        batch[name] -= 1
    for row, examples in enumerate(rows):
        used: Counter[str] = Counter()
        for segment, example in enumerate(examples, 1):
            piece = _branch(encoded.inputs[example], _scored(encoded, example, score))
            piece["segments_RT"] = np.full(len(piece["tokens_RT"]), segment)
            piece["pair_example_RC"] = np.full(len(piece["pair_token_RC"]), example)
            _append(batch, row, used, piece)
    return EvalBatch({name: batch[name] for name in EVAL}, *(batch[name] for name in PAIR))


def _branch(tokens: np.ndarray, scored: Sequence[np.ndarray]) -> Batch:
    """One example's arrays: its input, then each candidate without its last token as a branch."""
    own = [len(candidate) - 1 for candidate in scored]
    heads = np.split(np.arange(sum(own)) + 1, np.cumsum(own)[:-1])
    end, candidates = len(tokens), range(len(scored))
    return {
        "tokens_RT": np.concatenate([tokens, *(candidate[:-1] for candidate in scored)]),
        "positions_RT": np.concatenate([np.arange(end), *(end + np.arange(n) for n in own)]),
        "branches_RT": np.repeat([0, *(c + 1 for c in candidates)], [end, *own]),
        "index_RM": np.arange(end - 1, end + sum(own)),
        "pair_head_RC": np.concatenate([[0, *head] for head in heads]),
        "pair_token_RC": np.concatenate(scored),
        "pair_candidate_RC": np.repeat(candidates, [n + 1 for n in own]),
    }
