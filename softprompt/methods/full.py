"""Full fine-tuning: the delta is the model's weights, and the frozen tree is empty.

All weights are trained, embeddings, norms and the head included. The delta is float32 even if the
model computes in bfloat16, so that small updates are not rounded away.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.methods.base import MethodSettings, no_configuration, unchanged
from softprompt.models import Model

resolve, fold = no_configuration, unchanged


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """All weights of the model."""

    name = "full"
    trains_weights = True


def init(key: jax.Array, model: Model, weights: Any, cfg: None) -> dict[str, Any]:
    """Returns a copy of the weights in float32 (float64 for float64 weights).

    Raises:
        UserError: the weights are quantised and have no gradient.
    """
    leaves = jax.tree.leaves(weights)
    if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in leaves):
        raise UserError("config key 'method.name' is 'full'; allowed: with model.quantize=none")

    def copy(leaf: jax.Array) -> jax.Array:
        return jnp.array(leaf, jnp.promote_types(leaf.dtype, jnp.float32), copy=True)

    return jax.tree.map(copy, weights)


def variables(delta: dict[str, Any], weights: Any, cfg: None, task_ids: Any) -> dict[str, Any]:
    """The trained weights, which replace the frozen weights of the same names."""
    return {"params": delta}


def merge(delta: dict[str, Any], weights: dict[str, Any], cfg: None) -> dict[str, Any]:
    """The trained weights."""
    return delta
