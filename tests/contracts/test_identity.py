"""Contract 2: a delta that should change nothing changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.methods.initializers import text
from softprompt.methods.prompt import PromptConfig, init, variables
from softprompt.training.step import StepConfig
from tests.contracts import concatenated
from tests.contracts.examples import (
    by_example,
    cut,
    double,
    logits_and_loss,
    packed,
    random_examples,
    snippets,
)
from tests.matrix import matrix

BOS = 0
KEY = jax.random.key(0)


def text_delta(model, weights, ids, *, bos_before=None):
    cfg = PromptConfig(len(ids), bos_before, text(ids), model.config.embed_scale)
    return StepConfig(model, "prompt", cfg), init(KEY, model, weights, cfg)


def fed(encoded, before):
    """The same examples with these tokens before every input."""
    inputs = [np.concatenate([before, tokens]).astype(np.int32) for tokens in encoded.inputs]
    same = cut(encoded, range(len(inputs)))
    same.inputs[:] = inputs
    return same


def check(config, delta, weights, encoded, base_encoded, tolerance):
    """The delta with `encoded` is the base model with `base_encoded`; returns the base's logits."""
    base = StepConfig(config.model, "none", None)
    batches = packed(encoded, ROWS), packed(base_encoded, ROWS)
    if weights["embed"]["embedding"].dtype == np.float64:
        batches = tuple(map(double, batches))
    logits_RMV, loss = logits_and_loss(config, delta, weights, batches[0])
    base_RMV, base_loss = logits_and_loss(base, {}, weights, batches[1])
    ours, theirs = by_example(encoded, ROWS, logits_RMV), by_example(encoded, ROWS, base_RMV)
    for (_, some_MV), (_, others_MV) in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(some_MV, others_MV, **tolerance)
    np.testing.assert_allclose(loss, base_loss, **tolerance)
    return dict(by_example(encoded, ROWS, base_RMV))


EXACT = {"atol": 1e-9, "rtol": 1e-9}
REAL = {"atol": 3e-4, "rtol": 0}
ROWS = ((0, 1), (2, 3, 4), (5,))


def test_no_prompt_is_the_base_model(tiny):
    """Mutation: the softmax has a key that is always zero; positions are counted in twos."""
    model, weights = tiny
    encoded = random_examples()
    config, delta = text_delta(model, weights, [])
    assert delta["prompt"].shape == (0, model.config.width)
    base = check(config, delta, weights, encoded, encoded, EXACT)
    batch = concatenated.pad_right(encoded, range(len(encoded.ids)))
    logits_BTV = jax.jit(concatenated.batch_logits, static_argnames="config")(
        delta["prompt"], weights, model.config, batch["tokens_BT"]
    )
    for n, logits_MV in base.items():
        np.testing.assert_allclose(logits_MV, logits_BTV[n][batch["weight_BT"][n] > 0], **EXACT)


@pytest.mark.parametrize("bos", ["none", "before", "after"])
def test_a_prompt_of_text_is_that_text(tiny, bos):
    """Mutation: positions of a row do not continue after the context; BOS on the other side."""
    model, weights = tiny
    encoded = random_examples()
    ids = [17, 300, 5, 5, 88]
    before = BOS if bos == "before" else None
    config, delta = text_delta(model, weights, ids, bos_before=before)
    text_ids = {"none": ids, "before": [BOS, *ids], "after": [*ids, BOS]}[bos]
    read = fed(encoded, [BOS]) if bos == "after" else encoded
    check(config, delta, weights, read, fed(encoded, text_ids), EXACT)
    spelled = variables(delta, weights, config.method_config, None)["prompt"]
    context = model.apply(
        {"params": weights, "delta": {"prompt": spelled}}, method="prompt_context"
    )
    context_ids = jnp.array(text_ids[: len(spelled)])
    direct = model.apply({"params": weights}, context_ids, method="text_context")
    assert context.length == len(ids) + (bos == "before")
    jax.tree.map(functools.partial(np.testing.assert_allclose, **EXACT), context, direct)


def test_a_fresh_prompt_in_the_model_call_is_the_text(tiny):
    """Mutation: `__call__` ignores the delta."""
    model, weights = tiny
    _, delta = text_delta(model, weights, [17, 300, 5])
    tokens_T = jnp.array([9, 8, 7, 6])
    after_TV = model.apply({"params": weights, "delta": delta}, tokens_T)
    whole_TV = model.apply({"params": weights}, jnp.array([17, 300, 5, 9, 8, 7, 6]))
    np.testing.assert_allclose(after_TV, whole_TV[3:], **EXACT)


@pytest.mark.real
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("bos", matrix(("none", "before", "after"), keep=("none",)))
def test_real_text_prompts(smollm2, shared_data, bos):
    """Mutation: positions of a row do not continue after the context."""
    model, weights, tokenizer = smollm2.model, smollm2.weights, smollm2.tokenizer
    encoded = snippets(shared_data, tokenizer, 6)
    ids = [] if bos == "after" else tokenizer.encode("Is each movie review positive or negative?\n")
    before = tokenizer.bos_id if bos == "before" else None
    config, delta = text_delta(model, weights, ids, bos_before=before)
    first = [tokenizer.bos_id]  # "after" is also the empty prompt
    text_ids = {"none": ids, "before": first + ids, "after": ids + first}[bos]
    read = fed(encoded, first) if bos == "after" else encoded
    base = check(config, delta, weights, read, fed(encoded, text_ids), REAL)
    assert max(np.abs(logits_MV).max() for logits_MV in base.values()) > 10
