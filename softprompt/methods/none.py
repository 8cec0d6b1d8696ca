"""No delta: the plain base model, zero-shot or behind few-shot examples."""

from typing import Any

import jax

from softprompt.models import Model


def init(key: jax.Array, model: Model, weights: Any, cfg: None) -> dict[str, jax.Array]:
    """Returns an empty delta."""
    return {}


def variables(delta: Any, weights: Any, cfg: None, task_ids: jax.Array | None) -> Any:
    """Returns no variables."""
    return {}


def fold(delta: Any, cfg: None) -> Any:
    """Returns the delta as it is."""
    return delta
