"""Attention by kernels of accelerators, each equal to the einsum form in `attention`.

`refusal` says in words what a kernel cannot serve; what none serves is left to the einsum form.

* "splash" (TPU; Pallas): a row's own part, which grows with its square: causal, within segments.
  Segment ids cannot say "seen by every segment", so contexts stay dense and unbatched, and the
  parts are merged by their log-sum-exps. The kernel returns that of its part, but cannot be
  differentiated when it does ("Higher-order AD not supported"). A part's gradient needs no more
  than the normaliser and the output of the whole, so its own backward pass is given those.
* "cudnn" (GPU): `jax.nn.dot_product_attention` rounds its log-sum-exp to the dtype of the values
  and drops the cotangent of it, so that nothing can be merged with what it returns. It is called
  once, over all parts joined and with their masks; keys of a context are copied for every row. What
  it keeps for its backward pass is not public either: that pass runs the forward one again.

Neither is batched by `jax.vmap`: they get the rows that it adds as an axis of their arrays
(`over_rows`). Up to jax 0.11 cuDNN's batching rule fails where an operand is not batched, and later
too where a mask has no heads (pull requests 39451 and 34920 of jax-ml/jax). And a compiler that
splits a program over a mesh cannot split a Pallas kernel: each device runs its own rows and heads
(`on_shards`).

Source: arXiv 2307.08691, section 3.1 (the log-sum-exp, and the backward pass from it).
"""

from collections.abc import Sequence

import jax

from softprompt.models import attention
from softprompt.models.attention import Part, by_token, grouped
from softprompt.models.kernels.choice import REFERENCE, Case, Device, Kernel, choose, device_of
from softprompt.models.kernels.cudnn import fused, join
from softprompt.models.kernels.splash import merged

__all__ = ["REFERENCE", "Case", "Device", "Kernel", "attend", "choose", "device_of"]


def attend(
    q_THK: jax.Array,
    parts: Sequence[Part],
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    kernel: Kernel = REFERENCE,
) -> jax.Array:
    """`attention.attend` by a kernel that has been found to serve.

    Args:
        q_THK: queries, already rotated.
        parts: what they attend to; the row's own keys last, for splash with their segments.
        scale: what queries are multiplied by.
        softcap: c in c tanh(score / c); 0 for none.
        kernel: mixes the values.

    Returns:
        [T, H, K].
    """
    if kernel.name == "reference":
        return attention.attend(q_THK, parts, scale=scale, softcap=softcap)
    q_GQTK, parts = grouped(q_THK, parts, scale=scale)
    if kernel.name == "splash":
        *dense, own = parts
        assert own.segments_T is not None, "splash goes by segments"
        own = own._replace(mask_TS=None)
        return by_token(merged(kernel, softcap, q_GQTK, (*dense, own)))
    assert kernel.name == "cudnn" and not softcap
    k_SGK, v_SGK, mask_TS = join(q_THK.shape[0], parts)
    return fused(kernel, by_token(q_GQTK), k_SGK, v_SGK, mask_TS)
