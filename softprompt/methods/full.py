"""Full fine-tuning: the delta is the weights themselves, and the frozen tree is empty.

Embeddings, norms and the head are trained with the rest. The delta is float32 whatever the model
computes in, so that small updates are not lost.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.methods.base import MethodSettings, Setup
from softprompt.models import Model


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """All weights of the model."""

    name = "full"
    trains_weights = True


def resolve(settings: Settings, setup: Setup) -> None:
    """Nothing is configured."""


def init(key: jax.Array, model: Model, weights: Any, cfg: None) -> dict[str, Any]:
    """Returns a copy of the weights in float32 (float64 where they are).

    Raises:
        UserError: quantised weights, which have no gradient.
    """
    leaves = jax.tree.leaves(weights)
    if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves):
        raise UserError("config key 'method.name' is 'full'; allowed: with model.quantize=none")

    def copy(leaf: jax.Array) -> jax.Array:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    return jax.tree.map(copy, weights)


def variables(delta: dict[str, Any], weights: Any, cfg: None, task_ids: Any) -> dict[str, Any]:
    """The weights, which stand in for frozen ones of the same names."""
    return {"params": delta}


def fold(delta: dict[str, Any], cfg: None) -> dict[str, Any]:
    """Returns the delta as it is."""
    return delta


def merge(delta: dict[str, Any], weights: dict[str, Any], cfg: None) -> dict[str, Any]:
    """The trained weights, which take the place of the model's."""
    return delta
