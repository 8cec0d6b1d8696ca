"""Optimizers and schedules, from optax.

The learning rate is data, not code: it is a scalar of the optimizer's state, written by the host
before each step, so that trials which differ in rate or schedule share one compiled step.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt.errors import unknown

OPTIMIZERS = ("adafactor", "adamw")
SCHEDULES = ("constant", "cosine", "linear")


class OptimizerConfig(NamedTuple):
    """The static half of an optimizer.

    Attributes:
        name: "adamw" (arXiv 1711.05101) or "adafactor" (arXiv 1804.04235, no parameter scaling).
        weight_decay: AdamW's is scaled by the rate, Adafactor's is not.
        clip: largest global norm of the gradient; 0 switches clipping off.
        b1: decay of AdamW's first moment.
        b2: decay of AdamW's second moment.
        eps: AdamW's epsilon.
        decay_rate: exponent of Adafactor's second-moment decay.
        factored_min: a second moment is factored where both sides are at least this long.
    """

    name: str = "adamw"
    weight_decay: float = 0.0
    clip: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    decay_rate: float = 0.8
    factored_min: int = 128


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the optimizer; its rate is set with `set_rate`.

    Raises:
        UserError: an unknown name.
    """
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.0)
    clip = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    if cfg.name == "adamw":
        moments = optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps)
        return optax.chain(*clip, moments, optax.add_decayed_weights(cfg.weight_decay), rate)
    if cfg.name == "adafactor":
        moments = optax.scale_by_factored_rms(
            decay_rate=cfg.decay_rate, min_dim_size_to_factor=cfg.factored_min
        )
        bounded = optax.clip_by_block_rms(1.0)
        return optax.chain(
            *clip, moments, bounded, rate, optax.add_decayed_weights(-cfg.weight_decay)
        )
    raise unknown("config.optimizer.name", cfg.name, OPTIMIZERS)


def set_rate(opt_state: Any, rate: float | np.floating | jax.Array) -> Any:
    """The state with this learning rate for the next update."""
    return optax.tree.set(opt_state, learning_rate=rate)


def rates(name: str, *, peak: float, warmup: int, steps: int) -> np.ndarray:
    """The learning rate of every step, float32 [steps].

    Args:
        name: after the warm-up, "constant", or a "cosine" or "linear" fall to zero at the end.
        peak: the rate that warm-up climbs to, linearly from zero.
        warmup: steps of warm-up.
        steps: all steps.

    Raises:
        UserError: an unknown schedule.
    """
    offset = 1 if warmup else 0  # the first step of a warm-up moves, and so does the last of a fall
    rest = max(1, steps - warmup + offset)
    falls = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }
    if name not in falls:
        raise unknown("config.optimizer.schedule", name, falls)
    climb = optax.linear_schedule(0.0, peak, warmup)
    schedule = optax.join_schedules([climb, falls[name]], [warmup]) if warmup else falls[name]
    table = jax.vmap(schedule)(jnp.arange(steps) + offset) * jnp.ones(steps)
    return np.asarray(table, np.float32)
