"""Layers of a decoder over ONE row: no batch axis anywhere, `jax.vmap` adds it outside.

Frozen weights live in Flax's collection "params"; what is trained comes in beside them in the
collection "delta", laid out like the modules that read it (DESIGN: methods).
"""

import jax
import jax.numpy as jnp
from flax import linen as nn

_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=0, out_axis=-1)


def read_delta(module: nn.Module, name: str) -> jax.Array | None:
    """The trained variable `name` in the module's own scope, or None where there is none.

    Every read is noted in the collection "read", so that a trial can refuse a delta with a leaf
    that no module reads (Linen would ignore it silently).
    """
    if not module.has_variable("delta", name):
        return None
    module.sow("read", name, True)
    return module.get_variable("delta", name)


def accumulate(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of norms, softmax and losses: float32, or float64 where everything is."""
    return jnp.promote_types(dtype, jnp.float32)


class Linear(nn.Module):
    """A projection without bias, `einsum(spec, x, kernel)`, in `dtype`."""

    spec: str
    shape: tuple[int, ...]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects `x` [T, ...]."""
        kernel = self.param("kernel", _normal, self.shape)
        return jnp.einsum(self.spec, x, kernel.astype(self.dtype))


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32. Source: arXiv 1910.07467."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """Normalises each row and multiplies it by the learned scale."""
        scale_D = self.param("scale", nn.initializers.ones, x_TD.shape[-1:])
        x = x_TD.astype(accumulate(self.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale_D.astype(x.dtype)).astype(self.dtype)


def rotary_table(positions_T: jax.Array, size: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, size / 2] of rotary positions. Source: arXiv 2104.09864, 3.4.2."""
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    frequency_K = base ** -(jnp.arange(0, size, 2, dtype=dtype) / size)
    angle_TK = positions_T.astype(dtype)[:, None] * frequency_K
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def rotate(x_THK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each head's two halves against each other by the row's angles."""
    cos, sin = (t[:, None, :] for t in table)
    a, b = jnp.split(x_THK.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_THK.dtype)


def attend(
    q_THK: jax.Array,
    context: tuple[jax.Array, jax.Array],
    row: tuple[jax.Array, jax.Array],
    mask_TS: jax.Array,
) -> jax.Array:
    """Grouped-query attention in two parts under one softmax.

    Args:
        q_THK: queries of the row, already rotated.
        context: keys and values [P, G, K] that every position sees: dense, and not batched when the
            row is, so that the products with them stay single matrix multiplications under `vmap`.
        row: the row's own keys and values [T, G, K].
        mask_TS: which of the row's own keys each query sees.

    Returns:
        [T, H, K].
    """
    (ck_PGK, cv_PGK), (k_SGK, v_SGK) = context, row
    tokens, heads, size = q_THK.shape
    groups = k_SGK.shape[1]
    q_TGQK = (q_THK * size**-0.5).reshape(tokens, groups, heads // groups, size)
    acc = accumulate(q_THK.dtype)
    shared = jnp.einsum("tgqk,pgk->gqtp", q_TGQK, ck_PGK, preferred_element_type=acc)
    own = jnp.einsum("tgqk,sgk->gqts", q_TGQK, k_SGK, preferred_element_type=acc)
    own = jnp.where(mask_TS, own, jnp.finfo(acc).min)
    share_GQTS = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1), axis=-1)
    shared, own = jnp.split(share_GQTS.astype(q_THK.dtype), [ck_PGK.shape[0]], axis=-1)
    out = jnp.einsum("gqtp,pgk->tgqk", shared, cv_PGK) + jnp.einsum("gqts,sgk->tgqk", own, v_SGK)
    return out.reshape(tokens, heads, size)
