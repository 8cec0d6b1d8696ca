"""BitFit: trains all biases, and nothing else.

The delta is added to the biases: "layers/attn/q/bias" [L, H, K]. Projections and norms without a
bias get one that starts at zero. Embeddings, position tables and the head have no biases in any
supported family, and get none.

Source: Ben Zaken et al. 2022 (arXiv 2106.10199).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from softprompt.methods.base import MethodSettings, as_stored, no_configuration, unchanged
from softprompt.methods.projections import delta_dtype, norms, projections
from softprompt.models import Model

resolve, variables, fold = no_configuration, as_stored, unchanged


@dataclasses.dataclass(frozen=True)
class Settings(MethodSettings):
    """Every bias, and nothing else."""

    name = "bitfit"


def init(key: jax.Array, model: Model, weights: Any, cfg: None) -> dict[str, Any]:
    """Returns zeros."""
    shapes = {site.path: (site.layers, *site.outputs) for site in projections(model)}
    shapes |= norms(model)
    dtype = delta_dtype(weights)
    return unflatten_dict(
        {f"{path}/bias": jnp.zeros(shape, dtype) for path, shape in shapes.items()}, sep="/"
    )
