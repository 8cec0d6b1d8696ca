"""Attention to several parts of keys with one softmax; the backward pass stores no scores.

The backward pass recomputes the scores from queries and keys, as FlashAttention does (arXiv
2205.14135, section 3.1). The residuals of a layer are therefore as small as its queries. This is
also faster on a CPU, because arrays of the scores' size are not written to memory and read back.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Done = tuple[jax.Array, jax.Array]  # mixed values [G, Q, T, K], log-sum-exp [G, Q, T, 1]


def accumulate(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of norms, softmax and losses: float32, or float64 in a float64 model."""
    return jnp.promote_types(dtype, jnp.float32)


class Part(NamedTuple):
    """Keys and values [S, G, K] that queries attend to; S may be 0.

    `mask_TS` is true where a query sees a key (None: everywhere); it may be [S] if it is the same
    for all queries. `bias_HTS` is added to the scores. `segments_T` is set if queries and keys are
    of the same positions and the mask is exactly "the same segment, and not later".
    """

    k_SGK: jax.Array
    v_SGK: jax.Array
    mask_TS: jax.Array | None = None
    bias_HTS: jax.Array | None = None
    segments_T: jax.Array | None = None


def attend(
    q_THK: jax.Array, parts: Sequence[Part], *, scale: float = 1.0, softcap: float = 0.0
) -> jax.Array:
    """Grouped-query attention to several parts of keys with one softmax.

    Neither keys nor scores are concatenated. A part without a batch axis (a context) therefore
    stays a single matrix multiplication under `vmap`, and a cache is not copied.

    Args:
        q_THK: queries, already rotated.
        parts: keys and values that the queries attend to.
        scale: factor of the queries.
        softcap: c in c tanh(score / c); 0 for none.

    Returns:
        [T, H, K].
    """
    q_GQTK, parts = grouped(q_THK, parts, scale=scale)
    return by_token(_mix(softcap, q_GQTK, parts))


def grouped(
    q_THK: jax.Array, parts: Sequence[Part], *, scale: float
) -> tuple[jax.Array, tuple[Part, ...]]:
    """Scaled queries [G, Q, T, K], grouped by the key head they use, and the nonempty parts."""
    parts = [part for part in parts if part.k_SGK.shape[0]] or parts[-1:]
    q_THK = q_THK if scale == 1.0 else q_THK * scale
    return by_head(q_THK, parts[0].k_SGK.shape[1]), tuple(parts)


def by_head(x_THK: jax.Array, groups: int) -> jax.Array:
    """Transposes to [G, Q, T, K]: query heads that use the same key head are adjacent."""
    tokens, heads, size = x_THK.shape
    return x_THK.swapaxes(0, 1).reshape(groups, heads // groups, tokens, size)


def by_token(x_GQTK: jax.Array) -> jax.Array:
    """Transposes back to [T, H, K]."""
    groups, ratio, tokens, size = x_GQTK.shape
    return x_GQTK.reshape(groups * ratio, tokens, size).swapaxes(0, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(softcap: float, q_GQTK: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
    """The mixed values [G, Q, T, K].

    Arrays of the scores' size have the axis order that the matrix products read and write. An
    einsum sums over axes in alphabetical order, so the order Q, T needs no copy for the gradients
    of keys and values.
    """
    return forward(softcap, q_GQTK, parts)[0]


def forward(
    softcap: float, q_GQTK: jax.Array, parts: Sequence[Part], done: Sequence[Done] = ()
) -> tuple[jax.Array, Any]:
    """The mixed values [G, Q, T, K], and the residuals for `backward`.

    Args:
        softcap: as for `attend`.
        q_GQTK: scaled queries.
        parts: keys and values that the queries attend to.
        done: results of other parts, which another kernel has computed.
    """
    acc, dtype = accumulate(q_GQTK.dtype), q_GQTK.dtype
    scores = [_score(softcap, part.mask_TS, _raw(q_GQTK, part), part.bias_HTS) for part in parts]
    tops = [x.max(axis=-1, keepdims=True, initial=jnp.finfo(acc).min) for x in scores]
    tops += [lse_GQT1 for _, lse_GQT1 in done]
    top_GQT1 = functools.reduce(jnp.maximum, tops)
    raised = [jnp.exp(x - top_GQT1) for x in scores]
    shares = [jnp.exp(lse_GQT1 - top_GQT1) for _, lse_GQT1 in done]
    totals = [x.sum(axis=-1, keepdims=True) for x in raised] + shares
    total_GQT1 = functools.reduce(jnp.add, totals)
    mixed = [
        jnp.einsum("gqts,sgk->gqtk", x.astype(dtype), part.v_SGK, preferred_element_type=acc)
        for x, part in zip(raised, parts, strict=True)
    ]
    mixed += [share * mixed_GQTK for share, (mixed_GQTK, _) in zip(shares, done, strict=True)]
    # Dividing the mixed values, not the larger scores, makes attention a fifth faster on a CPU.
    mixed_GQTK = (functools.reduce(jnp.add, mixed) / total_GQT1).astype(dtype)
    return mixed_GQTK, (q_GQTK, parts, top_GQT1, total_GQT1, mixed_GQTK)


def backward(
    softcap: float, residuals: Any, g_GQTK: jax.Array, q_grads: Sequence[jax.Array] = ()
) -> tuple[jax.Array, tuple[Part, ...]]:
    """Gradients of queries and parts; operands of products have the queries' dtype.

    `q_grads` are gradients of the queries [G, Q, T, K] from other parts, which are added.
    """
    q_GQTK, parts, top_GQT1, total_GQT1, mixed_GQTK = residuals
    acc, dtype = accumulate(q_GQTK.dtype), q_GQTK.dtype
    g_GQTK = g_GQTK.astype(acc) / total_GQT1
    mean_GQT1 = jnp.sum(g_GQTK * mixed_GQTK, axis=-1, keepdims=True)
    g_GQTK = g_GQTK.astype(dtype)
    q_grads, part_grads = list(q_grads), []
    for part in parts:
        score = functools.partial(_score, softcap, part.mask_TS)
        score_GQTS, pullback = jax.vjp(score, _raw(q_GQTK, part), part.bias_HTS)
        raised_GQTS = jnp.exp(score_GQTS - top_GQT1).astype(dtype)
        back_GQTS = jnp.einsum("gqtk,sgk->gqts", g_GQTK, part.v_SGK, preferred_element_type=acc)
        raw_GQTS, bias_HTS = pullback(raised_GQTS * (back_GQTS - mean_GQT1))
        raw_GQTS = raw_GQTS.astype(dtype)
        q_grads += [jnp.einsum("gqts,sgk->gqtk", raw_GQTS, part.k_SGK, preferred_element_type=acc)]
        k_SGK = jnp.einsum("gqts,gqtk->sgk", raw_GQTS, q_GQTK)
        v_SGK = jnp.einsum("gqts,gqtk->sgk", raised_GQTS, g_GQTK)
        part_grads.append(Part(k_SGK, v_SGK, None, bias_HTS))
    return functools.reduce(jnp.add, q_grads).astype(dtype), tuple(part_grads)


_mix.defvjp(forward, backward)


def _raw(q_GQTK: jax.Array, part: Part) -> jax.Array:
    """Products of queries and keys [G, Q, T, S]."""
    acc = accumulate(q_GQTK.dtype)
    return jnp.einsum("gqtk,sgk->gqts", q_GQTK, part.k_SGK, preferred_element_type=acc)


def _score(
    softcap: float, mask_TS: jax.Array | None, x_GQTS: jax.Array, bias_HTS: jax.Array | None
) -> jax.Array:
    """Scores: the products, capped, biased and masked."""
    if softcap:
        x_GQTS = softcap * jnp.tanh(x_GQTS / softcap)
    if bias_HTS is not None:
        x_GQTS += bias_HTS.reshape(x_GQTS.shape)
    if mask_TS is None:
        return x_GQTS
    return jnp.where(mask_TS, x_GQTS, jnp.finfo(x_GQTS.dtype).min)
