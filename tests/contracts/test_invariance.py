"""Contract 4: an example's logits and scores do not depend on what stands beside it."""

import dataclasses

import jax
import numpy as np
import pytest

from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.packing import RowShape
from softprompt.evaluation.ranking import score_batches
from softprompt.training.step import shared_part
from tests.contracts import concatenated
from tests.contracts.examples import (
    by_example,
    cut,
    logits_and_loss,
    one_device,
    packed,
    prompted,
    random_examples,
    snippets,
)

EXACT = {"atol": 1e-9, "rtol": 1e-9}
REAL = {"atol": 3e-4, "rtol": 0}
LAYOUTS = (
    [[0, 1, 2, 3, 4, 5]],
    [[4, 2], [5, 3, 0], [1]],
    [[3, 3, 0], [0, 1, 2, 4, 5]],
    [[], [2], [], [5, 4, 3, 2, 1, 0]],
)
WIDE = RowShape(4, 90, 20)


def alone(config, delta, weights, encoded):
    """Logits [targets, V] of every example in the reference form: no packing, own prompt."""
    batch = concatenated.pad_right(encoded, range(len(encoded.ids)))
    logits_BSV = jax.jit(concatenated.batch_logits, static_argnames="config")(
        delta["prompt"], weights, config.model.config, batch["tokens_BT"]
    )
    length = config.method_config.length
    return [
        np.asarray(logits_SV[length:][weight_T > 0])
        for logits_SV, weight_T in zip(logits_BSV, batch["weight_BT"], strict=True)
    ]


def check_layout(config, delta, weights, encoded, rows, wanted, tolerance, *, shape, noise=0):
    """Every example of a layout has the wanted logits; padding is filled with token `noise`."""
    batch = packed(encoded, rows, shape)
    batch.rows.tokens[:] += np.where(batch.rows.segments == 0, noise, 0).astype(np.int32)
    logits_RMV, _ = logits_and_loss(config, delta, weights, batch)
    seen = list(by_example(encoded, rows, logits_RMV))
    assert {n for n, _ in seen} == set(range(len(encoded.ids)))
    for n, logits_MV in seen:
        np.testing.assert_allclose(logits_MV, wanted[n], **tolerance)


@pytest.mark.parametrize("length", [0, 4])
def test_logits_of_packed_rows(tiny, length):
    """Mutation: no segments in the mask; positions run on through the row; padding is seen."""
    model, weights = tiny
    encoded = random_examples()
    config, delta = prompted(model, weights, length)
    given = config, delta, weights, encoded
    wanted = alone(*given)
    for rows in LAYOUTS:
        for noise in (0, 77):
            check_layout(*given, rows, wanted, EXACT, shape=WIDE, noise=noise)
    check_layout(*given, LAYOUTS[0], wanted, EXACT, shape=None)


def scores_by_id(config, delta, weights, encoded, *, budget):
    shape = eval_shape(encoded, budget=budget)
    shared = shared_part(config, delta, weights)
    batches = eval_batches(encoded, shape)
    sums_NC, lengths_NC = score_batches(config.model, weights, shared, batches, mesh=one_device())
    assert lengths_NC.tolist() == [[len(c) for c in encoded.candidates]] * len(encoded.inputs)
    return dict(zip(encoded.ids, sums_NC, strict=True))


def test_candidate_scores(tiny):
    """Mutation: no segments in the mask."""
    model, weights = tiny
    config, delta = prompted(model, weights, 4)
    encoded = random_examples()
    together = scores_by_id(config, delta, weights, encoded, budget=4096)
    for order, budget in (([5, 4, 3, 2, 1, 0], 60), ([0, 3], 4096), ([2], 1)):
        some = scores_by_id(config, delta, weights, cut(encoded, order), budget=budget)
        assert len(some) == len(order)
        for name, score_C in some.items():
            np.testing.assert_allclose(score_C, together[name], **EXACT)


def test_candidates_do_not_see_each_other(tiny):
    """Mutation: a candidate's tokens see the other candidates (no branches in the mask)."""
    model, weights = tiny
    config, delta = prompted(model, weights, 4)
    encoded = random_examples()
    together = scores_by_id(config, delta, weights, encoded, budget=4096)
    for place in (0, 2):
        single = dataclasses.replace(encoded, candidates=(encoded.candidates[place],))
        for name, score_C in scores_by_id(config, delta, weights, single, budget=4096).items():
            np.testing.assert_allclose(score_C[0], together[name][place], **EXACT)


@pytest.mark.matrix
@pytest.mark.real
@pytest.mark.usefixtures("quick")
def test_real_logits_and_scores(smollm2, shared_data):
    """Mutation: no segments in the mask; a candidate's tokens see the other candidates."""
    model, weights = smollm2.model, smollm2.weights
    encoded = snippets(shared_data, smollm2.tokenizer, 4)
    config, delta = prompted(model, weights, 10)
    given = config, delta, weights, encoded
    wanted = alone(*given)
    assert max(np.abs(logits_MV).max() for logits_MV in wanted) > 10
    check_layout(*given, [[3, 0], [2, 1]], wanted, REAL, shape=RowShape(2, 160, 12), noise=77)
    check_layout(*given, [[0], [1, 2, 3]], wanted, REAL, shape=RowShape(2, 160, 12))
    texts = (" not so good", " very good indeed", " bad")
    candidates = tuple(np.array(smollm2.tokenizer.encode(text), np.int32) for text in texts)
    encoded = dataclasses.replace(encoded, candidates=candidates)
    together = scores_by_id(config, delta, weights, encoded, budget=4096)
    for place in (0, 1):
        single = dataclasses.replace(cut(encoded, [3, 1]), candidates=(candidates[place],))
        for name, score_C in scores_by_id(config, delta, weights, single, budget=1).items():
            np.testing.assert_allclose(score_C[0], together[name][place], **REAL)
