"""A stack of identical layers: one block, scanned over weights [L, ...]."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from softprompt.models.dropout import STREAM

Gather = Callable[[str, jax.Array], jax.Array]


def stack(
    block: type[nn.Module],
    *,
    length: int,
    remat: str = "none",
    gather: Gather | None = None,
    path: str = "layers",
) -> type[nn.Module]:
    """The block's class, scanned over `length` layers.

    Args:
        block: takes the residual stream, the layer's own inputs (stacked as [L, ...] outside) and
            the inputs of all layers; returns the stream and an output that the scan stacks.
        length: L.
        remat: what the backward pass recomputes: "none" (only cheap operations: norms, activations,
            scores) or "layer" (everything but the layers' inputs).
        gather: called as `gather(path, leaf)` on each of a layer's weights when the layer is
            computed, and again in its backward pass, so that gathered weights are not stored.
            It must return the result of `jax.lax.with_sharding_constraint`.
        path: of the stack in the tree of the weights.
    """
    if gather is not None:
        block = _with_gather(block, gather, path)
    if gather is not None or remat != "none":
        block = nn.remat(block, policy=POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "delta": 0, "read": 0},
        split_rngs={"params": True, STREAM: True},
        in_axes=(0, nn.broadcast),
        length=length,
    )


def _with_gather(block: type[nn.Module], gather: Gather, path: str) -> type[nn.Module]:
    """The block with `gather` applied to its weights."""

    def gather_leaf(inner: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return gather("/".join([path, *(part.key for part in inner)]), leaf)

    def gather_tree(variables: Mapping[str, Any]) -> dict[str, Any]:
        walk = jax.tree_util.tree_map_with_path
        return {name: walk(gather_leaf, tree) for name, tree in variables.items()}

    return nn.map_variables(block, "params", gather_tree)


# The checkpoint policies. "none" stores everything except gathered weights.
POLICIES: dict[str, Any] = {
    "none": lambda primitive, *_, **__: primitive.name != "sharding_constraint",
    "layer": None,
}
