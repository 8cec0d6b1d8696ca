"""No method: the base model, zero-shot."""

import dataclasses
from typing import Any

import jax

from softprompt.methods.base import MethodSettings, Setup, bos_setting
from softprompt.models import Model


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """The base model, zero-shot."""

    name = "none"
    trains = False

    bos: str = bos_setting("after", "before", "none")

    def label(self) -> str:
        """The name in tables."""
        return "zero-shot"


def resolve(settings: Settings, setup: Setup) -> None:
    """Returns None: there is no configuration."""


def init(key: jax.Array, model: Model, weights: Any, cfg: None) -> dict[str, jax.Array]:
    """Returns an empty delta."""
    return {}


def variables(delta: Any, weights: Any, cfg: None, task_ids: jax.Array | None) -> Any:
    """Returns no variables."""
    return {}


def fold(delta: Any, cfg: None) -> Any:
    """Returns the delta unchanged."""
    return delta
