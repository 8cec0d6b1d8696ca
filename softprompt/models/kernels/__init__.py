"""Attention kernels of accelerators; each computes the same as the einsums in `attention`.

`refusal` gives the reason why a kernel does not support a case. Cases that no kernel supports use
the einsums.

* "splash" (TPU; Pallas) computes the row's own part, causal and within segments; its cost is
  quadratic in the row's length. Segment ids cannot express "seen by every segment", so contexts
  stay dense and unbatched, and the parts are merged by their log-sum-exps. The kernel can return
  the log-sum-exp of its part, but cannot be differentiated then ("Higher-order AD not supported").
  A part's gradient needs only the normaliser and the output of all parts, so these are passed to
  the kernel's own backward pass.
* "cudnn" (GPU): `jax.nn.dot_product_attention` rounds its log-sum-exp to the dtype of the values
  and drops its cotangent, so its result cannot be merged with other parts. It is called once, on
  the concatenated parts and their masks; the keys of a context are copied for every row. Its
  residuals are not public either, so the backward pass runs the forward pass again.

`jax.vmap` does not batch either kernel: the rows become an axis of their arrays (`over_rows`). Up
to jax 0.11 cuDNN's batching rule fails if an operand is not batched, and later too if a mask has no
heads (pull requests 39451 and 34920 of jax-ml/jax). The compiler cannot partition a Pallas kernel
over a mesh either, so each device calls it on its own rows and heads (`on_shards`).

Source: arXiv 2307.08691, section 3.1 (the log-sum-exp, and the backward pass from it).
"""

from collections.abc import Sequence

import jax

from softprompt.models import attention
from softprompt.models.attention import Part, by_token, grouped
from softprompt.models.kernels.choice import REFERENCE, Case, Device, Kernel, choose, device_of
from softprompt.models.kernels.cudnn import fused, join
from softprompt.models.kernels.splash import merged


def attend(
    q_THK: jax.Array,
    parts: Sequence[Part],
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    kernel: Kernel = REFERENCE,
) -> jax.Array:
    """`attention.attend` by a kernel that supports the case.

    The row's own keys and values are the last part, for splash with `segments_T`.
    """
    if kernel.name == "reference":
        return attention.attend(q_THK, parts, scale=scale, softcap=softcap)
    q_GQTK, parts = grouped(q_THK, parts, scale=scale)
    if kernel.name == "splash":
        *dense, own = parts
        assert own.segments_T is not None, "splash needs the row's segments"
        own = own._replace(mask_TS=None)
        return by_token(merged(kernel, softcap, q_GQTK, (*dense, own)))
    assert kernel.name == "cudnn" and not softcap
    k_SGK, v_SGK, mask_TS = join(q_THK.shape[0], parts)
    return fused(kernel, by_token(q_GQTK), k_SGK, v_SGK, mask_TS)
