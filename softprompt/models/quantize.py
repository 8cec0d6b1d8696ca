"""Frozen matrices in 8 or 4 bits: integers and scales, dequantised where they are used.

A leaf "kernel" becomes "kernel_q", "kernel_scale" and, in 4 bits, "kernel_min". In 8 bits the
integers are symmetric, and every output channel has a scale. In 4 bits every group of up to 32
values along the input has a scale and a minimum in float16: minimum + scale * (0 to 15). Two 4-bit
values are packed in a byte, so that the size in memory does not depend on the backend's 4-bit
types. A matrix with an odd input size is stored in 8 bits.

The values of a GGUF matrix of type Q4_1 or Q4_K do not change: its blocks are such groups.

Norms, biases and positions are not quantised. Source: symmetric absmax rounding, as in arXiv
2208.07339 (section 2.1); groups as in arXiv 2210.17323 (section 4); a scale and a minimum for 32
values as in llama.cpp's block_q4_1 (ggml-common.h).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("none", "int8", "int4")
GROUP = 32
STEPS = (15, 14)  # steps from a group's lowest value to its highest, in the grids that are tried
PIECE = 2**18  # entries rounded at a time; it bounds the memory for temporaries
VALUES, SCALE, MINIMUM = "_q", "_scale", "_min"
PARTS = (VALUES, SCALE, MINIMUM)

Grid = tuple[np.ndarray, np.ndarray, np.ndarray]  # integers, scale, minimum


def input_axes(path: str) -> tuple[int, ...]:
    """The axes of one layer's leaf that a product sums over; () for a leaf without quantisation."""
    if path.endswith("embed/embedding"):
        return (1,)
    if path.endswith("/o/kernel"):
        return (0, 1)
    return (0,) if path.endswith("/kernel") else ()


def quantize(x: np.ndarray, axes: tuple[int, ...], kind: str) -> tuple[np.ndarray, ...]:
    """Rounds a matrix of any rank, a few output channels at a time.

    Args:
        x: one layer's values; in 4 bits, of an absolute value up to 65,504 (float16).
        axes: the input axes; 4-bit groups are along the last of them.
        kind: "int8" or "int4".

    Returns:
        For 8 bits, int8 values in the shape of `x` and a float32 scale for each output channel.
        For 4 bits, uint8 values that each hold two along the grouped axis, and float16 scales and
        minima with one entry for each group along that axis.
    """
    stored = _stored(x.shape, axes, kind)
    parts = tuple(np.empty(shape, dtype) for shape, dtype in stored)
    rounded = _rounded if len(stored) == 2 else _packed
    output = min(set(range(x.ndim)) - set(axes))
    step = max(1, PIECE * x.shape[output] // x.size)
    for first in range(0, x.shape[output], step):
        where = (*[slice(None)] * output, slice(first, first + step))
        piece = np.asarray(x[where], np.float32)
        for part, one in zip(parts, rounded(piece, axes), strict=True):
            part[where] = one
    return parts


def _stored(
    shape: tuple[int, ...], axes: tuple[int, ...], kind: str
) -> list[tuple[tuple[int, ...], np.dtype]]:
    """Shapes and dtypes of the parts: two in 8 bits, three in 4."""
    axis, size = axes[-1], shape[axes[-1]]
    before, after = shape[:axis], shape[axis + 1 :]
    if kind == "int8" or size % 2:
        scale = tuple(1 if n in axes else size for n, size in enumerate(shape))
        return [(shape, np.dtype(np.int8)), (scale, np.dtype(np.float32))]
    values, groups = (*before, size // 2, *after), (*before, size // group_size(size), *after)
    return [(values, np.dtype(np.uint8)), *[(groups, np.dtype(np.float16))] * 2]


def group_size(size: int) -> int:
    """The largest group size up to 32 that divides the input size."""
    return next(group for group in range(min(GROUP, size), 0, -1) if size % group == 0)


def _rounded(x: np.ndarray, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Integers from -127 to 127, and one scale along `axes`."""
    most = np.abs(x).max(axis=axes, keepdims=True)
    scale = np.where(most > 0, most, 1) / 127
    return np.rint(x / scale).astype(np.int8), scale.astype(np.float32)


def _packed(x: np.ndarray, axes: tuple[int, ...]) -> Grid:
    """Integers from 0 to 15, two in a byte, and the grid of each group along the last of `axes`."""
    axis, size = axes[-1], x.shape[axes[-1]]
    before, after = x.shape[:axis], x.shape[axis + 1 :]
    grouped = x.reshape(*before, -1, group_size(size), *after)
    values, scale, minimum = _nearest_grid(grouped, axis + 1)
    pairs = values.reshape(*before, size // 2, 2, *after)
    low, high = np.take(pairs, 0, axis + 1), np.take(pairs, 1, axis + 1)
    return low | (high << 4), scale.squeeze(axis + 1), minimum.squeeze(axis + 1)


def _nearest_grid(x: np.ndarray, axis: int) -> Grid:
    """For each group along `axis`, the grid with the least squared error of those that are tried.

    These are grids from the lowest value to the highest, and for each the least-squares fit to its
    integers. A group that is already on a grid, such as one from a 4-bit file, does not change.
    """
    lowest, highest = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    least = np.full_like(lowest, np.inf)
    best: Grid = (np.zeros(x.shape, np.uint8), lowest.astype("f2"), lowest.astype("f2"))
    for steps in STEPS:
        first = _on_grid(x, (highest - lowest) / steps, lowest)
        for found in (first, _on_grid(x, *_least_squares(x, first[0], axis))):
            values, scale, minimum = found
            error = np.square(values * np.float32(scale) + minimum - x).sum(axis, keepdims=True)
            for old, new in zip(best, found, strict=True):
                np.copyto(old, new, where=error < least)
            least = np.minimum(error, least)
    return best


def _on_grid(x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> Grid:
    """Integers from 0 to 15 for a grid that is first rounded to float16, as it is stored."""
    scale, minimum = scale.astype(np.float16), minimum.astype(np.float16)
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.rint((x - minimum) / divisor).clip(0, 15).astype(np.uint8), scale, minimum


def _least_squares(x: np.ndarray, values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """The scale and minimum with the least squared error for these integers."""
    mean_x, mean = x.mean(axis, keepdims=True), values.mean(axis, keepdims=True, dtype=np.float32)
    centred = values - mean
    square = np.square(centred).sum(axis, keepdims=True)
    scale = (centred * x).sum(axis, keepdims=True) / np.where(square > 0, square, 1)
    return scale, mean_x - scale * mean


def dequantize(parts: Sequence[jax.Array], axes: tuple[int, ...], dtype: Any) -> jax.Array:
    """The matrix in `dtype` from the parts that `quantize` returned."""
    wide = jnp.promote_types(dtype, jnp.float32)
    if len(parts) == 2:
        values, scale = (part.astype(wide) for part in parts)
        return (values * scale).astype(dtype)
    axis, (values, scale, minimum) = axes[-1], parts
    both = jnp.stack([values & 15, values >> 4], axis=axis + 1).astype(wide)
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    count = scale.shape[axis]
    grouped = both.reshape(*before, count, 2 * values.shape[axis] // count, *after)
    scale, minimum = (jnp.expand_dims(part.astype(wide), axis + 1) for part in (scale, minimum))
    matrix = grouped * scale + minimum
    return matrix.reshape(*before, 2 * values.shape[axis], *after).astype(dtype)


def storage(
    path: str, shape: tuple[int, ...], dtype: np.dtype, kind: str
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """The stored arrays of one layer's leaf: path -> shape and dtype."""
    axes = input_axes(path)
    if kind == "none" or not axes:
        return {path: (shape, dtype)}
    return {
        path + part: leaf for part, leaf in zip(PARTS, _stored(shape, axes, kind), strict=False)
    }


def embedding(embed: Mapping[str, jax.Array]) -> jax.Array:
    """The embedding matrix [V, D] of a weights tree's "embed"; float32 if it is quantised."""
    if "embedding" in embed:
        return embed["embedding"]
    names = [f"embedding{part}" for part in PARTS]
    return dequantize([embed[name] for name in names if name in embed], (1,), jnp.float32)
