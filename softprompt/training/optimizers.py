"""Optimizers and schedules, from optax.

The learning rate is a scalar in the optimizer's state, which the host sets before each step. Trials
that differ only in rate or schedule therefore share one compiled step. The largest norm of a
prompt's row is such a scalar too.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt.errors import UserError, nearest
from softprompt.settings import Settings, setting, summaries
from softprompt.training.sharding import path_name

Tree = Any
Transforms = list[optax.GradientTransformation]


@dataclasses.dataclass(frozen=True)
class UpdateRule(Settings):
    """Base of the classes below, each of which has the config keys of one optimizer."""

    section = "optimizer"
    for_training = True

    def transforms(self, rate: optax.GradientTransformation, weight_decay: float) -> Transforms:
        """The transformations that turn a gradient into an update, in order.

        `rate` is one of them, which multiplies by the negative learning rate.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class AdamW(UpdateRule):
    """Adam with decoupled weight decay, arXiv 1711.05101."""

    b1: float = setting(0.9, "decay of the first moment", low=0, high=0.999999)
    b2: float = setting(0.999, "decay of the second moment", low=0, high=0.999999)
    eps: float = setting(1e-8, "added to the denominator", low=1e-30)

    def transforms(self, rate: optax.GradientTransformation, weight_decay: float) -> Transforms:
        """Weight decay is scaled by the rate."""
        moments = optax.scale_by_adam(self.b1, self.b2, self.eps)
        return [moments, optax.add_decayed_weights(weight_decay), rate]


@dataclasses.dataclass(frozen=True)
class Adafactor(UpdateRule):
    """Adafactor, arXiv 1804.04235, without scaling by the parameters' RMS."""

    factored: bool = setting(
        True, "factor the second moment of arrays whose two longest sides are at least factored_min"
    )
    factored_min: int = setting(
        128,
        "smallest size of a side that is factored: prompts of 150 vectors are, of 100 are not",
        low=1,
        needs=("factored",),
    )
    decay_rate: float = setting(0.8, "exponent of the second moment's decay", low=0, high=1)
    start_step: ClassVar[int] = 0  # at which the decay of the second moment starts to count

    def transforms(self, rate: optax.GradientTransformation, weight_decay: float) -> Transforms:
        """Weight decay ignores the rate: each step multiplies the delta by 1 - weight_decay."""
        bounded = optax.clip_by_block_rms(1.0)
        root = optax.scale_by_factored_rms(  # epsilon is added to the squared gradient
            factored=self.factored,
            decay_rate=self.decay_rate,
            step_offset=-self.start_step,
            min_dim_size_to_factor=self.factored_min,
        )
        return [root, bounded, rate, optax.add_decayed_weights(-weight_decay)]


@dataclasses.dataclass(frozen=True)
class AdafactorT5X(Adafactor):
    """Adafactor as the paper ran it, with a step count that starts late.

    Prompt tuning in T5X restores the adapted model's step, 1,100,000, while the prompt's second
    moment starts at zero. The decay of that moment is then 1 - (start_step + 1)^-0.8 = 0.9999853
    from the first step on, and its bias is not corrected. The update would be far above an RMS of
    1, so it is clipped: every step has an RMS of 1, times the rate. (`step_offset` of optax and T5X
    is subtracted from the step; `start_step` is added to it.)
    """

    start_step: int = setting(  # type: ignore[misc]  # a setting here
        1_100_000, "step at which the decay of the second moment starts to count", low=0, high=2**30
    )


@dataclasses.dataclass(frozen=True)
class Sgd(UpdateRule):
    """Stochastic gradient descent."""

    momentum: float = setting(
        0.0,
        "momentum m = momentum * m + gradient, where the gradient includes weight decay; 0 is off",
        low=0,
        high=0.999999,
    )

    def transforms(self, rate: optax.GradientTransformation, weight_decay: float) -> Transforms:
        """Weight decay is part of the momentum, and is scaled by the rate."""
        trace = [optax.trace(self.momentum)] if self.momentum else []
        return [optax.add_decayed_weights(weight_decay), *trace, rate]


OPTIMIZERS: dict[str, type[UpdateRule]] = {
    "adamw": AdamW,
    "adafactor": Adafactor,
    "adafactor_t5x": AdafactorT5X,
    "sgd": Sgd,
}


@dataclasses.dataclass(frozen=True)
class Optimizer(Settings):
    """The keys that all optimizers share."""

    section = "optimizer"
    for_training = True

    name: str = setting("adamw", f"the optimizer: {summaries(OPTIMIZERS)}", choices=OPTIMIZERS)
    rate: float = setting(0.01, "peak learning rate, in `rate_unit`", low=0)
    rate_unit: str = setting(
        "absolute",
        "unit of the rate: absolute, or embedding_rms (the RMS of the embeddings, as the model "
        "scales them)",
        choices=("absolute", "embedding_rms"),
    )
    schedule: str = setting(
        "cosine",
        "rate after the warm-up: cosine or linear to zero, constant, or inverse_sqrt of the step",
        choices=("cosine", "constant", "linear", "inverse_sqrt"),
    )
    warmup: int = setting(0, "steps in which the rate rises from zero to its peak", low=0)
    weight_decay: float = setting(
        0.0,
        "share of the delta that each step removes, multiplied by the rate (not with adafactor and "
        "adafactor_t5x)",
        low=0,
    )
    clip: float = setting(0.0, "largest global gradient norm; 0 is off", low=0)
    max_row_norm: float = setting(
        0.0,
        "largest norm of a prompt's row; longer rows are shortened. With rate_unit=embedding_rms "
        "its unit is the norm of an embedding (their RMS times the root of the width). 0 is off",
        low=0,
    )


class OptimizerConfig(NamedTuple):
    """The static part of an optimizer; its steps are compiled for these values.

    Attributes:
        rule: turns a gradient into an update.
        weight_decay: see the rule.
        clip: largest global norm of the gradient; 0 switches clipping off.
        cap_rows: whether the norm of a prompt's rows is capped; `set_row_cap` sets the cap.
        ema: decay of the delta's moving average; 0 switches it off.
    """

    rule: UpdateRule = AdamW()
    weight_decay: float = 0.0
    clip: float = 0.0
    cap_rows: bool = False
    ema: float = 0.0


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Builds the optimizer; its rate is set with `set_rate`."""
    rate = optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.0)
    parts = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip else []
    parts += cfg.rule.transforms(rate, cfg.weight_decay)
    if cfg.cap_rows:
        parts.append(optax.inject_hyperparams(cap_row_norms)(max_row_norm=0.0))
    if cfg.ema:
        parts.append(average_delta(cfg.ema))
    return optax.chain(*parts)


def set_rate(opt_state: Tree, rate: float | np.floating | jax.Array) -> Tree:
    """Returns the state with this learning rate for the next update."""
    return optax.tree.set(opt_state, learning_rate=rate)


def set_row_cap(opt_state: Tree, norm: float | np.floating | jax.Array) -> Tree:
    """Returns the state, of an optimizer with `cap_rows`, with this largest norm of a row."""
    return optax.tree.set(opt_state, max_row_norm=norm)


def cap_row_norms(max_row_norm: float | jax.Array) -> optax.GradientTransformation:
    """Scales down the rows of prompts whose norm would exceed `max_row_norm` after an update.

    It projects the updated prompt, so it must follow all transformations that change the update.
    Rows within the cap are updated as usual; longer ones get a norm equal to the cap, up to
    rounding.

    Raises:
        UserError: raised by `init` if the delta has other leaves than prompts. A network or a
            task's factor would change the rows' norms, so the cap does not apply to them.
    """

    def init(delta: Tree) -> optax.EmptyState:
        if len(prompts(delta)) != len(jax.tree.leaves(delta)):
            raise UserError(
                "config key 'optimizer.max_row_norm' is set; allowed: 0 with this method, which "
                "trains other things than a prompt's rows"
            )
        return optax.EmptyState()

    def one(update: jax.Array, old: jax.Array) -> jax.Array:
        new = old + update
        norm = jnp.linalg.norm(new, axis=-1, keepdims=True)
        return jnp.where(norm > max_row_norm, new * (max_row_norm / norm) - old, update)

    def project(updates: Tree, state: Any, delta: Tree | None = None) -> tuple[Tree, Any]:
        return jax.tree.map(one, updates, delta), state

    return optax.GradientTransformation(init, project)


class AverageState(NamedTuple):
    """The moving average of all deltas so far, including the initial one."""

    average: Tree


def average_delta(decay: float) -> optax.GradientTransformation:
    """Tracks average = decay * average + (1 - decay) * updated delta; leaves updates unchanged.

    It must be the last transformation. The average starts as the initial delta.
    """

    def init(delta: Tree) -> AverageState:
        return AverageState(jax.tree.map(jnp.copy, delta))  # both trees are donated

    def follow(
        updates: Tree, state: AverageState, delta: Tree | None = None
    ) -> tuple[Tree, AverageState]:
        new = optax.apply_updates(delta, updates)
        average = optax.incremental_update(new, state.average, 1 - decay)
        return updates, AverageState(average)

    return optax.GradientTransformation(init, follow)


def averaged(delta: Tree, opt_state: Tree) -> Tree:
    """The delta to evaluate and save: its moving average if there is one, else the delta itself."""
    return optax.tree.get(opt_state, "average", delta)


def is_prompt(path: Any) -> bool:
    """Whether a leaf of a delta is a prompt, whose rows are inserted among embeddings."""
    return path_name(path).rsplit("/", 1)[-1] == "prompt"


def prompts(delta: Tree) -> list[jax.Array]:
    """A delta's prompts, each [..., P, D]."""
    leaves = jax.tree_util.tree_flatten_with_path(delta)[0]
    return [leaf for path, leaf in leaves if is_prompt(path)]


def row_norms(delta: Tree) -> dict[str, jax.Array]:
    """Smallest, mean and largest norm of the rows of a delta's prompts; {} if it has none."""
    norms = [jnp.linalg.norm(leaf, axis=-1).ravel() for leaf in prompts(delta) if leaf.size]
    if not norms:
        return {}
    rows = jnp.concatenate(norms)
    return {"row_norm_min": rows.min(), "row_norm_mean": rows.mean(), "row_norm_max": rows.max()}


def rates(name: str, *, peak: float, warmup: int, steps: int) -> np.ndarray:
    """The learning rate of every step, float32 [steps].

    Args:
        name: the schedule after the warm-up: "constant", a "cosine" or "linear" decay to zero at
            the end, or "inverse_sqrt": peak * sqrt(w / max(step, w)) with w = max(1, warmup),
            where steps are counted from 1.
        peak: the rate at the end of the warm-up, which is linear from zero.
        warmup: steps of warm-up.
        steps: total number of steps.

    Raises:
        UserError: an unknown schedule.

    Source: Vaswani et al. 2017 (arXiv 1706.03762), equation 3, for inverse_sqrt, with `peak` in
    place of their function of the width. T5 (arXiv 1910.10683, section 3.1.2) instead holds the
    peak during the warm-up.
    """
    offset = 1 if warmup else 0  # the first step of a warm-up and the last of a decay are not 0
    rest = max(1, steps - warmup + offset)
    first = max(1, warmup)
    decays = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "inverse_sqrt": lambda later: peak * jnp.sqrt(first / (first + later)),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }
    if name not in decays:
        raise UserError(
            f"config key 'optimizer.schedule' is {name!r}{nearest(name, decays)}; allowed: "
            f"{', '.join(decays)}"
        )
    climb = optax.linear_schedule(0.0, peak, warmup)
    schedule = optax.join_schedules([climb, decays[name]], [warmup]) if warmup else decays[name]
    table = jax.vmap(schedule)(jnp.arange(steps) + offset) * jnp.ones(steps)
    return np.asarray(table, np.float32)
