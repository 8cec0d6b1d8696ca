"""A stack of equal layers: one block, scanned over weights [L, ...]."""

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
        block: takes the residual stream, what differs from layer to layer ([L, ...] outside) and
            what all layers share; returns the stream and what is stacked.
        length: L.
        remat: what the backward pass computes again: "none" (what is cheap: norms, activations,
            scores) or "layer" (everything but the layers' inputs).
        gather: called as `gather(path, leaf)` on each of a layer's weights where the layer is
            computed, and again for its backward pass, so that gathered weights are never kept:
            what it returns must come from `jax.lax.with_sharding_constraint`.
        path: of the stack in the tree of the weights.
    """
    if gather is not None:
        block = _gathering(block, gather, path)
    if gather is not None or remat != "none":
        block = nn.remat(block, policy=POLICIES[remat], prevent_cse=False)
    return nn.scan(
        block,
        variable_axes={"params": 0, "delta": 0, "read": 0},
        split_rngs={"params": True, STREAM: True},
        in_axes=(0, nn.broadcast),
        length=length,
    )


def _gathering(block: type[nn.Module], gather: Gather, path: str) -> type[nn.Module]:
    """The block, reading its weights through `gather`."""

    def one(inner: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return gather("/".join([path, *(part.key for part in inner)]), leaf)

    def all_of(variables: Mapping[str, Any]) -> dict[str, Any]:
        return {k: jax.tree_util.tree_map_with_path(one, tree) for k, tree in variables.items()}

    return nn.map_variables(block, "params", all_of)


def _keep(primitive: Any, *_: Any, **__: Any) -> bool:
    """What a backward pass finds ready made: everything but gathered weights."""
    return primitive.name != "sharding_constraint"


POLICIES: dict[str, Any] = {
    "none": _keep,
    "layer": None,
}
