"""DoRA: LoRA with a trained magnitude for each column of a projection's matrix.

x W' + bias with W' = magnitude * (W + scale A B) / ||W + scale A B||, where the norm is of each
column (over the inputs of one output). The delta is LoRA's and a "magnitude" [L, out...] for each
projection: "layers/attn/q/magnitude". The norm has no gradient, so that no residual has the shape
of a weight. Dropout is LoRA's; PEFT also applies it to the frozen product that the magnitudes
multiply.

Source: Liu et al. 2024 (arXiv 2402.09353), equation 5; section 4.3 for the constant norm.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.methods import lora
from softprompt.methods.lora import LoraConfig
from softprompt.models import Model
from softprompt.models.quantize import PARTS, dequantize, input_axes

PEFT = {"peft_type": "LORA", "use_dora": True}
PEFT_VECTORS = {"magnitude": "lora_magnitude_vector"}
TINY = 1e-30  # the smallest square of a column's norm, against a division by zero

resolve, fold = lora.resolve, lora.fold


@dataclasses.dataclass(frozen=True)
class Settings(lora.Settings):
    """A low-rank change of chosen projections, and the magnitudes of their columns."""

    name = "dora"


def init(key: jax.Array, model: Model, weights: Any, cfg: LoraConfig) -> dict[str, Any]:
    """Returns the factors of `lora.init`, and the norms of the columns as magnitudes.

    Raises:
        UserError: see `lora.init`.
    """
    delta = lora.init(key, model, weights, cfg)
    norms = column_norms(delta, weights, cfg)
    magnitudes = {f"{path}/magnitude": norm for path, norm in norms.items()}
    return unflatten_dict(flatten_dict(delta, sep="/") | magnitudes, sep="/")


def variables(
    delta: dict[str, Any], weights: Any, cfg: LoraConfig, task_ids: jax.Array | None
) -> dict[str, Any]:
    """LoRA's factors, and each magnitude divided by its column's norm."""
    leaves = flatten_dict(lora.variables(delta, weights, cfg, task_ids), sep="/")
    return unflatten_dict(leaves | _scales(delta, weights, cfg), sep="/")


def _scales(delta: dict[str, Any], weights: Any, cfg: LoraConfig) -> dict[str, jax.Array]:
    """The path of each variable "output_scale" -> the factors of the projection's columns."""
    leaves = flatten_dict(delta, sep="/")
    norms = column_norms(jax.lax.stop_gradient(delta), weights, cfg)
    return {
        f"{path}/output_scale": leaves[f"{path}/magnitude"] / norm for path, norm in norms.items()
    }


def column_norms(delta: dict[str, Any], weights: Any, cfg: LoraConfig) -> dict[str, jax.Array]:
    """The path of each changed projection -> its columns' norms [L, out...]."""
    frozen = flatten_dict(weights, sep="/")
    found = {}
    for path, (a, b) in lora.factors(delta).items():
        names = [f"{path}/kernel{part}" for part in ("", *PARTS)]
        parts = [frozen[name] for name in names if name in frozen]
        one = functools.partial(_layer_norms, input_axes(names[0]), cfg.scale)
        found[path] = jax.lax.map(one, (parts, a, b))  # one layer's matrix at a time
    return found


def _layer_norms(
    axes: tuple[int, ...], scale: float, layer: tuple[list[jax.Array], jax.Array, jax.Array]
) -> jax.Array:
    """The norms [out...] of one layer, from the expanded square ||W + scale A B||^2."""
    parts, a, b = layer
    kernel = dequantize(parts, axes, a.dtype) if len(parts) > 1 else parts[0].astype(a.dtype)
    a_IZ, b_ZO = a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1)
    w_IO = kernel.reshape(len(a_IZ), -1)
    cross_O = jnp.sum((a_IZ.T @ w_IO) * b_ZO, axis=0)
    square_O = jnp.sum((a_IZ.T @ a_IZ @ b_ZO) * b_ZO, axis=0)
    square_O = jnp.sum(w_IO * w_IO, axis=0) + 2 * scale * cross_O + scale**2 * square_O
    return jnp.sqrt(jnp.maximum(square_O, TINY)).reshape(kernel.shape[len(axes) :])


def merge(delta: dict[str, Any], weights: dict[str, Any], cfg: LoraConfig) -> dict[str, Any]:
    """A copy of the weights with the changes added and the columns rescaled.

    Raises:
        UserError: see `lora.merge`.
    """
    merged = flatten_dict(lora.merge(delta, weights, cfg), sep="/")
    for path, scale in _scales(delta, weights, cfg).items():
        name = path.replace("/output_scale", "/kernel")
        inputs = tuple(range(1, 1 + merged[name].ndim - scale.ndim))
        merged[name] = (merged[name] * jnp.expand_dims(scale, inputs)).astype(merged[name].dtype)
    return unflatten_dict(merged, sep="/")
