"""The training step against its formulas."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from softprompt.data.pipeline import pad_rows
from softprompt.methods import reparametrize
from softprompt.training.optimizers import OptimizerConfig, Sgd, make_optimizer, set_rate
from softprompt.training.step import accumulated, loss_fn, train_step
from tests.contracts.examples import (
    by_example,
    double,
    logits_and_loss,
    packed,
    prompted,
    random_examples,
)
from tests.models.test_t5 import shapes_under_vmap

KEY = jax.random.key(0)
ROWS = [[0, 1], [2, 3], [4], [5]]


@pytest.fixture
def given(tiny):
    """A step, its delta, weights, examples and batch."""
    model, weights = tiny
    config, delta = prompted(model, weights, 6)
    encoded = random_examples()
    return config, delta, weights, encoded, double(packed(encoded, ROWS))


def target_logits(config, delta, weights, encoded, batch):
    """Logits [targets, V] and the targets of all examples, one after another."""
    logits_RMV, _ = logits_and_loss(config, delta, weights, batch)
    parts = list(by_example(encoded, ROWS, logits_RMV))
    return (
        np.concatenate([logits_MV for _, logits_MV in parts]),
        np.concatenate([encoded.targets[n] for n, _ in parts]),
    )


def value(config, delta, weights, batch):
    function = loss_fn if config.microbatches == 1 else accumulated
    return jax.jit(functools.partial(function, config=config))(delta, weights, batch, None)


def test_loss_z_loss_and_accuracy_by_their_formulas(given):
    """Mutation: mean over padding too; z of the target's logit; argmax over positions; the z-loss
    reported as part of the loss.
    """
    config, delta, weights, encoded, batch = given
    logits_MV, target_M = target_logits(*given)
    # A target that is the likeliest token makes the accuracy more than nothing.
    hits = np.arange(len(target_M)) % 3 == 0
    likely_M = np.where(hits, logits_MV.argmax(axis=1), (logits_MV.argmax(axis=1) + 1) % 320)
    batch.targets[batch.loss_weights > 0] = likely_M
    norm_M = np.log(np.exp(logits_MV).sum(axis=1))
    cross_entropy = np.mean(norm_M - logits_MV[np.arange(len(likely_M)), likely_M])
    loss, metrics = value(config._replace(z_loss=0.2), delta, weights, batch)
    np.testing.assert_allclose(loss, cross_entropy + 0.2 * np.mean(norm_M**2), rtol=1e-9)
    np.testing.assert_allclose(metrics["loss"], cross_entropy, rtol=1e-9)
    np.testing.assert_allclose(metrics["token_accuracy"], hits.mean(), rtol=1e-9)


def test_each_target_token_weighs_the_same_wherever_it_stands(given):
    """Mutation: the loss is a mean over rows, or weights are normalised by row."""
    config, delta, weights, encoded, batch = given
    loss, _ = value(config, delta, weights, batch)
    assert batch.loss_weights.sum() == pytest.approx(1)
    for rows in ([[0, 1, 2, 3, 4, 5]], [[5], [4, 3, 2, 1], [0]]):
        other, _ = value(config, delta, weights, double(packed(encoded, rows)))
        np.testing.assert_allclose(other, loss, rtol=1e-9)
    padded = pad_rows(batch, 3)
    assert len(padded.rows.tokens) == 6
    other, _ = value(config, delta, weights, padded)
    np.testing.assert_allclose(other, loss, rtol=1e-9)


def test_accumulated_is_the_gradient_of_the_loss(given):
    """Mutation: a microbatch gets every other row of another one; z_loss only in the last part."""
    config, delta, weights, _, batch = given
    config = config._replace(z_loss=0.1)
    function = jax.value_and_grad(functools.partial(loss_fn, config=config), has_aux=True)
    wanted = jax.jit(function)(delta, weights, batch, None)
    parts = value(config._replace(microbatches=2), delta, weights, batch)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9)
    jax.tree.map(close, parts, wanted)
    assert jax.tree.structure(parts) == jax.tree.structure(wanted)


def test_a_step_updates_by_the_gradient_and_reports_norms(given):
    """Mutation: the update is added twice; norms of the old delta, or of the wrong tree."""
    config, delta, weights, _, batch = given
    tx = make_optimizer(OptimizerConfig())
    state = set_rate(tx.init(delta), jnp.float32(0.01))
    step = jax.jit(functools.partial(train_step, config=config, tx=tx))
    new, new_state, metrics = step(delta, state, weights, batch, None)
    grads = jax.jit(jax.grad(lambda d: loss_fn(d, weights, batch, None, config=config)[0]))(delta)
    updates, wanted_state = tx.update(grads, state, delta)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-7, atol=1e-12)
    jax.tree.map(close, new, optax.apply_updates(delta, updates))
    jax.tree.map(close, new_state, wanted_state)
    norms = {"grad_norm": grads, "update_norm": updates, "delta_norm": new}
    for name, tree in norms.items():
        close(metrics[name], np.linalg.norm(tree["prompt"]))
    rows_P = np.linalg.norm(new["prompt"], axis=1)
    rows = {f"row_norm_{kind}": getattr(rows_P, kind)() for kind in ("min", "mean", "max")}
    for name, norm in rows.items():
        close(metrics[name], norm)
    assert metrics.keys() == {"loss", "token_accuracy", *norms, *rows}


def test_norms_are_those_of_the_rows_that_are_read(given):
    """Mutation: norms of what the network makes the rows of."""
    config, delta, weights, _, batch = given
    cfg = dataclasses.replace(config.method_config, reparam="mlp", bottleneck=3)
    config = config._replace(method_config=cfg)
    net = reparametrize.init(KEY, delta["prompt"], kind="mlp", bottleneck=3)
    delta, tx = {"prompt": delta["prompt"], "net": net}, make_optimizer(OptimizerConfig(Sgd()))
    step = jax.jit(functools.partial(train_step, config=config, tx=tx))
    new, _, metrics = step(delta, tx.init(delta), weights, batch, None)  # at a rate of zero
    rows_P = np.linalg.norm(reparametrize.apply(new["prompt"], net), axis=1)
    np.testing.assert_allclose(metrics["row_norm_max"], rows_P.max(), rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_a_loss_in_chunks_is_the_loss(given, chunk):
    """Mutation: leave out the last chunk; scale the head's gradient only; let padded positions
    count; drop the z-loss in the chunks.
    """
    config, delta, weights, _, batch = given
    config = config._replace(method="full", method_config=None, z_loss=0.2)
    config = config._replace(model=config.model.clone(unroll=True))

    def scaled(weights, config):
        loss, metrics = loss_fn(weights, {}, batch, None, config=config)
        return 3 * loss, metrics

    gradient = functools.partial(jax.value_and_grad(scaled, has_aux=True), weights)
    whole = jax.jit(functools.partial(gradient, config))()
    parts = jax.jit(functools.partial(gradient, config._replace(loss_chunk=chunk)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), whole, parts)
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(parts[1]))


def test_the_logits_of_all_positions_never_exist_at_once(given):
    """Mutation: compute the chunks without a scan; store each chunk's logits for the backward
    pass.
    """
    config, _, weights, _, batch = given
    config = config._replace(method="full", method_config=None)
    rows, positions = batch.targets.shape
    vocabulary = config.model.config.vocab

    def largest(chunk):
        loss = functools.partial(loss_fn, config=config._replace(loss_chunk=chunk))
        function = jax.grad(lambda w: loss(w, {}, batch, None)[0])
        shapes = shapes_under_vmap(jax.make_jaxpr(function)(weights).jaxpr)
        return max(np.prod(shape) for shape in shapes if shape and shape[-1] == vocabulary)

    assert largest(0) >= rows * positions * vocabulary
    assert largest(1) <= rows * vocabulary
