"""Contracts 2, 4 and 5 for every decoder family: text prompts, packing, and the context once.

The other form runs the prompt before every example through the same layers, without a context; that
the layers are right is the parity tests' and the golden values' to say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.data.packing import RowShape
from softprompt.methods.initializers import text
from softprompt.methods.prompt import PromptConfig, init, variables
from softprompt.training.step import row_logits, shared_part
from tests.contracts import concatenated
from tests.contracts.examples import by_example, double, packed, prompted, random_examples
from tests.families import FAMILIES, family_decoder
from tests.matrix import matrix

EXACT = {"atol": 1e-9, "rtol": 1e-9}
LAYOUTS = ([[0, 1, 2, 3, 4, 5], []], [[5, 3, 0], [1, 4, 2]])
SHAPE = RowShape(2, 75, 14)
LENGTH = 6  # with an example's own tokens, more than the windows of 7


def cross_entropy(logits, target, weight):
    log = jax.nn.log_softmax(logits)
    return -jnp.sum(weight * jnp.take_along_axis(log, target[..., None], axis=-1)[..., 0])


@functools.partial(jax.jit, static_argnames="model")
@functools.partial(jax.value_and_grad, has_aux=True)
def repeated(prompt_PD, weights, model, batch):
    """Loss with the prompt inside every example's row, and logits [B, T, V] after it."""

    def run(decoder, tokens_T):
        x_SD = jnp.concatenate([prompt_PD, decoder.embed(tokens_T)])
        index_S = jnp.arange(len(x_SD))
        empty = decoder.empty_context()
        x_SD, _ = decoder._run(x_SD, empty, index_S[:, None] >= index_S, index_S)
        return decoder.logits(x_SD)[len(prompt_PD) :]

    def one(tokens_T):
        return model.apply({"params": weights}, tokens_T, method=run)

    logits_BTV = jax.vmap(one)(batch["tokens_BT"])
    return cross_entropy(logits_BTV, batch["next_BT"], batch["weight_BT"]), logits_BTV


@functools.partial(jax.jit, static_argnames="config")
@functools.partial(jax.value_and_grad, has_aux=True)
def once(delta, weights, config, batch):
    """Loss with the prompt as a context, and logits [R, M, V]."""
    shared = shared_part(config, delta, weights)
    logits_RMV = row_logits(config.model, weights, shared, batch.rows)
    return cross_entropy(logits_RMV, batch.targets, batch.loss_weights), logits_RMV


@pytest.mark.parametrize("name", matrix(FAMILIES, keep=("gemma3",)))
def test_once_is_repeated_and_packed_is_alone(x64, name):
    """Mutation: the context never leaves a window; windows by index in the row, not by position;
    positions of a row that do not continue after the context; `stop_gradient` on context keys.
    """
    model, weights = family_decoder(name)
    encoded = random_examples()
    config, delta = prompted(model, weights, LENGTH)
    batch = concatenated.pad_right(encoded, range(len(encoded.ids)))
    (loss, logits_BTV), grads_PD = repeated(delta["prompt"], weights, model, batch)
    scale = np.abs(grads_PD).max()
    assert scale > 1e-3
    for rows in LAYOUTS:
        layout = double(packed(encoded, rows, SHAPE))
        (ours, logits_RMV), grads = once(delta, weights, config, layout)
        np.testing.assert_allclose(ours, loss, rtol=1e-9)
        np.testing.assert_allclose(grads["prompt"] / scale, grads_PD / scale, atol=1e-9)
        for n, logits_MV in by_example(encoded, rows, logits_RMV):
            wanted_MV = logits_BTV[n][batch["weight_BT"][n] > 0]
            np.testing.assert_allclose(logits_MV, wanted_MV, **EXACT)


@pytest.mark.parametrize("name", ("opt-350m", "gemma3"))
@pytest.mark.parametrize("bos_before", (None, 0))
def test_a_prompt_of_text_is_that_text(x64, name, bos_before):
    """Mutation: a prompt starts from embeddings before their scaling, or is scaled again."""
    model, weights = family_decoder(name)
    ids = [17, 300, 5, 5, 88]
    cfg = PromptConfig(len(ids), bos_before, text(ids), model.config.embed_scale)
    delta = variables(init(jax.random.key(0), model, weights, cfg), weights, cfg, None)
    context = model.apply({"params": weights, "delta": delta}, method="prompt_context")
    spelled = jnp.array(ids if bos_before is None else [bos_before, *ids])
    direct = model.apply({"params": weights}, spelled, method="text_context")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), context, direct)
