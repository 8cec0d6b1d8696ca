"""The projections and norms of a model, which methods change, with their paths and sizes."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.errors import UserError, nearest
from softprompt.models import Model
from softprompt.models.quantize import input_axes
from softprompt.models.shapes import leaf_shapes


@dataclasses.dataclass(frozen=True)
class Projection:
    """A projection of a stack of layers.

    Attributes:
        path: of its module, such as "layers/attn/q".
        layers: L.
        inputs: the sizes of its input axes.
        outputs: the sizes of its output axes.
    """

    path: str
    layers: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    @property
    def name(self) -> str:
        """The last part of the path, such as "q"."""
        return self.path.rsplit("/", 1)[-1]


def projections(model: Model) -> list[Projection]:
    """All projections in the layers, sorted by path."""
    sites = []
    for path, shape in sorted(leaf_shapes(model.config).items()):
        if path.endswith("/kernel") and "layers/" in path:
            inputs = len(input_axes(path))
            sites.append(
                Projection(
                    path[: -len("/kernel")], shape[0], shape[1 : 1 + inputs], shape[1 + inputs :]
                )
            )
    return sites


def norms(model: Model) -> dict[str, tuple[int, ...]]:
    """The path of every norm -> the shape of its scale; stacked layers are the first axis."""
    shapes = leaf_shapes(model.config)
    return {
        path[: -len("/scale")]: shape for path, shape in shapes.items() if path.endswith("/scale")
    }


def delta_dtype(weights: Any) -> jnp.dtype:
    """The dtype of a delta: float32, or float64 for float64 weights."""
    dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(weights)}
    floats = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return functools.reduce(jnp.promote_types, floats, jnp.dtype("float32"))


def targeted(model: Model, names: Sequence[str], *, more: Iterable[str] = ()) -> list[Projection]:
    """The projections with these names, such as "q" and "down", in all layers.

    `more` are names that are allowed besides those of projections.

    Raises:
        UserError: the model lacks a name.
    """
    sites = projections(model)
    known = list(dict.fromkeys([site.name for site in sites] + list(more)))
    for name in names:
        if name not in known:
            raise UserError(
                f"config key 'method.targets' names {name!r}{nearest(name, known)}; this model "
                f"has: {', '.join(known)}"
            )
    return [site for site in sites if site.name in names]


def names(text: str) -> tuple[str, ...]:
    """The names in a list such as "q, v"."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def keys_by_path(key: jax.Array, paths: Iterable[str]) -> dict[str, jax.Array]:
    """A random key for each path."""
    paths = sorted(paths)
    return dict(zip(paths, jax.random.split(key, max(1, len(paths))), strict=False))
