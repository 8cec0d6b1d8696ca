"""Contract 5: the context computed once equals the prompt repeated before every example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.training.step import accumulated, loss_fn
from tests.contracts import concatenated
from tests.contracts.examples import double, packed, prompted, random_examples, snippets
from tests.matrix import matrix
from tests.tiny import tiny_decoder

ROWS = [[3], [1, 4], [2, 0], [5]]
reference = jax.jit(jax.value_and_grad(concatenated.loss), static_argnames="config")


def once(config, delta, weights, batch):
    """Loss, and gradient of the prompt [P, D]."""
    if config.microbatches > 1:
        function = functools.partial(accumulated, config=config)
    else:
        loss = functools.partial(loss_fn, config=config)
        function = jax.value_and_grad(loss, has_aux=True)
    (loss, _), grads = jax.jit(function)(delta, weights, batch, None)
    assert grads.keys() == {"prompt"}
    return loss, grads["prompt"]


def repeated(config, delta, weights, encoded):
    """The same in the reference form; a BOS before the prompt is a row that does not train."""
    bos, prompt_PD = config.method_config.bos_before, delta["prompt"]
    if bos is not None:
        first_1D = weights["embed"]["embedding"][jnp.array([bos])]
        prompt_PD = jnp.concatenate([first_1D, prompt_PD])
    batch = concatenated.pad_right(encoded, range(len(encoded.ids)))
    loss, grads_PD = reference(prompt_PD, weights, config.model.config, batch)
    return loss, grads_PD[len(prompt_PD) - len(delta["prompt"]) :]


def check(ours, theirs, *, loss=1e-9, gradient=1e-9):
    """Both agree; the gradient relative to its largest entry."""
    np.testing.assert_allclose(ours[0], theirs[0], rtol=loss)
    scale = np.abs(theirs[1]).max()
    assert scale > 1e-3
    np.testing.assert_allclose(ours[1] / scale, theirs[1] / scale, atol=gradient, rtol=0)


@pytest.mark.parametrize(
    "bos_before", matrix((None, 0), keep=(None,)), ids=["no bos", "bos before"]
)
def test_loss_and_gradient(tiny, bos_before):
    """Mutation: `stop_gradient` on the context's keys; positions that ignore the context;
    microbatches of which only the last one's cotangent is pulled back, or averaged losses.
    """
    model, weights = tiny
    encoded = random_examples()
    length = 6 if bos_before is None else 5
    config, delta = prompted(model, weights, length, bos_before=bos_before)
    batch = double(packed(encoded, ROWS))
    wanted = repeated(config, delta, weights, encoded)
    for microbatches in (1, 4 if bos_before is None else 2):
        parts = config._replace(microbatches=microbatches)
        check(once(parts, delta, weights, batch), wanted)


def test_microbatches_sum_in_float32():
    """Whatever the model computes in. Mutation: a bfloat16 context's cotangents are summed in it,
    rounded once a microbatch."""
    model, weights = tiny_decoder(layers=3, dtype="float32")
    config, delta = prompted(model.clone(dtype=jnp.bfloat16), weights, 4, microbatches=2)
    step = functools.partial(accumulated, config=config)
    traced = jax.make_jaxpr(step)(delta, weights, packed(random_examples(), ROWS), None)
    scans = [e for e in traced.eqns if e.primitive.name == "scan" and e.params["length"] == 2]
    (sums,) = ([one.aval.dtype for one in e.outvars] for e in scans)
    assert len(sums) >= 4 and set(sums) == {jnp.dtype("float32")}


@pytest.mark.matrix
def test_an_untied_model_with_one_key_head(x64):
    """Mutation: the untied head is read as the embedding."""
    model, weights = tiny_decoder(tied=False, heads=3, kv_heads=1, layers=2)
    encoded = random_examples()
    config, delta = prompted(model, weights, 1)
    ours = once(config, delta, weights, double(packed(encoded, ROWS)))
    check(ours, repeated(config, delta, weights, encoded))


@pytest.mark.matrix
@pytest.mark.real
@pytest.mark.usefixtures("quick")
def test_real_loss_and_gradient(smollm2, shared_data):
    """Mutation: `stop_gradient` on the context's keys; positions that ignore the context."""
    model, weights = smollm2.model, smollm2.weights
    encoded = snippets(shared_data, smollm2.tokenizer, 4)
    config, delta = prompted(model, weights, 20, bos_before=smollm2.tokenizer.bos_id)
    wanted = repeated(config, delta, weights, encoded)
    batch = packed(encoded, [[3, 1], [2, 0]])
    for microbatches in (1, 2):
        parts = config._replace(microbatches=microbatches)
        check(once(parts, delta, weights, batch), wanted, loss=3e-5, gradient=3e-4)
