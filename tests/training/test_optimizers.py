"""Optimizers against optax's own, and schedules against their shapes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from softprompt.errors import UserError
from softprompt.training.optimizers import (
    OPTIMIZERS,
    Adafactor,
    AdamW,
    OptimizerConfig,
    Sgd,
    averaged,
    make_optimizer,
    rates,
    row_norms,
    set_rate,
    set_row_cap,
)

RATES = np.array([0.1, 0.03, 0.2, 0.05, 0.01], np.float32)


def gradients(delta, step):
    return jax.tree.map(
        lambda leaf: jax.random.normal(jax.random.key(step), leaf.shape) * 4**step, delta
    )


def walk(tx, delta, *, given=True):
    """Deltas after each of some steps with different gradients; rates are set from outside."""
    state, path = tx.init(delta), []
    update = jax.jit(tx.update)
    for step, rate in enumerate(RATES):
        grads = gradients(delta, step)
        if given:
            state = set_rate(state, rate)
        updates, state = update(grads, state, delta)
        delta = optax.apply_updates(delta, updates)
        path.append(delta["prompt"])
    return np.array(path)


def schedule(step):
    return jnp.asarray(RATES)[step]


@pytest.fixture
def delta():
    return {"prompt": jax.random.normal(jax.random.key(9), (12, 16))}


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_is_optax_adamw(delta, decay):
    """Mutation: weight decay after the rate; the first rate for all steps; b1 for b2."""
    cfg = OptimizerConfig(AdamW(b1=0.8, b2=0.95, eps=1e-3), decay)
    wanted = optax.adamw(schedule, 0.8, 0.95, 1e-3, weight_decay=decay)
    np.testing.assert_allclose(
        walk(make_optimizer(cfg), delta), walk(wanted, delta, given=False), rtol=2e-6, atol=1e-6
    )


@pytest.mark.parametrize("factored_min", [8, 128], ids=["factored", "whole"])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_adafactor_is_optax_adafactor(delta, factored_min, decay):
    """Mutation: no clipping of the update's RMS; scaling by the parameters; decay with the rate."""
    cfg = OptimizerConfig(Adafactor(decay_rate=0.7, factored_min=factored_min), decay)
    wanted = optax.adafactor(
        schedule,
        min_dim_size_to_factor=factored_min,
        decay_rate=0.7,
        multiply_by_parameter_scale=False,
        weight_decay_rate=decay or None,
    )
    np.testing.assert_allclose(
        walk(make_optimizer(cfg), delta), walk(wanted, delta, given=False), rtol=2e-6, atol=1e-6
    )


def test_factored_moments_are_vectors(delta):
    """Mutation: `factored_min` is not handed on."""
    shapes = {}
    for least in (8, 13):
        state = make_optimizer(OptimizerConfig(Adafactor(factored_min=least))).init(delta)
        shapes[least] = {leaf.shape for leaf in jax.tree.leaves(state)}
    assert (12, 16) not in shapes[8] and {(12,), (16,)} <= shapes[8]
    assert (12, 16) in shapes[13]


def test_clipping_bounds_the_global_norm(delta):
    """Mutation: clip after the moments; clip by value; clip 0 clips to zero."""
    clipped = walk(make_optimizer(OptimizerConfig(clip=0.5)), delta)
    wanted = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(schedule, weight_decay=0.0))
    np.testing.assert_allclose(clipped, walk(wanted, delta, given=False), rtol=2e-6, atol=1e-6)
    free = walk(make_optimizer(OptimizerConfig(clip=0.0)), delta)
    assert np.abs(free - clipped).max() > 1e-2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_decays_as_the_gradient_of_a_penalty(delta, momentum):
    """Mutation: decay behind the momentum or the rate; Nesterov's momentum; a damped one."""
    found = walk(make_optimizer(OptimizerConfig(Sgd(momentum), 0.1)), delta)
    wanted_PD, sum_PD = np.array(delta["prompt"], np.float64), 0
    for step, rate in enumerate(RATES):
        sum_PD = momentum * sum_PD + gradients(delta, step)["prompt"] + 0.1 * wanted_PD
        wanted_PD = wanted_PD - rate * sum_PD
        np.testing.assert_allclose(found[step], wanted_PD, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_capped_rows(delta, name):
    """Mutation: cap before the update; scale the whole prompt, or columns; shorten rows below the
    cap."""
    delta = {"encoder": delta}
    cfg = OptimizerConfig(OPTIMIZERS[name](), cap_rows=True)
    tx, free = make_optimizer(cfg), make_optimizer(cfg._replace(cap_rows=False))
    norms_P = np.linalg.norm(delta["encoder"]["prompt"], axis=1)
    cap = np.float32(np.median(norms_P))
    state = set_row_cap(set_rate(tx.init(delta), np.float32(0.01)), cap)
    free_state = set_rate(free.init(delta), np.float32(0.01))
    capped = within = 0
    for step in range(3):
        grads = gradients(delta, step)
        free_updates, free_state = free.update(grads, free_state, delta)
        wanted = optax.apply_updates(delta, free_updates)
        updates, state = tx.update(grads, state, delta)
        delta = optax.apply_updates(delta, updates)
        for ours_D, free_D in zip(
            *(np.array(x["encoder"]["prompt"]) for x in (delta, wanted)), strict=True
        ):
            norm = np.linalg.norm(free_D.astype(np.float64))
            if norm > cap:
                np.testing.assert_allclose(ours_D, free_D * cap / norm, rtol=1e-5, atol=1e-6)
                capped += 1
            else:
                np.testing.assert_array_equal(ours_D, free_D)
                within += 1
        assert np.linalg.norm(delta["encoder"]["prompt"], axis=1).max() <= cap * (1 + 1e-6)
    assert capped and within


def test_a_cap_needs_prompts_alone():
    """Mutation: a cap that does nothing, and says nothing; one of what a network makes rows of."""
    tx, prompt = make_optimizer(OptimizerConfig(cap_rows=True)), {"prompt": jnp.zeros((2, 3))}
    tx.init({"encoder": prompt, "decoder": prompt})
    for more in ({"net": {"w0": jnp.zeros((3, 3))}}, {"task_cols": jnp.zeros((4, 2, 1))}):
        for delta in ({"layers": more}, {"encoder": prompt | more}):
            with pytest.raises(UserError, match="'optimizer.max_row_norm' is set; allowed: 0 with"):
                tx.init(delta)


def test_a_row_that_is_not_finite_is_not_hidden(delta):
    """The loop stops there. Mutation: divide by the norm whatever it is, `nan_to_num`."""
    tx = make_optimizer(OptimizerConfig(Sgd(), cap_rows=True))
    state = set_row_cap(set_rate(tx.init(delta), np.float32(1)), np.float32(2))
    for bad in (jnp.nan, jnp.inf):
        grads = {"prompt": jnp.zeros((12, 16)).at[3, 4].set(bad)}
        updates, _ = tx.update(grads, state, delta)
        assert not np.isfinite(row_norms(optax.apply_updates(delta, updates))["row_norm_max"])
    zero = {"prompt": jnp.zeros((12, 16))}
    updates, _ = tx.update(zero, state, zero)
    assert not np.any(updates["prompt"]), "rows of zeros stay"


@pytest.mark.parametrize("cap", [False, True])
def test_the_average_follows_the_delta(delta, cap):
    """Mutation: average the updates, the delta before them, or before the cap; begin at zero;
    decay for 1 - decay; another delta because of it."""
    cfg = OptimizerConfig(AdamW(), 0.1, cap_rows=cap)
    tx, plain = make_optimizer(cfg._replace(ema=0.75)), make_optimizer(cfg)
    first, state, plain_state = delta, tx.init(delta), plain.init(delta)
    if cap:
        state, plain_state = (set_row_cap(x, np.float32(3)) for x in (state, plain_state))
    assert averaged(None, state)["prompt"] is not delta["prompt"], "both are donated"
    np.testing.assert_array_equal(averaged(None, state)["prompt"], delta["prompt"])
    assert averaged(delta, plain_state) is delta, "none is taken"
    wanted_PD = np.array(delta["prompt"], np.float64)
    for step, rate in enumerate(RATES):
        grads = gradients(delta, step)
        updates, state = tx.update(grads, set_rate(state, rate), delta)
        plain_updates, plain_state = plain.update(grads, set_rate(plain_state, rate), delta)
        np.testing.assert_array_equal(updates["prompt"], plain_updates["prompt"])
        delta = optax.apply_updates(delta, updates)
        wanted_PD = 0.75 * wanted_PD + 0.25 * np.array(delta["prompt"], np.float64)
        found_PD = averaged(delta, state)["prompt"]
        np.testing.assert_allclose(found_PD, wanted_PD, rtol=1e-5, atol=1e-6)
    assert np.abs(wanted_PD - first["prompt"]).max() > 0.1
    assert np.abs(wanted_PD - delta["prompt"]).max() > 0.05


def test_row_norms():
    """Mutation: norms of columns, or of every leaf; the mean of the places' means."""
    delta = {
        "encoder": {"prompt": jnp.array([[3.0, 4.0], [0.0, 1.0], [0.0, 3.0]])},
        "decoder": {"prompt": jnp.array([[6.0, 8.0]])},
        "mlp": {"kernel": jnp.full((2, 2), 99.0)},
    }
    found = {name: float(norm) for name, norm in row_norms(delta).items()}
    assert found == {"row_norm_min": 1.0, "row_norm_mean": 4.75, "row_norm_max": 10.0}
    assert row_norms({"mlp": delta["mlp"]}) == {}
    assert row_norms({"prompt": jnp.zeros((0, 4))}) == {}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rate_reaches_the_update_without_a_new_program(delta, name):
    """Mutation: `set_rate` sets nothing; the rate is a constant of the optimizer."""
    tx = make_optimizer(OptimizerConfig(OPTIMIZERS[name]()))
    state = tx.init(delta)
    traced = []

    @jax.jit
    def update(grads, state, delta):
        traced.append(1)
        return tx.update(grads, state, delta)[0]["prompt"]

    moves = [update(delta, set_rate(state, rate), delta) for rate in RATES]
    assert len(traced) == 1
    for rate, move in zip(RATES, moves, strict=True):
        np.testing.assert_allclose(move, moves[0] * (rate / RATES[0]), rtol=1e-5)
    assert np.abs(update(delta, set_rate(state, np.float32(0)), delta)).max() == 0


def test_schedules():
    """Mutation: a first step of rate zero; a warm-up that peaks a step late; no fall; an inverse
    square root of the steps since the warm-up, or of steps counted from 0.
    """
    np.testing.assert_allclose(rates("constant", peak=2.0, warmup=0, steps=4), [2, 2, 2, 2])
    np.testing.assert_allclose(rates("linear", peak=2.0, warmup=0, steps=4), [2, 1.5, 1, 0.5])
    cosine = 1 + np.cos(np.pi * np.arange(6) / 6)
    np.testing.assert_allclose(rates("cosine", peak=2.0, warmup=0, steps=6), cosine, rtol=1e-6)
    warm = rates("cosine", peak=3.0, warmup=3, steps=12)
    np.testing.assert_allclose(warm[:3], [1, 2, 3], rtol=1e-6)
    assert warm[2] == warm.max() and np.all(np.diff(warm[2:]) < 0) and 0 < warm[-1] < 0.3
    inverse = [4, 4 / np.sqrt(2), 4 / np.sqrt(3), 2]
    np.testing.assert_allclose(rates("inverse_sqrt", peak=4.0, warmup=0, steps=4), inverse)
    inverse = [2, 4, 4 * np.sqrt(2 / 3), 4 * np.sqrt(2 / 4), 4 * np.sqrt(2 / 5)]
    np.testing.assert_allclose(rates("inverse_sqrt", peak=4.0, warmup=2, steps=5), inverse)
    climb = rates("constant", peak=1.0, warmup=4, steps=6)
    np.testing.assert_allclose(climb, [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "inverse_sqrt", "linear"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (1, 1), (5, 5), (0, 0)])
def test_short_schedules_are_finite(name, warmup, steps):
    """Mutation: divide by `steps - warmup`."""
    some = rates(name, peak=0.5, warmup=warmup, steps=steps)
    assert some.shape == (steps,) and some.dtype == np.float32
    assert np.all((some > 0) & (some <= 0.5))


OTHER = {
    **{"b1": 0.5, "b2": 0.5, "eps": 0.1, "momentum": 0.5, "start_step": 0},
    **{"factored": False, "factored_min": 100, "decay_rate": 0.0},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_key_of_an_optimizer_changes_what_it_does(delta, name):
    """Breaks when a key of its settings is not passed on to optax."""
    rule = OPTIMIZERS[name]()
    rule = dataclasses.replace(rule, factored_min=8) if hasattr(rule, "factored_min") else rule
    before = walk(make_optimizer(OptimizerConfig(rule)), delta)
    for field in dataclasses.fields(rule):
        changed = dataclasses.replace(rule, **{field.name: OTHER[field.name]})
        after = walk(make_optimizer(OptimizerConfig(changed)), delta)
        assert np.abs(after - before).max() > 1e-4, field.name


def test_unknown_names_are_refused():
    """Mutation: fall back to AdamW, or to a constant rate."""
    with pytest.raises(UserError, match="cosin.*cosine"):
        rates("cosin", peak=1.0, warmup=0, steps=3)
