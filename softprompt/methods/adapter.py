"""Bottleneck adapters in every layer: y + up(gelu(down(y))) of a sublayer's output y.

The delta: "layers/mlp_adapter/down" [L, D, Z], "down_bias" [L, Z], "up" [L, Z, D], "up_bias"
[L, D]. "houlsby" has one after attention (self- and cross-) and one after the feed-forward (arXiv
1902.00751, section 2.1); "pfeiffer" has only the latter (arXiv 2005.00247).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from softprompt.methods.base import MethodSettings, Setup, as_stored, unchanged
from softprompt.methods.projections import delta_dtype, keys_by_path, projections
from softprompt.models import Model
from softprompt.settings import setting

STDDEV = 0.01  # of the initial "down" (arXiv 1902.00751, section 3.6)

variables, fold = as_stored, unchanged


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """Bottleneck networks in every layer."""

    name = "adapter"
    multiplies_tokens = True

    bottleneck: int = setting(64, "width of the hidden layer", low=1)
    placement: str = setting(
        "houlsby",
        "where networks are added: houlsby (after attention and after the feed-forward) or "
        "pfeiffer (after the feed-forward)",
        choices=("houlsby", "pfeiffer"),
    )

    def label(self) -> str:
        """The placement and the bottleneck's width."""
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
    """Returns adapters that compute the identity: "up" and the biases are zero."""
    sublayers = {site.path.rsplit("/", 1)[0]: site.layers for site in projections(model)}
    if cfg.placement == "pfeiffer":
        sublayers = {path: n for path, n in sublayers.items() if path.endswith("/mlp")}
    width, size, dtype = model.config.width, cfg.bottleneck, delta_dtype(weights)
    leaves: dict[str, jax.Array] = {}
    for path, path_key in keys_by_path(key, sublayers).items():
        layers = sublayers[path]
        down = STDDEV * jax.random.normal(path_key, (layers, width, size), dtype)
        leaves |= {
            f"{path}_adapter/down": down,
            f"{path}_adapter/down_bias": jnp.zeros((layers, size), dtype),
            f"{path}_adapter/up": jnp.zeros((layers, size, width), dtype),
            f"{path}_adapter/up_bias": jnp.zeros((layers, width), dtype),
        }
    return unflatten_dict(leaves, sep="/")
