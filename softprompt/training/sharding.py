"""Shardings on a `(data, model)` mesh: one table of rules, which must cover every frozen leaf.

The axes of weights that "model" does not split are replicated over "data", or sharded over it too
(`config.mesh.weights` "sharded": ZeRO-3, or FSDP). Sharded weights of a layer are gathered when the
layer is computed, forward and backward, and then freed.

Source: arXiv 1909.08053 (heads and ffn over devices), arXiv 1910.02054 (ZeRO).
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from softprompt.errors import UserError

_STACK = r"((encoder|decoder)/)?"  # of a T5's layers; a decoder has one stack
_ATTENTION = _STACK + r"layers/(attn|cross)"
_NORMS = r"(layers/((attn|cross|mlp)(_post)?_norm|attn/[qk]_norm)|final_norm)/(scale|bias)"
# The first match applies. An axis whose size the mesh does not divide is replicated instead.
WEIGHT_RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("model", None)),
    (r"head/kernel", P(None, "model")),
    (_ATTENTION + r"/[qkv]/kernel", P(None, None, "model", None)),
    (_ATTENTION + r"/o/kernel", P(None, "model", None, None)),
    (_ATTENTION + r"/[qkv]/bias", P(None, "model", None)),
    (_STACK + r"layers/mlp/(gate|up)/kernel", P(None, None, "model")),
    (_STACK + r"layers/mlp/(gate|up)/bias", P(None, "model")),
    (_STACK + r"layers/mlp/down/kernel", P(None, "model", None)),
    (_STACK + r"layers/(attn/o|mlp/down)/bias", P()),
    (_STACK + _NORMS, P()),
    (r"positions/embedding|project_(in|out)/kernel", P()),
    (_STACK + r"relative_bias/embedding", P(None, "model")),
    (_STACK + r"layers/relative_bias/embedding", P(None, None, "model")),
)


# Leaves that are too small to gather: they are always replicated over "data".
SMALL = ("scale", "_min", "/bias", "/relative_bias/embedding")

QUANTIZED = "(_q|_scale|_min)?"  # the leaves of a quantised matrix are sharded like the matrix


def make_mesh(
    data: int = -1, model: int = 1, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        data: devices along which rows are split; -1 is all devices / `model`.
        model: devices along which heads, ffn and vocabulary are split.
        devices: use these instead of all devices.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    count = len(jax.devices() if devices is None else devices)
    if model < 1 or count % model:
        raise UserError(
            f"config key 'mesh.model' is {model}; allowed: a positive divisor of {count}, the "
            "number of devices"
        )
    size = count // model if data == -1 else data
    if size * model != count:
        raise UserError(
            f"config key 'mesh.data' is {data}; allowed: -1, or {count // model} "
            f"({count} devices / mesh.model={model})"
        )
    axis_types = (AxisType.Auto,) * 2
    return jax.make_mesh((size, model), ("data", "model"), axis_types=axis_types, devices=devices)


def nearest_sizes(data: int, model: int, *, count: int) -> tuple[int, int]:
    """The sizes of a mesh, changed if they do not fit `count` devices.

    Then `model` becomes its greatest common divisor with `count`, and `data` the rest (-1).
    """
    if count % model == 0 and data in (-1, count // model):
        return data, model
    return -1, math.gcd(model, count)


def path_name(path: tuple[Any, ...]) -> str:
    """A tree path as "layers/attn/q/kernel"."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def weight_spec(
    path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, *, weights: str = "replicated"
) -> P:
    """The `PartitionSpec` of one frozen leaf: its rule, without the axes that do not divide.

    Args:
        path: as in "layers/attn/q/kernel".
        shape: the leaf's global shape, stacked layers first.
        mesh: only its sizes matter.
        weights: "sharded" also splits a layer's matrix over "data", along the longest divisible
            axis that its rule does not split. If there is none, the matrix is replicated.

    Raises:
        UserError: no rule covers the path.
    """
    for pattern, spec in WEIGHT_RULES:
        if re.fullmatch(pattern + QUANTIZED, path):
            pairs = zip(spec, shape, strict=False)
            axes = [a if a and n % mesh.shape[a] == 0 else None for a, n in pairs]
            return P(*(_over_data(path, shape, axes, mesh) if weights == "sharded" else axes))
    raise UserError(f"no sharding rule covers the weight {path!r} of shape {list(shape)}")


def _over_data(
    path: str, shape: tuple[int, ...], axes: list[str | None], mesh: Mesh | AbstractMesh
) -> list[str | None]:
    """Assigns "data" to the longest unsplit axis that divides.

    The axis of stacked layers is excluded. A scan reads one layer after another, so all devices
    would wait for the device that has the next layer, or gather the whole stack.
    """
    if "layers/" not in path or path.endswith(SMALL):
        return axes
    axes = axes + [None] * (len(shape) - len(axes))
    free = [n for n in range(1, len(shape)) if axes[n] is None]
    free = [n for n in free if shape[n] % mesh.shape["data"] == 0]
    if free:
        axes[max(free, key=lambda n: shape[n])] = "data"
    return axes


@dataclasses.dataclass(frozen=True)
class Gather:
    """Gathers the weights of one layer from their shards over "data"; called by models."""

    mesh: Mesh

    def __call__(self, path: str, leaf: jax.Array) -> jax.Array:
        """A leaf of one layer, sharded by its rule alone.

        It is first constrained to its shards. Otherwise XLA gathers before it slices the layer out
        of the stack, and keeps a copy of the whole stack in another layout.
        """
        for weights in ("sharded", "replicated"):
            spec = weight_spec(path, (1, *leaf.shape), self.mesh, weights=weights)
            sharding = NamedSharding(self.mesh, P(*spec[1:]))
            leaf = jax.lax.with_sharding_constraint(leaf, sharding)
        return leaf


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Shards a host array, of which every process has a full copy."""
    if jax.process_count() == 1:
        return jax.device_put(array, sharding)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_weight(
    mesh: Mesh, path: str, array: np.ndarray, *, weights: str = "replicated"
) -> jax.Array:
    """Shards one frozen leaf; `weights` is `config.mesh.weights`."""
    return put(array, NamedSharding(mesh, weight_spec(path, array.shape, mesh, weights=weights)))


def weight_shardings(tree: Any, mesh: Mesh, *, weights: str = "replicated") -> Any:
    """The shardings of a tree of frozen weights (arrays or shapes)."""

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, weight_spec(path_name(path), leaf.shape, mesh, weights=weights))

    return jax.tree_util.tree_map_with_path(one, tree)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of delta, optimizer state and metrics: a full copy on every device."""
    return NamedSharding(mesh, P())


def random_key(seed: int, mesh: Mesh) -> jax.Array:
    """A random key, replicated on every device of every process."""
    return jax.jit(jax.random.key, out_shardings=replicated(mesh))(np.uint32(seed))


def by_row(mesh: Mesh) -> NamedSharding:
    """The sharding of batches: rows, the first axis, are split over "data"."""
    return NamedSharding(mesh, P("data"))


def by_device(mesh: Mesh) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A transformation of functions of (delta, weights, batch, dropout) that sum over rows.

    Each device along "data" applies the function to its own rows, context included, and the results
    are summed at the end: one all-reduce of the delta's size. Without this, XLA sums the cotangents
    of the context's keys and values over devices in every layer. Only the batch may be split over
    "data".
    """

    def per_device(function: Callable[..., Any]) -> Callable[..., Any]:
        def summed(*arguments: Any) -> Any:
            return jax.lax.psum(function(*arguments), "data")

        return jax.shard_map(
            summed,
            mesh=mesh,
            in_specs=(P(), P(), P("data"), P()),
            out_specs=P(),
            axis_names={"data"},
            check_vma=False,
        )

    return per_device


def split_over_data(tree: Any) -> bool:
    """Whether an array of the tree, or a shape with a sharding, is split over "data"."""
    specs = [getattr(getattr(x, "sharding", None), "spec", ()) for x in jax.tree.leaves(tree)]
    return any(
        "data" in (axis if isinstance(axis, tuple) else (axis,)) for s in specs for axis in s
    )


Batch = TypeVar("Batch")


def put_batch(mesh: Mesh, batch: Batch) -> Batch:
    """Splits a batch, a tree of arrays [R, ...], over the mesh's data axis, which divides R.

    Every process prepares the same batch and puts only its own rows on its devices, so a step's
    input depends neither on devices nor on hosts.
    """
    sharded: Batch = jax.tree.map(lambda array: put(array, by_row(mesh)), batch)
    return sharded
