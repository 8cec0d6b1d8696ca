"""Rank scoring against one full forward pass per example and candidate."""

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.tasks import Task
from softprompt.evaluation.evaluators import Split, ranked
from softprompt.evaluation.ranking import (
    normalise,
    one_program,
    probabilities,
    score_batches,
    score_side_by_side,
    shared_function,
    token_nll,
)
from softprompt.training.sharding import make_mesh
from tests.contracts import concatenated
from tests.contracts.examples import one_device, prompted, random_examples
from tests.tiny import tiny_decoder

reference = jax.jit(concatenated.batch_logits, static_argnames="config")


def brute_force(prompt_PD, weights, config, encoded):
    """Sums of log-probabilities [N, C], each candidate after each input, padded on the right."""
    pairs = [(tokens, c) for n, tokens in enumerate(encoded.inputs) for c in encoded.ranked(n)]
    longest = max(len(tokens) + len(c) for tokens, c in pairs)
    padded = np.stack(
        [np.pad(np.concatenate(pair), (0, longest - sum(map(len, pair)))) for pair in pairs]
    )
    logits_BSV = reference(prompt_PD, weights, config, padded)[:, len(prompt_PD) :]
    log_BTV = np.asarray(jax.nn.log_softmax(logits_BSV))
    sums = [
        log_TV[len(tokens) - 1 + np.arange(len(c)), c].sum()
        for (tokens, c), log_TV in zip(pairs, log_BTV, strict=True)
    ]
    return np.reshape(sums, (len(encoded.inputs), -1)) if encoded.candidates else np.array(sums)


def scores(model, weights, shared, encoded, mesh, **options):
    shape = eval_shape(encoded, budget=60, row_multiple=mesh.shape["data"])
    batches = eval_batches(encoded, shape)
    return score_batches(model, weights, shared, batches, mesh=mesh, **options)


@pytest.fixture
def given(tiny):
    model, weights = tiny
    config, delta = prompted(model, weights, 5)
    shared = shared_function(config, one_device())(delta, weights)
    wanted = brute_force(delta["prompt"], weights, model.config, random_examples())
    return model, weights, shared, wanted


def test_scores_are_brute_force_log_probabilities(given):
    """Mutation: logits for log-probabilities; the normaliser of another position; a first token
    predicted from its own position; batches in another order.
    """
    model, weights, shared, wanted_NC = given
    encoded = random_examples()
    told = []
    sums_NC, lengths_NC = scores(
        model, weights, shared, encoded, one_device(), progress=lambda *p: told.append(p)
    )
    np.testing.assert_allclose(sums_NC, wanted_NC, rtol=1e-9)
    assert lengths_NC.tolist() == [[1, 3, 2]] * 6
    assert len(told) > 1 and told == [(n + 1, len(told)) for n in range(len(told))]


def test_each_example_may_have_candidates_of_its_own(tiny):
    """Breaks when an example is given another one's candidates, or a missing one can win."""
    model, weights = tiny
    config, delta = prompted(model, weights, 5)
    encoded = random_examples()
    own = tuple(encoded.candidates[: 1 + n % 3] for n in range(len(encoded.ids)))
    names = tuple(("one", "two", "three")[: len(ids)] for ids in own)
    answers = tuple(names[n][:1] for n in range(len(own)))
    encoded = dataclasses.replace(
        encoded, candidates=(), choices=names, choice_ids=own, answers=answers
    )
    shared = shared_function(config, one_device())(delta, weights)
    found = scores(model, weights, shared, encoded, one_device())
    there_NC = found[1] > 0
    assert there_NC.sum(axis=1).tolist() == [len(ids) for ids in own]
    wanted = brute_force(delta["prompt"], weights, model.config, encoded)
    np.testing.assert_allclose(found[0][there_NC], wanted, rtol=1e-9)
    task = Task("t", "jsonl:x", "{text}", {}, candidates_field="options")
    result = ranked(Split(task, encoded, list), found, "sum")
    best = [row_C[: len(ids)].argmax() for row_C, ids in zip(found[0], own, strict=True)]
    assert [one["predicted"] for one in result.predictions] == [
        own[index] for own, index in zip(names, best, strict=True)
    ]
    assert [list(one["scores"]) for one in result.predictions] == [list(one) for one in names]
    assert result.metrics["accuracy"] == pytest.approx(np.mean(np.array(best) == 0))


def test_batches_in_threads_are_those_in_turns():
    """Mutations: outputs in another order; the last one is lost."""
    model, weights = tiny_decoder(dtype="float32")
    config, delta = prompted(model, weights, 5)
    shared = shared_function(config, one_device())(delta, weights)
    encoded, told = random_examples((7, 13, 21) * 9, (1,) * 27), []
    given = model, weights, shared, encoded, one_device()
    sums_NC, _ = scores(*given, at_once=3, progress=lambda *p: told.append(p))
    np.testing.assert_array_equal(sums_NC, scores(*given)[0])
    assert len(told) > 1 and told == [(n + 1, len(told)) for n in range(len(told))]


def test_labels_and_targets_are_not_read(given):
    """Mutation: skip unlabelled examples, or score an example's own target."""
    model, weights, shared, wanted_NC = given
    none = dataclasses.replace(
        random_examples(), labels=np.full(6, -1, np.int32), targets=[np.zeros(0, np.int32)] * 6
    )
    sums_NC, _ = scores(model, weights, shared, none, one_device())
    np.testing.assert_allclose(sums_NC, wanted_NC, rtol=1e-9)


def test_scores_behind_a_text(given):
    """Mutation: the context of a text is not causal."""
    model, weights, _, _ = given
    encoded, text_T = random_examples(), np.array([3, 1, 200, 50])
    context = model.apply({"params": weights}, jnp.asarray(text_T), method="text_context")
    sums_NC, _ = scores(model, weights, ({}, context), encoded, one_device())
    rows_PD = weights["embed"]["embedding"][text_T]
    wanted_NC = brute_force(rows_PD, weights, model.config, encoded)
    np.testing.assert_allclose(sums_NC, wanted_NC, rtol=1e-9)


def test_scores_on_a_mesh(given):
    """Mutation: scores stay on the device that made them, or padded rows are counted."""
    model, weights, shared, wanted_NC = given
    sums_NC, _ = scores(model, weights, shared, random_examples(), make_mesh(4, 2))
    np.testing.assert_allclose(sums_NC, wanted_NC, rtol=1e-9)


@pytest.mark.parametrize("mesh", [(1, 1), (4, 2)], ids=["one device", "mesh"])
def test_side_by_side_is_one_at_a_time(given, mesh):
    """Mutation: all see the first one's context; results in another order; the variables are not
    stacked. Their contexts are [N, L, P, G, K], and the weights have no N.
    """
    model, weights, _, _ = given
    mesh = one_device() if mesh == (1, 1) else make_mesh(*mesh)
    encoded = random_examples()
    batches = eval_batches(encoded, eval_shape(encoded, budget=60, row_multiple=mesh.shape["data"]))
    parts, wanted = [], []
    for seed in range(3):
        config, delta = prompted(model, weights, 5, seed=seed)
        parts.append(shared_function(config, mesh)(delta, weights))
        wanted.append(brute_force(delta["prompt"], weights, model.config, encoded))
    told = []
    found = score_side_by_side(
        model, weights, parts, batches, mesh=mesh, progress=lambda *p: told.append(p)
    )
    assert len(told) == len(batches)
    for (sums_NC, lengths_NC), wanted_NC in zip(found, wanted, strict=True):
        np.testing.assert_allclose(sums_NC, wanted_NC, rtol=1e-9)
        assert lengths_NC.tolist() == [[1, 3, 2]] * 6
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-2


def test_sum_and_mean():
    """Mutation: mean over candidates; sum for mean."""
    sums_NC, lengths_NC = np.array([[-3.0, -6.0], [-1.0, -9.0]]), np.array([[1, 3], [1, 3]])
    np.testing.assert_array_equal(normalise(sums_NC, lengths_NC, "sum"), sums_NC)
    mean_NC = normalise(sums_NC, lengths_NC, "mean")
    np.testing.assert_allclose(mean_NC, [[-3, -2], [-1, -3]])
    assert mean_NC.argmax(axis=1).tolist() == [1, 0]  # the sum prefers candidate 0 in both


def test_probabilities_are_a_softmax():
    """Mutation: exponentials of sums, which underflow for long candidates."""
    shares_NC = probabilities(np.array([[-2000.0, -2000.0 + np.log(3)], [0.0, 0.0]]))
    np.testing.assert_allclose(shares_NC, [[0.25, 0.75], [0.5, 0.5]])


def test_token_nll_weighs_tokens_alike():
    """Mutation: mean over examples."""
    assert token_nll(np.array([[-1.0], [-8.0]]), np.array([[1], [2]])) == pytest.approx(3.0)


def test_threads_that_come_at_once_share_a_program():
    """Mutation: no lock about the cache: each thread makes one of its own."""
    made, traced, door = [], [], threading.Barrier(4)

    @one_program
    def doubling(power):
        made.append(power)
        time.sleep(0.05)  # the others are here by now

        def double(x):
            traced.append(power)
            time.sleep(0.05)
            return x * 2**power

        return jax.jit(double)

    def ask(power):
        door.wait()
        return doubling(power)(jnp.float32(1.5))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, (1, 1, 1, 1))) == [3.0] * 4
        assert list(pool.map(ask, (2, 1, 2, 1))) == [6.0, 3.0, 6.0, 3.0]
    assert made == traced == [1, 2]
