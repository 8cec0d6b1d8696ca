"""No method: the base model, zero-shot."""

import dataclasses
from typing import Any

import jax

from softprompt.methods.base import MethodSettings, bos_setting, no_configuration, unchanged
from softprompt.models import Model

resolve, fold = no_configuration, unchanged


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """The base model, zero-shot."""

    name = "none"
    trains = False

    bos: str = bos_setting("after", "before", "none")

    def label(self) -> str:
        """The name in tables."""
        return "zero-shot"


def init(key: jax.Array, model: Model, weights: Any, cfg: None) -> dict[str, jax.Array]:
    """Returns an empty delta."""
    return {}


def variables(delta: Any, weights: Any, cfg: None, task_ids: jax.Array | None) -> Any:
    """Returns no variables."""
    return {}
