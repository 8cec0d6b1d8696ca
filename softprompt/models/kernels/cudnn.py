"""Attention to all parts by one call of cuDNN (GPU), with their masks.

Source: the documentation of jax.nn.dot_product_attention.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.models.attention import Part
from softprompt.models.kernels.batching import on_shards, over_rows
from softprompt.models.kernels.choice import Kernel

ALIGNED = 8  # the number of keys is a multiple: a mask needs 2, and 8 align in bfloat16


def join(tokens: int, parts: Sequence[Part]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Concatenates keys, values and masks; masked keys pad them to a multiple of `ALIGNED`."""
    masks = [
        jnp.broadcast_to(True if part.mask_TS is None else part.mask_TS, (tokens, len(part.k_SGK)))
        for part in parts
    ]
    mask_TS = jnp.concatenate(masks, axis=1)
    spare = 0, -mask_TS.shape[1] % ALIGNED
    joined = [part.k_SGK for part in parts], [part.v_SGK for part in parts]
    k_SGK, v_SGK = (jnp.pad(jnp.concatenate(xs), (spare, (0, 0), (0, 0))) for xs in joined)
    return k_SGK, v_SGK, jnp.pad(mask_TS, ((0, 0), spare))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused(
    kernel: Kernel, q_THK: jax.Array, k_SGK: jax.Array, v_SGK: jax.Array, mask_TS: jax.Array
) -> jax.Array:
    """The mixed values [T, H, K], by cuDNN; the queries are already scaled."""

    def forward(*arrays: jax.Array) -> tuple[jax.Array]:
        return (_cudnn(kernel.interpret, *arrays),)

    call = over_rows(on_shards(kernel.mesh, forward, "RTHK RSGK RSGK RTS", "RTHK"))
    return call(q_THK, k_SGK, v_SGK, mask_TS)[0]


def _forward(kernel: Kernel, *arrays: jax.Array) -> tuple[jax.Array, Any]:
    """The mixed values, and the arguments as residuals."""
    return fused(kernel, *arrays), arrays


def _backward(kernel: Kernel, arrays: Any, g_THK: jax.Array) -> tuple[Any, ...]:
    """Gradients of queries, keys and values."""

    def grads(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, g: jax.Array) -> Any:
        return jax.vjp(lambda q, k, v: _cudnn(kernel.interpret, q, k, v, mask), q, k, v)[1](g)

    call = over_rows(on_shards(kernel.mesh, grads, "RTHK RSGK RSGK RTS RTHK", "RTHK RSGK RSGK"))
    return (*call(*arrays, g_THK), None)


fused.defvjp(_forward, _backward)


def _cudnn(
    interpret: bool, q_RTHK: jax.Array, k_RSGK: jax.Array, v_RSGK: jax.Array, mask_RTS: jax.Array
) -> jax.Array:
    """The mixed values of rows [R, T, H, K]."""
    return jax.nn.dot_product_attention(
        *(q_RTHK, k_RSGK, v_RSGK),
        mask=mask_RTS[:, None],
        scale=1.0,
        implementation="xla" if interpret else "cudnn",
    )
