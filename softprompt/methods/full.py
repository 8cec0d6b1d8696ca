"""Full fine-tuning: the delta is the weights themselves, and the frozen tree is empty.

Embeddings, norms and the head are trained with the rest. The delta is float32 whatever the model
computes in, so that small updates are not lost.
"""

from typing import Any

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.models import Model


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


def merge(delta: dict[str, Any], weights: Any, cfg: None) -> dict[str, Any]:
    """The weights of a model that computes alone what base model and delta do: the delta."""
    return delta
