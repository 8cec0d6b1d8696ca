"""Calls of a kernel on many rows: the rows of `jax.vmap`, split over the devices of a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

Function = Callable[..., Any]


def over_rows(function: Function) -> Function:
    """Turns a function of arrays [R, ...] into a function of one row's arrays.

    The axes that `jax.vmap` adds, once or several times, become the axis R. An array without such
    an axis is repeated.
    """

    @custom_vmap
    def of_rows(*arrays: jax.Array) -> Any:
        return function(*arrays)

    @of_rows.def_vmap
    def more_rows(size: int, batched: Sequence[bool], *arrays: jax.Array) -> Any:
        full = [
            array if has_axis else jnp.broadcast_to(array, (size, *array.shape))
            for array, has_axis in zip(arrays, batched, strict=True)
        ]
        outputs = of_rows(*(array.reshape(-1, *array.shape[2:]) for array in full))
        outputs = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return lambda *row: jax.tree.map(lambda a: a[0], of_rows(*(array[None] for array in row)))


def on_shards(mesh: Mesh | None, function: Function, reads: str, writes: str) -> Function:
    """A function of rows that each device of a mesh calls on its own rows and heads.

    `reads` and `writes` name the axes of the arguments and results. R is split over the mesh axis
    "data", H and G over "model", if the sizes are divisible.
    """
    if mesh is None:
        return function

    def call(*arrays: jax.Array) -> Any:
        # Inside a `shard_map` of the step, "data" is a manual axis already.
        outer = jax.sharding.get_abstract_mesh()
        manual = set(outer.manual_axes)
        lengths = [n for array in arrays for n in array.shape]
        sizes = dict(zip(reads.replace(" ", ""), lengths, strict=True))
        over = {"R": "data", "H": "model", "G": "model"}
        for axes in ("R", "HG"):
            name = over[axes[0]]
            if name in manual or any(sizes[axis] % mesh.shape[name] for axis in axes):
                over = {axis: other for axis, other in over.items() if axis not in axes}
        specs = [
            tuple(PartitionSpec(*map(over.get, axes)) for axes in side.split())
            for side in (reads, writes)
        ]
        sharded = jax.shard_map(
            function,
            mesh=outer if manual else mesh,
            in_specs=specs[0],
            out_specs=specs[1],
            axis_names=set(mesh.axis_names) - manual,
            check_vma=False,
        )
        return sharded(*arrays)

    return call
