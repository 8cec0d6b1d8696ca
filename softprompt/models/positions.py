"""Where tokens stand: rotary angles, and windows of attention."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for positions beyond those first trained for.

    `kind` "linear" divides all of them by `factor`. "llama3" divides those whose wavelength is more
    than `original / low`, leaves those below `original / high`, and blends in between.
    Source: `modeling_rope_utils` of transformers.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def rotary_table(
    positions_T: jax.Array, size: int, base: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, size / 2] of rotary positions. Source: arXiv 2104.09864, 3.4.2."""
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    frequency_K = base ** -(jnp.arange(0, size, 2, dtype=dtype) / size)
    if scaling is not None:
        frequency_K = stretch(frequency_K, scaling)
    angle_TK = positions_T.astype(dtype)[:, None] * frequency_K
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def stretch(frequency_K: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Frequencies of rotary positions under a scaling."""
    if scaling.kind == "linear":
        return frequency_K / scaling.factor
    turns_K = scaling.original * frequency_K / (2 * jnp.pi)  # in the original context
    kept_K = jnp.clip((turns_K - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequency_K * (kept_K + (1 - kept_K) / scaling.factor)


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
