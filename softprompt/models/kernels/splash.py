"""Attention to a row's own part by splash (TPU), merged with dense attention to contexts.

Source: jax.experimental.pallas.ops.tpu.splash_attention; arXiv 2307.08691, section 3.1.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.models import attention
from softprompt.models.attention import Part, accumulate, by_head, by_token
from softprompt.models.kernels.batching import on_shards, over_rows
from softprompt.models.kernels.choice import BLOCK, Kernel


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def merged(kernel: Kernel, softcap: float, q_GQTK: jax.Array, parts: tuple[Part, ...]) -> jax.Array:
    """The mixed values [G, Q, T, K]: splash for the last part, einsums for the others."""
    return _forward(kernel, softcap, q_GQTK, parts)[0]


def _forward(
    kernel: Kernel, softcap: float, q_GQTK: jax.Array, parts: tuple[Part, ...]
) -> tuple[jax.Array, Any]:
    """The mixed values, and the residuals."""
    *dense, own = parts
    function = functools.partial(_splash_forward, softcap, kernel.interpret)
    call = over_rows(on_shards(kernel.mesh, function, "RTHK RTGK RTGK RT", "RTHK RHT"))
    mixed_THK, lse_HT = call(by_token(q_GQTK), own.k_SGK, own.v_SGK, own.segments_T)
    mixed_GQTK = by_head(mixed_THK, q_GQTK.shape[0]).astype(accumulate(q_GQTK.dtype))
    done = mixed_GQTK, lse_HT.reshape(*q_GQTK.shape[:3], 1)
    mixed_GQTK, residuals = attention.forward(softcap, q_GQTK, tuple(dense), [done])
    return mixed_GQTK, (residuals, own)


def _backward(
    kernel: Kernel, softcap: float, residuals: Any, g_GQTK: jax.Array
) -> tuple[jax.Array, tuple[Part, ...]]:
    """Gradients of queries and parts, computed from the normaliser and output of all parts."""
    merged_residuals, own = residuals
    q_GQTK, _, top_GQT1, total_GQT1, mixed_GQTK = merged_residuals
    lse_HT = (top_GQT1 + jnp.log(total_GQT1)).reshape(-1, q_GQTK.shape[2])
    function = functools.partial(_splash_backward, softcap, kernel.interpret)
    reads = "RTHK RTGK RTGK RT RTHK RHT RTHK"
    call = over_rows(on_shards(kernel.mesh, function, reads, "RTHK RTGK RTGK"))
    given = own.k_SGK, own.v_SGK, own.segments_T, by_token(mixed_GQTK), lse_HT, by_token(g_GQTK)
    q_THK, k_SGK, v_SGK = call(by_token(q_GQTK), *given)
    q_grad = by_head(q_THK, q_GQTK.shape[0]).astype(accumulate(q_GQTK.dtype))
    q_GQTK, part_grads = attention.backward(softcap, merged_residuals, g_GQTK, [q_grad])
    return q_GQTK, (*part_grads, Part(k_SGK, v_SGK))


merged.defvjp(_forward, _backward)


def _splash_forward(
    softcap: float,
    interpret: bool,
    q_RTHK: jax.Array,
    k_RTGK: jax.Array,
    v_RTGK: jax.Array,
    segments_RT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Mixed values [R, T, H, K] and log-sum-exps [R, H, T] of rows by themselves."""
    _, tokens, heads, size = q_RTHK.shape
    kernel = _splash(tokens, heads, softcap, interpret, save_residuals=True)
    q, k, v = map(_in_blocks, (q_RTHK, k_RTGK, v_RTGK))
    mixed_RHTK, (lse_RHT,) = jax.vmap(kernel)(q, k, v, _segment_ids(segments_RT))
    return mixed_RHTK[:, :, :tokens, :size].swapaxes(1, 2), lse_RHT[:, :, :tokens]


def _splash_backward(
    softcap: float,
    interpret: bool,
    q_RTHK: jax.Array,
    k_RTGK: jax.Array,
    v_RTGK: jax.Array,
    segments_RT: jax.Array,
    mixed_RTHK: jax.Array,
    lse_RHT: jax.Array,
    g_RTHK: jax.Array,
) -> tuple[jax.Array, ...]:
    """Gradients of queries, keys and values, from the mixed values and log-sum-exps of all keys."""
    # A private function, in jax 0.10 and 0.12: no public one takes the log-sum-exps of other parts.
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import (
        _splash_attention_bwd,
    )

    _, tokens, heads, size = q_RTHK.shape
    kernel = _splash(tokens, heads, softcap, interpret)

    def grads(q: Any, k: Any, v: Any, ids: Any, mixed: Any, lse: Any, g: Any) -> Any:
        residuals = q, k, v, ids, None, mixed, lse, kernel.dq_mask_info, kernel.dkv_mask_info
        return _splash_attention_bwd(**kernel.kwargs, res=residuals, do=g)[3:6]

    q, k, v, mixed, g = map(_in_blocks, (q_RTHK, k_RTGK, v_RTGK, mixed_RTHK, g_RTHK))
    lse_RHT = jnp.pad(lse_RHT, ((0, 0), (0, 0), (0, -tokens % BLOCK)))
    padded = jax.vmap(grads)(q, k, v, _segment_ids(segments_RT), mixed, lse_RHT, g)
    return tuple(array[:, :, :tokens, :size].swapaxes(1, 2) for array in padded)


def _splash(
    tokens: int, heads: int, softcap: float, interpret: bool, *, save_residuals: bool = False
) -> Any:
    """The causal kernel for one row, with the largest blocks that divide the row."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes 0.5 s

    tokens += -tokens % BLOCK
    block = next(size for size in (4 * BLOCK, 2 * BLOCK, BLOCK) if tokens % size == 0)
    sizes = ("", "_dkv", "_dq")
    blocks: dict[str, Any] = {
        f"block_{axis}{name}": block for axis in ("q", "kv") for name in sizes
    }
    return splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((tokens, tokens))] * heads),
        block_sizes=splash.BlockSizes(**blocks),
        save_residuals=save_residuals,
        attn_logits_soft_cap=softcap or None,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )


def _in_blocks(x_RTHK: jax.Array) -> jax.Array:
    """Transposes to [R, H, T, K] and pads T and K with zeros to multiples of a block."""
    tokens, size = (-x_RTHK.shape[axis] % BLOCK for axis in (1, 3))
    return jnp.pad(x_RTHK, ((0, 0), (0, tokens), (0, 0), (0, size))).swapaxes(1, 2)


def _segment_ids(segments_RT: jax.Array) -> Any:
    """The kernel's segment ids; padding at the end of the last block has id -1."""
    from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

    spare = -segments_RT.shape[1] % BLOCK
    ids_RT = jnp.pad(segments_RT.astype(jnp.int32), ((0, 0), (0, spare)), constant_values=-1)
    return SegmentIds(ids_RT, ids_RT)
