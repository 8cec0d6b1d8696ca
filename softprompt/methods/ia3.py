"""IA3: learned factors of activations in attention and feed-forward.

The factors multiply the output of each target projection, but the input of "down":
"layers/attn/k/ia3" [L, G, K], "layers/mlp/down/ia3" [L, F].

Source: Liu et al. 2022 (arXiv 2205.05638), section 3.3, whose targets are k, v and down.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from softprompt.methods.base import MethodSettings, Setup, as_stored, unchanged
from softprompt.methods.projections import delta_dtype, names, targeted
from softprompt.models import Model
from softprompt.settings import setting

variables, fold = as_stored, unchanged


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """Learned factors of activations in attention and feed-forward."""

    name = "ia3"
    may_leave_out = True

    targets: str = setting("", 'projections to change; "" is k,v,down')


PEFT = {"peft_type": "IA3"}


@dataclasses.dataclass(frozen=True)
class Ia3Config:
    """`targets`: names of projections."""

    targets: tuple[str, ...] = ("k", "v", "down")


def resolve(settings: Settings, setup: Setup) -> Ia3Config:
    """The static configuration for a trial."""
    return Ia3Config(names(settings.targets) or Ia3Config.targets)


def init(key: jax.Array, model: Model, weights: Any, cfg: Ia3Config) -> dict[str, Any]:
    """Returns factors that are all 1.

    Raises:
        UserError: the model lacks a target.
    """
    shapes = {
        f"{site.path}/ia3": (site.layers, *(site.inputs if site.name == "down" else site.outputs))
        for site in targeted(model, cfg.targets)
    }
    return unflatten_dict(
        {path: jnp.ones(shape, delta_dtype(weights)) for path, shape in shapes.items()}, sep="/"
    )
