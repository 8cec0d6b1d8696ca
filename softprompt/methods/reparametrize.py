"""Reparametrisations of a prompt: small networks that compute it during training only.

"residual": P + norm(up(relu(down(P)))), one network for all rows; "residual_rows": one for each
row. The norm's scale starts at zero, so that the prompt starts as its initialiser's.
Source: Razdaibiedina et al. 2023 (arXiv 2305.03937), section 3.

"mlp": the prompt is the output of three layers on the rows.
Source: Liu et al. 2021 (arXiv 2103.10385), section 3.2, without the LSTM.
"""

from typing import Any

import jax
import jax.numpy as jnp

EPSILON = 1e-5


def init(key: jax.Array, prompt_PD: jax.Array, *, kind: str, bottleneck: int) -> dict[str, Any]:
    """The networks' initial values by kind.

    Args:
        key: a random key.
        prompt_PD: the rows.
        kind: `method.reparam`: residual, residual_rows or mlp.
        bottleneck: Z, the width of the hidden layers.
    """
    length, width = prompt_PD.shape
    dtype = prompt_PD.dtype
    if kind == "mlp":
        sizes = [(width, bottleneck), (bottleneck, bottleneck), (bottleneck, width)]
        keys = jax.random.split(key, len(sizes))
        layers = {
            f"w{n}": _kernel(k, s, dtype) for n, (k, s) in enumerate(zip(keys, sizes, strict=True))
        }
        return layers | {f"b{n}": jnp.zeros(size[1], dtype) for n, size in enumerate(sizes)}
    rows = (length,) if kind == "residual_rows" else ()
    down, up = jax.random.split(key)
    return {
        "down": _kernel(down, (*rows, width, bottleneck), dtype),
        "up": _kernel(up, (*rows, bottleneck, width), dtype),
        "scale": jnp.zeros((*rows, width), dtype),
        "bias": jnp.zeros((*rows, width), dtype),
    }


def _kernel(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * shape[-2] ** -0.5


def apply(prompt_PD: jax.Array, net: dict[str, jax.Array]) -> jax.Array:
    """The prompt [P, D] that the networks compute from the rows."""
    if "w0" in net:
        x = prompt_PD
        for n in range(3):
            x = (jax.nn.relu(x) if n else x) @ net[f"w{n}"] + net[f"b{n}"]
        return x
    row = "p" if net["down"].ndim == 3 else ""  # a network for each row, or one for all
    low_PZ = jax.nn.relu(jnp.einsum(f"pd,{row}dz->pz", prompt_PD, net["down"]))
    x_PD = jnp.einsum(f"pz,{row}zd->pd", low_PZ, net["up"])
    x_PD = x_PD - x_PD.mean(axis=-1, keepdims=True)
    x_PD = x_PD * jax.lax.rsqrt(jnp.square(x_PD).mean(axis=-1, keepdims=True) + EPSILON)
    return prompt_PD + x_PD * net["scale"] + net["bias"]
