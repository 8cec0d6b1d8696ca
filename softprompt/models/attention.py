"""Attention in parts under one softmax, with a backward pass that keeps no scores.

The gradient recomputes the scores from queries and keys, as FlashAttention's does (arXiv
2205.14135, section 3.1): what is kept of a layer is as large as its queries. On a CPU it is faster
too, for every array as large as the scores that is written is read from memory again.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Done = tuple[jax.Array, jax.Array]  # mixed values [G, T, Q, K], log-sum-exp [G, T, Q, 1]


def accumulate(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of norms, softmax and losses: float32, or float64 where everything is."""
    return jnp.promote_types(dtype, jnp.float32)


class Part(NamedTuple):
    """Keys and values [S, G, K] that queries attend to; S may be 0.

    `mask_TS` says which of the keys each query sees (None: all), and may be [S] where all queries
    see the same. `bias_HTS` is added to the scores. `segments_T` is there where the keys are the
    queries' own and the mask says no more than "of the same segment, and not later".
    """

    k_SGK: jax.Array
    v_SGK: jax.Array
    mask_TS: jax.Array | None = None
    bias_HTS: jax.Array | None = None
    segments_T: jax.Array | None = None


def attend(
    q_THK: jax.Array, parts: Sequence[Part], *, scale: float = 1.0, softcap: float = 0.0
) -> jax.Array:
    """Grouped-query attention in parts under one softmax.

    Neither keys nor scores are joined. So a part that is not batched when the queries are (a
    context) stays a single matrix multiplication under `vmap`, and a cache is not copied.

    Args:
        q_THK: queries, already rotated.
        parts: what they attend to.
        scale: what queries are multiplied by.
        softcap: c in c tanh(score / c); 0 for none.

    Returns:
        [T, H, K].
    """
    q_TGQK, parts = grouped(q_THK, parts, scale=scale)
    return _mix(softcap, q_TGQK, parts).reshape(q_THK.shape)


def grouped(
    q_THK: jax.Array, parts: Sequence[Part], *, scale: float
) -> tuple[jax.Array, tuple[Part, ...]]:
    """Queries, scaled, by the head of keys that they share [T, G, Q, K]; and what is not empty."""
    parts = [part for part in parts if part.k_SGK.shape[0]] or parts[-1:]
    tokens, heads, size = q_THK.shape
    groups = parts[0].k_SGK.shape[1]
    q_THK = q_THK if scale == 1.0 else q_THK * scale
    return q_THK.reshape(tokens, groups, heads // groups, size), tuple(parts)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(softcap: float, q_TGQK: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
    """The mixed values [T, G, Q, K].

    What is as large as the scores has its axes in the order in which a product of matrices writes
    them.
    """
    return forward(softcap, q_TGQK, parts)[0]


def forward(
    softcap: float, q_TGQK: jax.Array, parts: Sequence[Part], done: Sequence[Done] = ()
) -> tuple[jax.Array, Any]:
    """The mixed values [T, G, Q, K], and what `backward` needs.

    Args:
        softcap: as for `attend`.
        q_TGQK: queries, scaled.
        parts: what they attend to.
        done: what else they attend to, as others have mixed it.
    """
    acc, dtype = accumulate(q_TGQK.dtype), q_TGQK.dtype
    scores = [_score(softcap, part.mask_TS, _raw(q_TGQK, part), part.bias_HTS) for part in parts]
    tops = [x.max(axis=-1, keepdims=True, initial=jnp.finfo(acc).min) for x in scores]
    tops += [lse_GTQ1 for _, lse_GTQ1 in done]
    top_GTQ1 = functools.reduce(jnp.maximum, tops)
    raised = [jnp.exp(x - top_GTQ1) for x in scores]
    shares = [jnp.exp(lse_GTQ1 - top_GTQ1) for _, lse_GTQ1 in done]
    totals = [x.sum(axis=-1, keepdims=True) for x in raised] + shares
    total_GTQ1 = functools.reduce(jnp.add, totals)
    mixed = [
        jnp.einsum("gtqs,sgk->gtqk", x.astype(dtype), part.v_SGK, preferred_element_type=acc)
        for x, part in zip(raised, parts, strict=True)
    ]
    mixed += [share * mixed_GTQK for share, (mixed_GTQK, _) in zip(shares, done, strict=True)]
    # Divided last: there are fewer values than keys, which takes a fifth off attention on a CPU.
    mixed_GTQK = functools.reduce(jnp.add, mixed) / total_GTQ1
    mixed_TGQK = jnp.moveaxis(mixed_GTQK.astype(dtype), 0, 1)
    return mixed_TGQK, (q_TGQK, parts, top_GTQ1, total_GTQ1, mixed_TGQK)


def backward(
    softcap: float, kept: Any, g_TGQK: jax.Array, of_q: Sequence[jax.Array] = ()
) -> tuple[jax.Array, tuple[Part, ...]]:
    """Gradients of queries and parts; products take their operands in the queries' dtype.

    `of_q` are what the queries' gradient has from elsewhere, [G, T, Q, K].
    """
    q_TGQK, parts, top_GTQ1, total_GTQ1, mixed_TGQK = kept
    acc, dtype = accumulate(q_TGQK.dtype), q_TGQK.dtype
    g_GTQK = jnp.moveaxis(g_TGQK, 1, 0).astype(acc) / total_GTQ1
    mean_GTQ1 = jnp.sum(g_GTQK * jnp.moveaxis(mixed_TGQK, 1, 0), axis=-1, keepdims=True)
    g_GTQK = g_GTQK.astype(dtype)
    of_q, of_parts = list(of_q), []
    for part in parts:
        of_raw = functools.partial(_score, softcap, part.mask_TS)
        score_GTQS, pull = jax.vjp(of_raw, _raw(q_TGQK, part), part.bias_HTS)
        raised_GTQS = jnp.exp(score_GTQS - top_GTQ1)
        back_GTQS = jnp.einsum("gtqk,sgk->gtqs", g_GTQK, part.v_SGK, preferred_element_type=acc)
        raw_GTQS, bias_HTS = pull(raised_GTQS * (back_GTQS - mean_GTQ1))
        raw_GTQS, raised_GTQS = raw_GTQS.astype(dtype), raised_GTQS.astype(dtype)
        of_q.append(jnp.einsum("gtqs,sgk->gtqk", raw_GTQS, part.k_SGK, preferred_element_type=acc))
        k_SGK = jnp.einsum("gtqs,tgqk->sgk", raw_GTQS, q_TGQK)
        v_SGK = jnp.einsum("gtqs,gtqk->sgk", raised_GTQS, g_GTQK)
        of_parts.append(Part(k_SGK, v_SGK, None, bias_HTS))
    q_GTQK = functools.reduce(jnp.add, of_q).astype(dtype)
    return jnp.moveaxis(q_GTQK, 0, 1), tuple(of_parts)


_mix.defvjp(forward, backward)


def _raw(q_TGQK: jax.Array, part: Part) -> jax.Array:
    """Products of queries and keys [G, T, Q, S]."""
    acc = accumulate(q_TGQK.dtype)
    return jnp.einsum("tgqk,sgk->gtqs", q_TGQK, part.k_SGK, preferred_element_type=acc)


def _score(
    softcap: float, mask_TS: jax.Array | None, x_GTQS: jax.Array, bias_HTS: jax.Array | None
) -> jax.Array:
    """Scores of products: capped, biased, masked."""
    groups, tokens, ratio, keys = x_GTQS.shape
    if softcap:
        x_GTQS = softcap * jnp.tanh(x_GTQS / softcap)
    if bias_HTS is not None:
        x_GTQS += bias_HTS.reshape(groups, ratio, tokens, keys).swapaxes(1, 2)
    if mask_TS is None:
        return x_GTQS
    mask_T1S = jnp.broadcast_to(mask_TS, (tokens, keys))[:, None]
    return jnp.where(mask_T1S, x_GTQS, jnp.finfo(x_GTQS.dtype).min)
