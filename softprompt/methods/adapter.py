"""Bottleneck adapters in every layer: y + up(gelu(down(y))) on what a sublayer adds.

The delta: "layers/mlp_adapter/down" [L, D, Z], "down_bias" [L, Z], "up" [L, Z, D], "up_bias"
[L, D]. "houlsby" has one after attention (self- and cross-) and one after the feed-forward
(arXiv 1902.00751, section 2.1); "pfeiffer" has the latter only (arXiv 2005.00247).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from softprompt.methods.base import MethodSettings, Setup
from softprompt.methods.sites import delta_dtype, keys_by_path, projections
from softprompt.models import Model
from softprompt.settings import setting

SPREAD = 0.01  # standard deviation of the first "down" (arXiv 1902.00751, section 3.6)


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """Bottleneck networks in every layer."""

    name = "adapter"
    multiplies_tokens = True

    bottleneck: int = setting(64, "width of the hidden layer", low=1)
    placement: str = setting(
        "houlsby",
        "houlsby (behind attention and behind the feed-forward) or pfeiffer (the latter only)",
        choices=("houlsby", "pfeiffer"),
    )

    def label(self) -> str:
        """Where it stands and its width."""
        return f"{self.placement}-{self.bottleneck}"


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """`bottleneck`: Z. `placement`: "houlsby" or "pfeiffer"."""

    bottleneck: int
    placement: str = "houlsby"


def resolve(settings: Settings, setup: Setup) -> AdapterConfig:
    """The static configuration for a trial."""
    return AdapterConfig(settings.bottleneck, settings.placement)


def init(key: jax.Array, model: Model, weights: Any, cfg: AdapterConfig) -> dict[str, Any]:
    """Returns adapters that change nothing yet: "up" and the biases are zero."""
    sublayers = {site.path.rsplit("/", 1)[0]: site.layers for site in projections(model)}
    if cfg.placement == "pfeiffer":
        sublayers = {path: n for path, n in sublayers.items() if path.endswith("/mlp")}
    width, size, dtype = model.config.width, cfg.bottleneck, delta_dtype(weights)
    leaves: dict[str, jax.Array] = {}
    for path, one in keys_by_path(key, sublayers).items():
        layers = sublayers[path]
        leaves |= {
            f"{path}_adapter/down": SPREAD * jax.random.normal(one, (layers, width, size), dtype),
            f"{path}_adapter/down_bias": jnp.zeros((layers, size), dtype),
            f"{path}_adapter/up": jnp.zeros((layers, size, width), dtype),
            f"{path}_adapter/up_bias": jnp.zeros((layers, width), dtype),
        }
    return unflatten_dict(leaves, sep="/")


def variables(
    delta: dict[str, Any], weights: Any, cfg: AdapterConfig, task_ids: jax.Array | None
) -> dict[str, Any]:
    """The adapters, where the layers read them."""
    return delta


def fold(delta: dict[str, Any], cfg: AdapterConfig) -> dict[str, Any]:
    """Returns the delta as it is."""
    return delta
