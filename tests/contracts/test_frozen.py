"""Contract 3: only the delta changes, and only the delta and its optimizer state are kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.training.optimizers import OptimizerConfig, make_optimizer
from softprompt.training.step import accumulated, loss_fn, train_step
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session
from tests.contracts.examples import (
    double,
    packed,
    prompted,
    random_examples,
    session,
    trial_config,
    write_task,
)
from tests.contracts.trials import stored


@pytest.mark.parametrize("microbatches", [1, 2])
def test_the_gradient_has_the_structure_of_the_delta(tiny, microbatches):
    """Mutation: differentiate with respect to (delta, weights), in one go or in microbatches."""
    model, weights = tiny
    config, delta = prompted(model, weights, 4, microbatches=microbatches)
    batch = double(packed(random_examples(), [[0, 1, 2], [3, 4, 5]]))
    tx = make_optimizer(OptimizerConfig())

    def gradient(delta, weights):
        if microbatches > 1:
            return accumulated(delta, weights, batch, None, config=config)[1]
        return jax.grad(lambda d: loss_fn(d, weights, batch, None, config=config)[0])(delta)

    def shapes(tree):
        return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)

    wanted = shapes(delta)
    assert shapes(jax.eval_shape(gradient, delta, weights)) == wanted
    state = tx.init(delta)
    new, new_state, _ = jax.eval_shape(
        lambda *a: train_step(*a, config=config, tx=tx), delta, state, weights, batch, None
    )
    assert shapes(new) == wanted
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    vectors = {leaf.shape for leaf in jax.tree.leaves(new_state) if leaf.ndim}
    assert vectors == {delta["prompt"].shape}


def test_a_trial_leaves_the_weights_alone(tiny_folder, tmp_path, monkeypatch):
    """Breaks when the loop moves a weight, or steps on a copy of which it moves one; when a
    checkpoint has a weight in it."""
    config = trial_config(tiny_folder, write_task(tmp_path), optimizer__rate=0.3)
    given, step = [], Session.step

    def watched(self, call):
        given.append(call.weights)
        return step(self, call)

    monkeypatch.setattr(Session, "step", watched)
    with session() as shared:
        weights = shared.model(config).weights
        before = jax.tree.map(lambda leaf: np.array(leaf, copy=True), weights)
        row = run_trial(config, tmp_path / "run", session=shared)
        after = shared.model(config).weights
    assert len(given) == 4
    jax.tree.map(np.testing.assert_array_equal, before, given[-1])
    assert row["status"] == "done" and row["steps"] == 4
    assert row["trainable"] == 5 * 48
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))

    arrays = stored(tmp_path / "run")
    assert {name.split("[")[0] for name in arrays} == {"2", "4"}
    assert set(arrays.values()) == {(5, 48), ()}
    folder = tmp_path / "run" / "checkpoints" / "4" / "state"
    stored_bytes = sum(file.stat().st_size for file in folder.rglob("d/*"))
    assert 0 < stored_bytes < sum(leaf.nbytes for leaf in jax.tree.leaves(before)) / 10
    whole = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    for name in ("embed", "attn", "mlp", "norm"):
        assert name.encode() not in whole


def test_weights_reach_no_output_of_the_step(tiny):
    """Mutation: the step hands its weights back."""
    model, weights = tiny
    config, delta = prompted(model, weights, 4)
    batch = double(packed(random_examples(), [[0, 1, 2], [3, 4, 5]]))
    tx = make_optimizer(OptimizerConfig())
    arguments = delta, tx.init(delta), weights, batch, None
    outputs = jax.eval_shape(lambda *a: train_step(*a, config=config, tx=tx), *arguments)
    shapes = {leaf.shape for leaf in jax.tree.leaves(weights)}
    assert not shapes & {leaf.shape for leaf in jax.tree.leaves(outputs)}
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs[0])} == {jnp.dtype("float64")}
