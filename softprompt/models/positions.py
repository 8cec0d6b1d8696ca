"""Where tokens stand: rotary angles, and windows of attention."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for positions beyond those first trained for.

    "linear" divides every frequency by `factor`. "llama3" and "yarn" keep the frequencies that turn
    more than `high` times in the `original` context, divide those that turn less than `low` times
    by `factor`, and blend in between: "llama3" in proportion to the turns, "yarn" to the index of
    the frequency.

    Attributes:
        kind: "linear", "llama3" or "yarn".
        factor: by which positions may grow.
        low: turns.
        high: turns.
        original: positions first trained for.
        attention: what cosines and sines are multiplied by ("yarn").
        truncate: the blend begins and ends at whole indices ("yarn").

    Source: `modeling_rope_utils` of transformers; arXiv 2309.00071, section 3 (YaRN).
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192
    attention: float = 1.0
    truncate: bool = True


def rotary_table(
    positions_T: jax.Array, size: int, base: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, size / 2] of rotary positions. Source: arXiv 2104.09864, 3.4.2."""
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    frequency_K = base ** -(jnp.arange(0, size, 2, dtype=dtype) / size)
    if scaling is not None:
        frequency_K = stretch(frequency_K, scaling, base)
    angle_TK = positions_T.astype(dtype)[:, None] * frequency_K
    cos_TK, sin_TK = jnp.cos(angle_TK), jnp.sin(angle_TK)
    if scaling is not None and scaling.attention != 1.0:
        cos_TK, sin_TK = cos_TK * scaling.attention, sin_TK * scaling.attention
    return cos_TK, sin_TK


def stretch(frequency_K: jax.Array, scaling: RopeScaling, base: float) -> jax.Array:
    """Frequencies of rotary positions of a base, under a scaling."""
    if scaling.kind == "linear":
        return frequency_K / scaling.factor
    if scaling.kind == "yarn":
        kept_K = _kept_by_yarn(len(frequency_K), scaling, base)
    else:
        turns_K = scaling.original * frequency_K / (2 * jnp.pi)  # in the original context
        kept_K = jnp.clip((turns_K - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequency_K * (kept_K + (1 - kept_K) / scaling.factor)


def _kept_by_yarn(size: int, scaling: RopeScaling, base: float) -> jax.Array:
    """The share of each frequency that is kept: 1 before the blend, 0 behind it."""

    def index(turns: float) -> float:
        return size * math.log(scaling.original / (turns * 2 * math.pi)) / math.log(base)

    first, last = index(scaling.high), index(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * size - 1)
    last += 0.001 if first == last else 0  # as transformers, against a division by zero
    return 1 - jnp.clip((jnp.arange(size) - first) / (last - first), 0, 1)


@jax.custom_vjp
def rotate(x_THK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each head's two halves against each other by the row's angles.

    Where the table is narrower than the head, what it does not reach is left as it is. The gradient
    is rotated back; derived from the parts, it would be padded and added up.
    """
    cos, sin = (t[:, None, :] for t in table)
    half = cos.shape[-1]
    x = x_THK.astype(cos.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    parts = [a * cos - b * sin, b * cos + a * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x_THK.dtype)


def _rotate_forward(x_THK: jax.Array, table: Any) -> tuple[jax.Array, Any]:
    return rotate(x_THK, table), table


def _rotate_backward(table: Any, g_THK: jax.Array) -> tuple[jax.Array, None]:
    cos, sin = table
    return rotate(g_THK, (cos, -sin)), None


rotate.defvjp(_rotate_forward, _rotate_backward)


def within(window: jax.Array, positions_T: jax.Array, positions_S: jax.Array) -> jax.Array:
    """Which keys lie less than `window` (a scalar) positions behind each query, [T, S]."""
    return positions_T[:, None] - positions_S < window
