"""Contracts 2, 3 and 4 for every method on both kinds of model, in float64.

The other form is the model's own call on one plain text or pair, which knows no rows.
"""

import functools

import jax
import numpy as np
import optax
import pytest

from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch
from softprompt.methods import METHODS
from softprompt.training.step import StepConfig, row_logits, shared_part
from tests.contracts.examples import by_example, double
from tests.contracts.method_cases import CASES, alone, base, make, moved
from tests.matrix import matrix

EXACT = {"atol": 1e-9, "rtol": 1e-9}
NETWORKS = [name for name in CASES if "," in name and name.startswith("pr")]
COVERED = {"lora", "ia3", "dora", *NETWORKS}  # by those with more in them, and by `fold`'s test
ON_T5 = ("prompt", "prefix", "lora, everywhere", "houlsby", "ia3, everywhere")
PAIRS = [
    *((name, "decoder") for name in CASES if name not in COVERED),
    *((name, "t5") for name in ON_T5),
    *((name, "t5, contexts") for name in ("prompt", "prefix", "prefix of words")),
]
KEPT = [
    *(
        (name, "decoder")
        for name in ("prompt", "multitask", "prefix", "lora, everywhere", "houlsby")
    ),
    ("prompt", "t5"),
]
FRESH_IS_BASE = [pair for pair in PAIRS if not pair[0].startswith(("pr", "multitask"))]

pytestmark = pytest.mark.usefixtures("x64")


@functools.partial(jax.jit, static_argnames="config")
def logits_and_gradient(config, delta, weights, batch):
    """Logits [R, M, V], and the gradient of half the sum of their squares."""

    def logits(delta):
        return row_logits(config.model, weights, shared_part(config, delta, weights), batch.rows)

    logits_RMV, pull_back = jax.vjp(logits, delta)
    return logits_RMV, pull_back(logits_RMV)[0]


@pytest.mark.parametrize(("name", "kind"), matrix(PAIRS, keep=KEPT))
def test_packed_rows_and_gradients(name, kind):
    """Contracts 3 and 4. Mutations: cross-attention's prefix is masked like the row's own states; a
    prefix's keys lie in the order [P, L]; LoRA's B is scaled twice; the method's variables never
    reach the layers, so that a leaf has no gradient.
    """
    config, fresh, weights, layout = make(name, kind)
    delta, (_, _, encoded) = moved(fresh), base(kind)
    wanted = alone(config, delta, weights, encoded)
    for rows in ([[0, 1, 2, 3]], [[3], [], [2, 0, 1]]):
        order = np.array([n for row in rows for n in row])
        rows_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        batch = train_batch(encoded, order, rows_B, RowShape(3, 70, 12, 8), layout)
        logits_RMV, grads = logits_and_gradient(config, delta, weights, double(batch))
        for n, logits_MV in by_example(encoded, rows, logits_RMV):
            np.testing.assert_allclose(logits_MV, wanted[n], **EXACT)
    like = jax.tree.map(lambda x: (x.shape, x.dtype), delta)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == like
    paths, _ = jax.tree_util.tree_flatten_with_path(grads)
    unmoved = [jax.tree_util.keystr(path) for path, grad in paths if not np.abs(grad).max() > 0]
    assert not unmoved


@pytest.mark.parametrize(("name", "kind"), matrix(FRESH_IS_BASE, keep=KEPT))
def test_a_fresh_delta_changes_nothing(name, kind):
    """Contract 2. Mutations: LoRA's B begins as noise; an adapter's "up" does; IA3 begins at zero;
    a new bias begins at one; `full` begins with fresh weights.
    """
    config, delta, weights, _ = make(name, kind)
    model, whole, encoded = base(kind)
    ours = alone(config, delta, weights, encoded)
    theirs = alone(StepConfig(model, "none", None), {}, whole, encoded)
    for some_MV, others_MV in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(some_MV, others_MV, **EXACT)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ("decoder", "t5"))
@pytest.mark.parametrize("name", NETWORKS)
def test_a_folded_delta_is_the_trained_one(name, kind):
    """Layers are given the same, and a gradient reaches every leaf. Mutations: `fold` leaves the
    network out, or its last layer; a leaf of the network is not used.
    """
    config, fresh, weights, _ = make(name, kind)
    method, cfg, delta = METHODS[config.method], config.method_config, moved(fresh)
    folded = method.fold(delta, cfg)
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(folded)[0]}
    assert names <= {"prompt", "k", "v"}

    def given(delta):
        return method.variables(delta, weights, cfg, None)

    close = functools.partial(np.testing.assert_allclose, **EXACT)
    jax.tree.map(close, jax.jit(given)(folded), jax.jit(given)(delta))
    gradient = jax.jit(jax.grad(lambda delta: optax.tree.norm(given(delta))))(delta)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))
