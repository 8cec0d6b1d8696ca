"""How a kernel gets many rows: those that `jax.vmap` adds, and those of each device of a mesh."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import Mesh, PartitionSpec

Function = Callable[..., Any]


def over_rows(function: Function) -> Function:
    """A function of rows, the first axis of its arrays, as one of a single row.

    What `jax.vmap` adds, once or several times, becomes rows; an array that it leaves out is
    repeated.
    """

    @custom_vmap
    def of_rows(*arrays: jax.Array) -> Any:
        return function(*arrays)

    @of_rows.def_vmap
    def more_rows(size: int, batched: Sequence[bool], *arrays: jax.Array) -> Any:
        whole = [
            array if given else jnp.broadcast_to(array, (size, *array.shape))
            for array, given in zip(arrays, batched, strict=True)
        ]
        made = of_rows(*(array.reshape(-1, *array.shape[2:]) for array in whole))
        made = jax.tree.map(lambda array: array.reshape(size, -1, *array.shape[1:]), made)
        return made, jax.tree.map(lambda _: True, made)

    return lambda *row: jax.tree.map(lambda a: a[0], of_rows(*(array[None] for array in row)))


def on_shards(mesh: Mesh | None, function: Function, reads: str, writes: str) -> Function:
    """A function of rows that each device of a mesh calls with its own rows and heads.

    `reads` and `writes` name the axes of what it takes and returns: R is split over "data", H and G
    over "model", where it divides them.
    """
    if mesh is None:
        return function

    def call(*arrays: jax.Array) -> Any:
        # Inside a step that each device runs on rows of its own "data" is taken already.
        around = jax.sharding.get_abstract_mesh()
        taken = set(around.manual_axes)
        lengths = [n for array in arrays for n in array.shape]
        sizes = dict(zip(reads.replace(" ", ""), lengths, strict=True))
        over = {"R": "data", "H": "model", "G": "model"}
        for axes in ("R", "HG"):
            name = over[axes[0]]
            if name in taken or any(sizes[axis] % mesh.shape[name] for axis in axes):
                over = {axis: other for axis, other in over.items() if axis not in axes}
        specs = [
            tuple(PartitionSpec(*map(over.get, axes)) for axes in side.split())
            for side in (reads, writes)
        ]
        spread = jax.shard_map(
            function,
            mesh=around if taken else mesh,
            in_specs=specs[0],
            out_specs=specs[1],
            axis_names=set(mesh.axis_names) - taken,
            check_vma=False,
        )
        return spread(*arrays)

    return call
