"""Adafactor as T5X ran it in prompt tuning, against its rules step by step in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from softprompt.training.optimizers import (
    OPTIMIZERS,
    Adafactor,
    AdafactorT5X,
    OptimizerConfig,
    make_optimizer,
    set_rate,
)

RATE, DECAY, STEPS, FIRST = 0.3, 0.01, 6, 1_100_000
SHAPES = {"factored": (150, 136), "whole": (100, 136)}


def config(**changes):
    return OptimizerConfig(AdafactorT5X(**changes), DECAY)


def gradients(shape):
    """Gradients that differ in size by row and step, by little enough that the clip binds."""
    random = np.random.default_rng(3)
    rows_P1 = 10.0 ** random.uniform(-3, 1, (shape[0], 1))
    for scale in itertools.islice(itertools.cycle((1, 3, 0.3)), STEPS):
        yield (scale * rows_P1 * random.standard_normal(shape)).astype(np.float32)


def start(shape):
    return 10 * np.random.default_rng(4).standard_normal(shape).astype(np.float32)


def derived(shape, *, factored):
    """(prompt, clipped update, second moment) after each step, in float64.

    paper.md's derivation: the step is counted from the restored 1,100,000, the second moment
    starts at zero, beta2 = 1 - (step + 1)^-0.8, nothing corrects the moment's bias, the update is
    clipped to an RMS of 1, and the prompt decays by (1 - decay) a step, whatever the rate. The
    factored moment is the product of row and column means over the mean (arXiv 1804.04235,
    algorithm 4), epsilon 1e-30 beside the squared gradient.
    """
    prompt_PD = start(shape).astype(np.float64)
    moment_PD, rows_P, columns_D = np.zeros(shape), np.zeros(shape[0]), np.zeros(shape[1])
    for step, grad_PD in enumerate(gradients(shape), FIRST):
        square_PD = grad_PD.astype(np.float64) ** 2 + 1e-30
        beta2 = 1 - (step + 1.0) ** -0.8
        rows_P = beta2 * rows_P + (1 - beta2) * square_PD.mean(1)
        columns_D = beta2 * columns_D + (1 - beta2) * square_PD.mean(0)
        moment_PD = beta2 * moment_PD + (1 - beta2) * square_PD
        estimate_PD = np.outer(rows_P, columns_D) / rows_P.mean() if factored else moment_PD
        update_PD = grad_PD / np.sqrt(estimate_PD)
        update_PD /= max(1, np.sqrt(np.mean(update_PD**2)) / 1.0)
        prompt_PD = (1 - DECAY) * prompt_PD - RATE * update_PD
        yield prompt_PD, update_PD, estimate_PD


def estimate(moment):
    """The second moment [P, D] that optax's state stands for."""
    if moment.v["prompt"].ndim == 2:
        return np.asarray(moment.v["prompt"], np.float64)
    sides = (moment.v_row["prompt"], moment.v_col["prompt"])
    rows_P, columns_D = sorted((np.asarray(x, np.float64) for x in sides), key=len, reverse=True)
    return np.outer(rows_P, columns_D) / rows_P.mean()


def trained(cfg, shape):
    """(prompt, clipped update, optax's state of the second moment) after each step, in float32."""
    tx = make_optimizer(cfg)
    delta = {"prompt": jnp.asarray(start(shape))}
    state = tx.init(delta)
    update = jax.jit(tx.update)
    for grad_PD in gradients(shape):
        state = set_rate(state, np.float32(RATE))
        updates, state = update({"prompt": jnp.asarray(grad_PD)}, state, delta)
        old_PD = np.asarray(delta["prompt"], np.float64)
        clipped_PD = -(np.asarray(updates["prompt"]) + cfg.weight_decay * old_PD) / RATE
        delta = optax.apply_updates(delta, updates)
        yield np.asarray(delta["prompt"]), clipped_PD, state[0]


def is_factored(cfg, shape):
    state = make_optimizer(cfg).init({"prompt": jnp.zeros(shape)})
    return state[0].v["prompt"].shape != shape


@pytest.mark.parametrize("kind", ["factored", "whole", "switched off"])
def test_step_by_step(kind):
    """Mutation: the offset's other sign, or none; another threshold, or no clip; decay times the
    rate; a larger epsilon; factored though it is switched off.

    In float32, 1 - beta2 is one of the numbers 6e-8 apart: it may be 0.2 % off. The clip divides
    that out, wherever it binds.
    """
    shape = SHAPES["whole" if kind == "whole" else "factored"]
    wanted = derived(shape, factored=kind == "factored")
    found = trained(config(factored=kind != "switched off"), shape)
    for n, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        (prompt_PD, update_PD, moment), (wanted_PD, clipped_PD, estimate_PD) = ours, theirs
        np.testing.assert_allclose(estimate(moment), estimate_PD, rtol=5e-3, err_msg=f"step {n}")
        assert np.sqrt(np.mean(clipped_PD**2)) == pytest.approx(1)
        np.testing.assert_allclose(update_PD, clipped_PD, rtol=0, atol=1e-5)
        np.testing.assert_allclose(prompt_PD, wanted_PD, rtol=1e-5, atol=1e-5)


def test_every_step_has_an_rms_of_the_rate():
    """What the paper's training comes to. Mutation: no clip, or the clip behind the rate."""
    for shape in SHAPES.values():
        for _, update_PD, _ in trained(config()._replace(weight_decay=0.0), shape):
            assert np.sqrt(np.mean(update_PD**2)) == pytest.approx(1, rel=1e-5)


def test_decay_is_not_scaled_by_the_rate():
    """Mutation: decay before the rate."""
    tx = make_optimizer(config())
    delta = {"prompt": jnp.asarray(start((100, 136)))}
    state = set_rate(tx.init(delta), np.float32(0))
    updates, _ = tx.update({"prompt": jnp.ones((100, 136))}, state, delta)
    np.testing.assert_allclose(updates["prompt"], -DECAY * delta["prompt"], rtol=1e-6)


@pytest.mark.parametrize("kind", SHAPES)
def test_plain_adafactor_is_another_optimizer(kind):
    """Mutation: `start_step` is not handed on, or handed to plain Adafactor too.

    The first step is the same; after gradients ten times as large plain Adafactor takes a small
    step and this one takes a whole one.
    """
    ours = [update_PD for _, update_PD, _ in trained(config(), SHAPES[kind])]
    other = config()._replace(rule=Adafactor())
    plain = [update_PD for _, update_PD, _ in trained(other, SHAPES[kind])]
    apart = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(ours, plain, strict=True)]
    assert apart[0] < 1e-6
    assert min(apart[2], apart[5]) > 0.5
    assert max(np.sqrt(np.mean(plain[n] ** 2)) for n in (2, 5)) < 0.4


def test_from_step_zero_it_is_plain_adafactor():
    """Mutation: a second difference between the two."""
    shape = SHAPES["factored"]
    pairs = zip(
        trained(config(start_step=0), shape),
        trained(config()._replace(rule=Adafactor()), shape),
        strict=True,
    )
    for (ours_PD, *_), (plain_PD, *_) in pairs:
        np.testing.assert_array_equal(ours_PD, plain_PD)


@pytest.mark.parametrize("name", ["adafactor", "adafactor_t5x"])
def test_what_is_factored(name):
    """The confound of the paper's length ablation. Mutation: `factored` or `factored_min` is not
    handed on; one long side is enough."""
    rule = OPTIMIZERS[name]
    cfg = OptimizerConfig(rule())
    assert is_factored(cfg, (150, 512))
    assert is_factored(cfg, (128, 128))
    assert not is_factored(cfg, (100, 512))
    assert not is_factored(cfg, (150, 127))
    assert is_factored(cfg, (2, 150, 512)), "stacked: the two longest sides count"
    assert is_factored(OptimizerConfig(rule(factored_min=100)), (100, 512))
    for shape in ((150, 512), (100, 512)):
        assert not is_factored(OptimizerConfig(rule(factored=False)), shape)
