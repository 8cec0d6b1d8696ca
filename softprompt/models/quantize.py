"""Frozen matrices in 8 or 4 bits: symmetric integers and scales, dequantised where they are used.

A leaf "kernel" becomes two: "kernel_q" and "kernel_scale". In 8 bits every output channel has a
scale. In 4 bits every group of up to 64 neighbours along the input has one, and two values share a
byte: the tree is as small in memory as on disk, whatever the backend makes of a 4-bit type. An odd
input size has no 4-bit form and stays in 8.

Norms, biases and positions stay as they are. Source: symmetric absmax rounding, as in arXiv
2208.07339 (section 2.1); groups as in arXiv 2210.17323 (section 4).
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("none", "int8", "int4")
GROUP = 64
PIECE = 2**20  # entries that are rounded at a time: the temporaries of a huge matrix stay small
VALUES, SCALE = "_q", "_scale"


def input_axes(path: str) -> tuple[int, ...]:
    """The axes of one layer's leaf that a product sums over; () where it is not quantised."""
    if path.endswith("embed/embedding"):
        return (1,)
    if path.endswith("/o/kernel"):
        return (0, 1)
    return (0,) if path.endswith("/kernel") else ()


def quantize(x: np.ndarray, axes: tuple[int, ...], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Rounds a matrix of any rank, a few of its output channels at a time.

    Args:
        x: one layer's values.
        axes: which of its axes are inputs; 4-bit groups lie along the last of them.
        kind: "int8" or "int4".

    Returns:
        Values, int8 in the shape of `x`, or uint8 with two of them a byte along the grouped axis;
        and float32 scales, as many along the input axes as there are groups.
    """
    shapes, packed = _stored(x.shape, axes, kind)
    values, scale = np.empty(shapes[0], np.uint8 if packed else np.int8), np.empty(shapes[1], "f4")
    output = min(set(range(x.ndim)) - set(axes))
    step = max(1, PIECE * x.shape[output] // x.size)
    for first in range(0, x.shape[output], step):
        where = (*[slice(None)] * output, slice(first, first + step))
        piece = np.asarray(x[where], np.float32)
        values[where], scale[where] = (_packed if packed else _rounded)(piece, axes)
    return values, scale


def _stored(
    shape: tuple[int, ...], axes: tuple[int, ...], kind: str
) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], bool]:
    """Shapes of values and scales, and whether two values share a byte."""
    axis, size = axes[-1], shape[axes[-1]]
    before, after = shape[:axis], shape[axis + 1 :]
    if kind == "int8" or size % 2:
        return (shape, tuple(1 if n in axes else size for n, size in enumerate(shape))), False
    return ((*before, size // 2, *after), (*before, size // group_size(size), *after)), True


def group_size(size: int) -> int:
    """The largest group of at most 64 that divides an input."""
    return next(group for group in range(min(GROUP, size), 0, -1) if size % group == 0)


def _rounded(
    x: np.ndarray, axes: tuple[int, ...], largest: int = 127
) -> tuple[np.ndarray, np.ndarray]:
    """Integers up to `largest`, and one scale along `axes`."""
    most = np.abs(x).max(axis=axes, keepdims=True)
    scale = np.where(most > 0, most, 1) / largest
    return np.rint(x / scale).astype(np.int8), scale.astype(np.float32)


def _packed(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Integers up to 7, two a byte, and one scale for each group along the last of `axes`."""
    axis, size = axes[-1], x.shape[axes[-1]]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    grouped = x.reshape(*before, -1, group_size(size), *after)
    values, scale = _rounded(grouped, (axis + 1,), largest=7)
    pairs = (values.reshape(*before, size // 2, 2, *after) + 8).view(np.uint8)
    low, high = np.take(pairs, 0, axis + 1), np.take(pairs, 1, axis + 1)
    return low | (high << 4), scale.squeeze(axis + 1)


def dequantize(values: jax.Array, scale: jax.Array, axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """The matrix that `quantize` rounded."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if values.dtype == jnp.int8:
        return (values.astype(wide) * scale.astype(wide)).astype(dtype)
    axis = axes[-1]
    both = jnp.stack([values & 15, values >> 4], axis=axis + 1).astype(wide) - 8
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    count = scale.shape[axis]
    grouped = both.reshape(*before, count, 2 * values.shape[axis] // count, *after)
    whole = grouped * jnp.expand_dims(scale.astype(wide), axis + 1)
    return whole.reshape(*before, 2 * values.shape[axis], *after).astype(dtype)


def storage(
    path: str, shape: tuple[int, ...], dtype: np.dtype, kind: str
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """What a leaf of one layer is stored as: path -> shape and dtype."""
    axes = input_axes(path)
    if kind == "none" or not axes:
        return {path: (shape, dtype)}
    (values, scale), packed = _stored(shape, axes, kind)
    return {
        path + VALUES: (values, np.dtype(np.uint8 if packed else np.int8)),
        path + SCALE: (scale, np.dtype(np.float32)),
    }


def embedding(embed: Mapping[str, jax.Array]) -> jax.Array:
    """The embedding matrix [V, D] of a weights tree's "embed"; float32 where it is quantised."""
    if "embedding" in embed:
        return embed["embedding"]
    values, scale = embed["embedding" + VALUES], embed["embedding" + SCALE]
    return dequantize(values, scale, (1,), jnp.float32)
