"""Batches. Each test names the mutation of `softprompt.data.pipeline` that breaks it."""

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data.encode import Encoded
from softprompt.data.eval_batches import EvalShape, collect, eval_batches, eval_shape
from softprompt.data.pipeline import TrainSource, pad_rows, train_batches, train_template
from softprompt.data.rows import EvalBatch
from softprompt.errors import UserError

CANDIDATES = ((7,), (8, 9), (8, 4, 9))


def make(lengths, targets=None, candidates=CANDIDATES) -> Encoded:
    """A split with random tokens and the given numbers of input and target tokens."""
    random = np.random.default_rng(0)
    targets = [1] * len(lengths) if targets is None else targets
    return Encoded(
        ids=[f"id{n}" for n in range(len(lengths))],
        inputs=[random.integers(1, 999, n, dtype=np.int32) for n in lengths],
        targets=[random.integers(1, 999, n, dtype=np.int32) for n in targets],
        labels=np.full(len(lengths), -1, np.int32),
        candidates=tuple(np.array(tokens, np.int32) for tokens in candidates),
        truncated=0,
    )


def spread(count: int, longest: int = 60) -> list[int]:
    return np.random.default_rng(1).integers(3, longest, count).tolist()


def same(left, right) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return jax.tree.all(jax.tree.map(np.array_equal, left, right))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_a_row_is_its_examples_one_after_the_other(sizes, examples):
    # Mutations: keep the target's last token; positions or segments that do not restart;
    # an example written over another; tokens reversed; weights per example.
    encoded = make(*zip(*sizes, strict=True))
    source = TrainSource(encoded, train_template(encoded, examples=examples), seed=0)
    for step in range(source.template.steps):
        batch = source[step]
        shape = source.template.shape
        assert batch.rows.tokens.shape == (shape.rows, shape.tokens)
        assert batch.rows.index.shape == (shape.rows, shape.targets)
        found = []
        for row in range(shape.rows):
            segments_T = batch.rows.segments[row]
            assert (np.diff(segments_T[segments_T > 0]) >= 0).all()
            for segment in range(1, segments_T.max(initial=0) + 1):
                at = np.flatnonzero(segments_T == segment)
                assert np.array_equal(at, np.arange(at[0], at[0] + len(at)))
                assert np.array_equal(batch.rows.positions[row, at], np.arange(len(at)))
                found.append(tuple(batch.rows.tokens[row, at].tolist()))
        want = [
            tuple(np.concatenate([encoded.inputs[n], encoded.targets[n][:-1]]).tolist())
            for n in source.places(step)[0]
        ]
        assert sorted(found) == sorted(want)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(1, 6)), min_size=1, max_size=40),
    st.integers(1, 12),
)
def test_targets_are_the_next_tokens(sizes, examples):
    # Mutations: index one too late (the target's own place); index without the row's offset;
    # weight 1 / examples.
    encoded = make(*zip(*sizes, strict=True))
    source = TrainSource(encoded, train_template(encoded, examples=examples), seed=0)
    whole = [
        tuple(np.concatenate(both).tolist())
        for both in zip(encoded.inputs, encoded.targets, strict=True)
    ]
    batch, (examples_B, _) = source[0], source.places(0)
    seen = []
    for row, place in np.argwhere(batch.loss_weights > 0):
        index = batch.rows.index[row, place]
        mine = batch.rows.segments[row] == batch.rows.segments[row, index]
        prefix = batch.rows.tokens[row][mine & (np.arange(mine.size) <= index)]
        seen.append((*prefix.tolist(), int(batch.targets[row, place])))
    want = [
        whole[n][:end]
        for n in examples_B.tolist()
        for end in range(len(encoded.inputs[n]) + 1, len(whole[n]) + 1)
    ]
    assert sorted(seen) == sorted(want)
    weights = batch.loss_weights[batch.loss_weights > 0]
    assert batch.loss_weights.dtype == np.float32
    assert np.isclose(weights.sum(), 1, rtol=1e-6)
    assert np.all(weights == weights[0])


def test_batches_resume_from_any_step():
    # Mutations: count steps from the resumed one; keep a random state between batches.
    encoded = make(spread(50))
    template = train_template(encoded, examples=8)
    run = list(train_batches(TrainSource(encoded, template, seed=5), start=0, stop=17))
    assert len(run) == 17 and not same(run[0], run[template.steps])
    for start in range(17):
        rest = list(train_batches(TrainSource(encoded, template, seed=5), start=start, stop=17))
        assert all(same(*pair) for pair in zip(rest, run[start:], strict=True))


def test_the_iterator_restores_from_its_state():
    # Mutation: hand out batches from a generator, which has no state to restore.
    encoded = make(spread(30))
    source = TrainSource(encoded, train_template(encoded, examples=8), seed=5)
    batches = train_batches(source, start=3, stop=9).map(jax.tree.leaves)
    grain.experimental.assert_equal_output_after_checkpoint(batches)


def test_each_epoch_has_every_example():
    # Mutations: the same plan for every epoch; the step's row of the plan off by one.
    encoded = make(spread(24))
    source = TrainSource(encoded, train_template(encoded, examples=8), seed=0)
    epochs = [
        np.concatenate([source.places(3 * epoch + nth)[0] for nth in range(3)]).tolist()
        for epoch in range(4)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(24))
    assert epochs[0] != epochs[1]


def test_fill_counts_the_tokens_of_the_batch():
    # Mutation: count inputs without targets, or with their last token.
    encoded = make(spread(100), [1 + n % 4 for n in range(100)])
    source = TrainSource(encoded, train_template(encoded, examples=16), seed=0)
    fills = []
    for step in range(source.template.steps):
        real = source[step].rows.segments > 0
        assert source.tokens(step) == real.sum()
        assert source.fill(step) == pytest.approx(real.mean())
        fills.append(real.mean())
    assert source.epoch_fill() == pytest.approx(np.mean(fills))
    assert source.epoch_fill() > 0.9


def test_padded_rows_are_empty_and_change_nothing_else():
    # Mutation: pad with copies of a row.
    encoded = make(spread(40))
    source = TrainSource(encoded, train_template(encoded, examples=8), seed=0)
    multiple = source.template.shape.rows + 3
    (padded,) = train_batches(source, start=0, stop=1, row_multiple=multiple)
    rows = source.template.shape.rows
    assert same(jax.tree.map(lambda array: array[:rows], padded), source[0])
    arrays = jax.tree.leaves(padded)
    assert all(len(array) == multiple and not array[rows:].any() for array in arrays)
    assert same(pad_rows(padded, multiple), padded)


def test_an_example_without_a_target_cannot_train():
    # Mutation: let an empty target through (its step would have no weight).
    with pytest.raises(UserError, match="'id1' has no target"):
        train_template(make([3, 4, 5], [1, 0, 1]), examples=2)


def pretend_log_probs(batch: EvalBatch) -> np.ndarray:
    """A log-probability of each pair that depends on all that the pair's position may see."""
    rows, pairs = batch.rows, batch.pairs
    log_probs_RC = np.full(batch.example.shape, np.nan)
    for row, pair in np.argwhere(batch.example >= 0):
        index = rows.index[row, pairs.position[row, pair]]
        branches_T = rows.branches[row]
        seen = rows.segments[row] == rows.segments[row, index]
        seen &= (branches_T == 0) | (branches_T == branches_T[index])
        seen &= rows.positions[row] <= rows.positions[row, index]
        order = np.argsort(rows.positions[row][seen])
        prefix = rows.tokens[row][seen][order]
        log_probs_RC[row, pair] = pretend(prefix, pairs.token[row, pair])
    return log_probs_RC


def pretend(prefix: np.ndarray, token: int) -> float:
    return hash((*prefix.tolist(), int(token))) % 100_003 / 100_003


def direct(tokens: np.ndarray, candidate: np.ndarray) -> float:
    whole = np.concatenate([tokens, candidate])
    return sum(pretend(whole[:n], whole[n]) for n in range(len(tokens), len(whole)))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=40),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(16, 300),
)
def test_every_candidate_of_every_example_is_scored_once(lengths, candidates, budget):
    # Mutations: drop the last batch; positions that do not continue from the input; a head per
    # pair's own token; segments off by one; a branch that sees its neighbour; heads without offset.
    encoded = make(lengths, candidates=candidates)
    shape = eval_shape(encoded, budget=budget)
    batches = eval_batches(encoded, shape)
    sums_NC, lengths_NC = collect(batches, [pretend_log_probs(batch) for batch in batches])
    want_NC = [[direct(t, c) for c in encoded.candidates] for t in encoded.inputs]
    np.testing.assert_allclose(sums_NC, want_NC, rtol=1e-9)
    assert np.array_equal(lengths_NC, [[len(c) for c in candidates]] * len(lengths))


def test_each_input_is_read_once_and_its_end_has_one_head():
    # Mutation: a row of its own for each candidate; a head for each candidate's first token.
    encoded = make([10, 20, 30])
    (batch,) = eval_batches(encoded, eval_shape(encoded))
    own = sum(len(candidate) - 1 for candidate in CANDIDATES)
    assert (batch.rows.segments > 0).sum() == 60 + 3 * own
    real = batch.example >= 0
    rows_RC = np.broadcast_to(np.arange(len(real))[:, None], real.shape)
    heads = set(zip(rows_RC[real], batch.pairs.position[real], strict=True))
    assert len(heads) == 3 * (1 + own)


def test_scores_that_are_no_numbers_are_an_error():
    # Mutation: the first candidate wins, since nothing is larger than what is no number.
    encoded = make([5, 9])
    batches = eval_batches(encoded, eval_shape(encoded))
    found = [pretend_log_probs(batch) for batch in batches]
    for batch, values_RC in zip(batches, found, strict=True):
        values_RC[(batch.example == 1) & (batch.candidate == 0)] = np.nan
    with pytest.raises(UserError, match=r"^\d of \d+ log-probabilities are no finite number"):
        collect(batches, found)


def test_targets_are_scored_for_perplexity():
    # Mutation: score="targets" uses the candidates.
    encoded = make([5, 9, 2, 30], [1, 4, 2, 7], candidates=())
    batches = eval_batches(encoded, eval_shape(encoded, score="targets"), score="targets")
    sums_NC, lengths_NC = collect(batches, [pretend_log_probs(batch) for batch in batches])
    assert lengths_NC.tolist() == [[1], [4], [2], [7]]
    want = [direct(t, c) for t, c in zip(encoded.inputs, encoded.targets, strict=True)]
    np.testing.assert_allclose(sums_NC[:, 0], want, rtol=1e-9)


def test_unlabelled_examples_are_scored():
    # Mutation: read targets where candidates are scored.
    encoded = make([5, 9], [0, 0])
    assert len(eval_batches(encoded, eval_shape(encoded))) == 1
    with pytest.raises(UserError, match="'id0' has no targets to score"):
        eval_shape(encoded, score="targets")


def test_splits_share_one_shape():
    # Mutations: heads, pairs or tokens from the first split only; a short last batch.
    splits = [make(spread(300)), make(spread(31, longest=90)), make([3] * 40)]
    shape = eval_shape(*splits, budget=600, row_multiple=4)
    assert shape.rows % 4 == 0
    for split in splits:
        batches = eval_batches(split, shape)
        for batch in batches:
            assert batch.rows.tokens.shape == (shape.rows, shape.tokens)
            assert batch.rows.index.shape == (shape.rows, shape.targets)
            assert batch.pairs.token.shape == (shape.rows, shape.pairs)
            assert all(array.dtype == np.int32 for array in jax.tree.leaves(batch))
        scored = np.concatenate([batch.example.ravel() for batch in batches])
        assert set(scored.tolist()) - {-1} == set(range(len(split.inputs)))


def test_scoring_rows_are_full_and_near_the_budget():
    # Mutations: one example a row; rows from the budget alone (a nearly empty last batch).
    encoded = make(spread(2000))
    shape = eval_shape(encoded, budget=2048)
    batches = eval_batches(encoded, shape)
    filled = np.mean([batch.rows.segments > 0 for batch in batches])
    assert filled > 0.95
    assert shape.rows * shape.tokens <= 2048
    few = make(spread(5))
    assert eval_shape(few).rows * eval_shape(few).tokens < 2048


def test_a_shape_for_other_data_is_refused():
    # Mutation: numpy writes the tail of an overlong row nowhere.
    encoded = make([5, 6])
    good = eval_shape(encoded)
    with pytest.raises(AssertionError, match="too short"):
        eval_batches(encoded, EvalShape(good.rows, good.tokens, 1, good.pairs))
