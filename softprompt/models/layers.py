"""Layers of a decoder over ONE row: no batch axis anywhere, `jax.vmap` adds it outside.

Frozen weights live in Flax's collection "params"; what is trained comes in beside them in the
collection "delta", laid out like the modules that read it (DESIGN: methods).
"""

import dataclasses
from collections.abc import Callable

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
    """A projection `einsum(spec, x, kernel)` in `dtype`; its bias, if any, is added in float32."""

    spec: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Projects `x` [T, ...]."""
        kernel = self.param("kernel", _normal, self.shape)
        y = jnp.einsum(self.spec, x, kernel.astype(self.dtype))
        if not self.use_bias:
            return y
        axes, out = self.spec.split(",")[1].split("->")
        shape = tuple(size for axis, size in zip(axes, self.shape, strict=True) if axis in out)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return (y.astype(accumulate(self.dtype)) + bias).astype(self.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32. Source: arXiv 1910.07467."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each vector and multiplies it by the learned scale."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(accumulate(self.dtype))
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(x.dtype)).astype(self.dtype)


class LayerNorm(nn.Module):
    """Norm with scale and bias over the last axis, in float32. Source: arXiv 1607.06450."""

    epsilon: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises each vector, multiplies it by the scale and adds the bias."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        x = x.astype(accumulate(self.dtype))
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(x.dtype) + bias.astype(x.dtype)).astype(self.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Embed(nn.Module):
    """A matrix of one vector a row: token embeddings, which a tied head reads too, or positions.

    What is read is multiplied by `scale`; the head's products are not.
    """

    rows: int
    width: int
    dtype: jnp.dtype
    scale: float = 1.0

    def setup(self) -> None:
        """Declares the matrix."""
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, (self.rows, self.width))

    def __call__(self, index_T: jax.Array) -> jax.Array:
        """Rows of the matrix, [T, D]."""
        x_TD = self.embedding[index_T].astype(self.dtype)
        return x_TD if self.scale == 1.0 else x_TD * jnp.asarray(self.scale, self.dtype)

    def attend(self, x_MD: jax.Array) -> jax.Array:
        """Products with every row, [M, V]."""
        matrix_VD = self.embedding.astype(self.dtype)
        acc = accumulate(self.dtype)
        return jnp.einsum("md,vd->mv", x_MD, matrix_VD, preferred_element_type=acc)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for positions beyond those first trained for.

    `kind` "linear" divides all of them by `factor`. "llama3" divides those whose wavelength is more
    than `original / low`, leaves those below `original / high`, and blends in between.
    Source: `modeling_rope_utils` of transformers.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def rotary_table(
    positions_T: jax.Array, size: int, base: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [T, size / 2] of rotary positions. Source: arXiv 2104.09864, 3.4.2."""
    dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
    frequency_K = base ** -(jnp.arange(0, size, 2, dtype=dtype) / size)
    if scaling is not None:
        frequency_K = stretch(frequency_K, scaling)
    angle_TK = positions_T.astype(dtype)[:, None] * frequency_K
    return jnp.cos(angle_TK), jnp.sin(angle_TK)


def stretch(frequency_K: jax.Array, scaling: RopeScaling) -> jax.Array:
    """Frequencies of rotary positions under a scaling."""
    if scaling.kind == "linear":
        return frequency_K / scaling.factor
    turns_K = scaling.original * frequency_K / (2 * jnp.pi)  # in the original context
    kept_K = jnp.clip((turns_K - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return frequency_K * (kept_K + (1 - kept_K) / scaling.factor)


def rotate(x_THK: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each head's two halves against each other by the row's angles.

    Where the table is narrower than the head, what it does not reach is left as it is.
    """
    cos, sin = (t[:, None, :] for t in table)
    half = cos.shape[-1]
    x = x_THK.astype(cos.dtype)
    a, b = x[..., :half], x[..., half : 2 * half]
    parts = [a * cos - b * sin, b * cos + a * sin]
    if 2 * half < x.shape[-1]:
        parts.append(x[..., 2 * half :])
    return jnp.concatenate(parts, axis=-1).astype(x_THK.dtype)


def window_masks(
    window: jax.Array, mask_TS: jax.Array, positions_T: jax.Array, length: int
) -> tuple[jax.Array, jax.Array]:
    """Cuts what lies `window` positions back or more: of the context [T, P], and of the row [T, S].

    Args:
        window: a scalar.
        mask_TS: which of the row's own keys each query sees without a window.
        positions_T: of the row's tokens, the context's `length` included.
        length: P; the context stands at positions 0 to P - 1.
    """
    context_TP = positions_T[:, None] - jnp.arange(length) < window
    return context_TP, mask_TS & (positions_T[:, None] - positions_T < window)


def attend(
    q_THK: jax.Array,
    context: tuple[jax.Array, jax.Array],
    row: tuple[jax.Array, jax.Array],
    masks: tuple[jax.Array | None, jax.Array],
    *,
    scale: float,
    softcap: float = 0.0,
) -> jax.Array:
    """Grouped-query attention in two parts under one softmax.

    Args:
        q_THK: queries of the row, already rotated.
        context: keys and values [P, G, K] before the row: dense, and not batched when the row is,
            so that the products with them stay single matrix multiplications under `vmap`.
        row: the row's own keys and values [T, G, K].
        masks: which of the context's keys each query sees [T, P] (None: all of them), and which of
            the row's own [T, S].
        scale: what queries are multiplied by.
        softcap: c in c tanh(score / c); 0 for none.

    Returns:
        [T, H, K].
    """
    (ck_PGK, cv_PGK), (k_SGK, v_SGK) = context, row
    tokens, heads, size = q_THK.shape
    groups = k_SGK.shape[1]
    q_TGQK = (q_THK * scale).reshape(tokens, groups, heads // groups, size)
    acc = accumulate(q_THK.dtype)

    def scores(keys: jax.Array, mask: jax.Array | None) -> jax.Array:
        x = jnp.einsum("tgqk,sgk->gqts", q_TGQK, keys, preferred_element_type=acc)
        x = softcap * jnp.tanh(x / softcap) if softcap else x
        return x if mask is None else jnp.where(mask, x, jnp.finfo(acc).min)

    both = [scores(ck_PGK, masks[0]), scores(k_SGK, masks[1])]
    share_GQTS = jax.nn.softmax(jnp.concatenate(both, axis=-1), axis=-1)
    shared, own = jnp.split(share_GQTS.astype(q_THK.dtype), [ck_PGK.shape[0]], axis=-1)
    out = jnp.einsum("gqtp,pgk->tgqk", shared, cv_PGK) + jnp.einsum("gqts,sgk->tgqk", own, v_SGK)
    return out.reshape(tokens, heads, size)
