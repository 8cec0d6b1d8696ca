"""Rotary position embeddings, and attention windows."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are scaled for a longer context than the original one.

    "linear" divides every frequency by `factor`. "llama3" and "yarn" keep the frequencies that turn
    more than `high` times in the `original` context, divide those that turn less than `low` times
    by `factor`, and interpolate in between: "llama3" linearly in the number of turns, "yarn" in the
    index of the frequency.

    Attributes:
        kind: "linear", "llama3" or "yarn".
        factor: of the context's length.
        low: number of turns in the original context.
        high: number of turns in the original context.
        original: length of the original context.
        attention: factor of cosines and sines ("yarn").
        truncate: round the indices where the interpolation begins and ends ("yarn").

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
    """The frequencies [K] of a rotary base after a scaling."""
    if scaling.kind == "linear":
        return frequency_K / scaling.factor
    if scaling.kind == "yarn":
        unscaled_K = _yarn_unscaled(len(frequency_K), scaling, base)
    else:
        turns_K = scaling.original * frequency_K / (2 * jnp.pi)  # in the original context
        unscaled_K = jnp.clip((turns_K - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequency_K * (unscaled_K + (1 - unscaled_K) / scaling.factor)


def _yarn_unscaled(size: int, scaling: RopeScaling, base: float) -> jax.Array:
    """The weight of each unscaled frequency: 1 before the interpolation, 0 after it."""

    def index(turns: float) -> float:
        return size * math.log(scaling.original / (turns * 2 * math.pi)) / math.log(base)

    first, last = index(scaling.high), index(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * size - 1)
    last += 0.001 if first == last else 0  # avoids a division by zero, as in transformers
    return 1 - jnp.clip((jnp.arange(size) - first) / (last - first), 0, 1)


@jax.custom_vjp
def rotate(x_THK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates the two halves of each head by the angles of the table.

    If the table is narrower than the head, the head's last entries stay unchanged. The gradient is
    the inverse rotation; automatic differentiation would pad the parts and add them.
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
    """True where a key is less than `window` (a scalar) positions before a query, [T, S]."""
    return positions_T[:, None] - positions_S < window
