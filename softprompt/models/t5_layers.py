"""Layers of T5 over ONE row: attention with a relative bias and no scaling, feed-forward, block.

Source: arXiv 1910.10683, section 2.1 (T5 1.0); arXiv 2002.05202 (the gated feed-forward of T5 1.1).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from softprompt.models.layers import Linear, RMSNorm, accumulate

KeysValues = tuple[jax.Array, jax.Array]
Biases = tuple[jax.Array | float, jax.Array | float]
Cross = tuple[jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5: 1.0, 1.1 and LM-adapted, Flan-T5, mT5, ByT5.

    `head_size` times `heads` need not be `width`. `gated`: gated GELU (1.1 and later), else ReLU
    (1.0). `tied`: the head is the embedding matrix and its input is scaled by width**-0.5 (1.0),
    else a matrix of its own, unscaled. `buckets` and `max_distance` are those of the relative bias.
    `context_length` is what the model was pretrained on; relative positions run on beyond it.
    `start`: the id that every sequence of the decoder begins with.
    """

    vocab: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_size: int
    ffn: int
    gated: bool = True
    tied: bool = False
    norm_eps: float = 1e-6
    buckets: int = 32
    max_distance: int = 128
    context_length: int = 512
    start: int = 0

    @property
    def prompt_width(self) -> int:
        """Width of the embedding matrix and of a prompt's vectors."""
        return self.width

    @property
    def embed_scale(self) -> float:
        """Embeddings are not scaled."""
        return 1.0


def bucket(distance: np.ndarray, *, buckets: int, max_distance: int, causal: bool) -> np.ndarray:
    """The bucket of each distance "key position - query position"; static, computed by numpy.

    Half of the buckets hold one distance each, the others grow logarithmically up to
    `max_distance`, and the last holds all beyond. Unless causal, one half of them is for keys that
    come after.
    """
    after = np.zeros_like(distance)
    if causal:
        size = np.maximum(-distance, 0)
    else:
        buckets //= 2
        after, size = buckets * (distance > 0), np.abs(distance)
    exact = buckets // 2
    ratio = np.log(np.maximum(size, exact) / exact) / math.log(max_distance / exact)
    # The guard keeps a distance on the edge of a bucket, such as 16, in the upper one.
    grown = exact + np.floor(ratio * (buckets - exact) + 1e-9).astype(distance.dtype)
    return after + np.where(size < exact, size, np.minimum(grown, buckets - 1))


class RelativeBias(nn.Module):
    """What a stack adds to the scores of all its self-attentions; it depends on i - j alone."""

    config: T5Config
    causal: bool
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the table [buckets, H]."""
        shape = (self.config.buckets, self.config.heads)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape)

    def own(self, length: int) -> jax.Array:
        """Biases [H, T, S] among the positions of a row.

        It asks only that a segment's positions lie side by side, so the rows of a batch share it:
        under `vmap` it is computed once.
        """
        index_T = np.arange(length)
        bias_TSH = self._of(index_T - index_T[:, None])
        return jnp.transpose(bias_TSH, (2, 0, 1))

    def context(self, length: int, positions_T: jax.Array) -> jax.Array:
        """Biases [H, T, P] of a row's positions towards a context that precedes every segment."""
        count = positions_T.shape[0]
        by_distance = self._of(-np.arange(length + count))
        behind_TP = length + positions_T[:, None] - np.arange(length)
        return jnp.transpose(by_distance[behind_TP], (2, 0, 1))

    def _of(self, distance: np.ndarray) -> jax.Array:
        c = self.config
        index = bucket(distance, buckets=c.buckets, max_distance=c.max_distance, causal=self.causal)
        return self.embedding[index].astype(accumulate(self.dtype))


def attend(
    q_THK: jax.Array, context: KeysValues, row: KeysValues, mask_TS: jax.Array, biases: Biases
) -> jax.Array:
    """Attention without scaling, in two parts under one softmax.

    Args:
        q_THK: queries of the row.
        context: keys and values [P, H, K] that every position sees; not batched when the row is.
        row: keys and values [S, H, K] that belong to the row.
        mask_TS: which of the row's keys each query sees.
        biases: added to the scores of the two parts, [H, T, P] and [H, T, S].

    Returns:
        [T, H, K].
    """
    (ck_PHK, cv_PHK), (k_SHK, v_SHK) = context, row
    acc = accumulate(q_THK.dtype)
    shared = jnp.einsum("thk,phk->htp", q_THK, ck_PHK, preferred_element_type=acc) + biases[0]
    own = jnp.einsum("thk,shk->hts", q_THK, k_SHK, preferred_element_type=acc) + biases[1]
    own = jnp.where(mask_TS, own, jnp.finfo(acc).min)
    share_HTS = jax.nn.softmax(jnp.concatenate([shared, own], axis=-1), axis=-1)
    shared, own = jnp.split(share_HTS.astype(q_THK.dtype), [ck_PHK.shape[0]], axis=-1)
    out = jnp.einsum("htp,phk->thk", shared, cv_PHK)
    return out + jnp.einsum("hts,shk->thk", own, v_SHK)


class Attention(nn.Module):
    """Self- or cross-attention; the caller says whose keys and values."""

    config: T5Config
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the four projections."""
        c = self.config
        into, out = (c.width, c.heads, c.head_size), (c.heads, c.head_size, c.width)
        self.q = Linear("td,dhk->thk", into, self.dtype)
        self.k = Linear("td,dhk->thk", into, self.dtype)
        self.v = Linear("td,dhk->thk", into, self.dtype)
        self.o = Linear("thk,hkd->td", out, self.dtype)

    def keys_values(self, x_SD: jax.Array) -> KeysValues:
        """Keys and values [S, H, K] of vectors that are already normalised."""
        return self.k(x_SD), self.v(x_SD)

    def __call__(
        self,
        x_TD: jax.Array,
        context: KeysValues,
        row: KeysValues,
        mask_TS: jax.Array,
        biases: Biases = (0.0, 0.0),
    ) -> jax.Array:
        """Returns [T, D]; the arguments are those of `attend`."""
        return self.o(attend(self.q(x_TD), context, row, mask_TS, biases))


class MLP(nn.Module):
    """Gated GELU (by tanh, as T5 1.1 was trained), or ReLU."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """Returns [T, D]."""
        width, ffn = self.config.width, self.config.ffn
        y = Linear("td,df->tf", (width, ffn), self.dtype, name="up")(x_TD)
        if self.config.gated:
            gate = Linear("td,df->tf", (width, ffn), self.dtype, name="gate")(x_TD)
            y = jax.nn.gelu(gate, approximate=True) * y
        else:
            y = jax.nn.relu(y)
        return Linear("tf,fd->td", (ffn, width), self.dtype, name="down")(y)


class Block(nn.Module):
    """One pre-norm layer of either stack, as `nn.scan` wants it."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        context: KeysValues,
        mask_TS: jax.Array,
        biases: Biases,
        cross: Cross | None,
    ) -> tuple[jax.Array, KeysValues]:
        """Runs the layer.

        Args:
            x_TD: the residual stream.
            context: this layer's keys and values [P, H, K] before the row.
            mask_TS: which positions of the row each position sees.
            biases: the stack's relative biases.
            cross: encoder states that every row sees [P, D] and the row's own [S, D], with the
                mask [T, S] over the latter; None leaves cross-attention out.

        Returns:
            The residual stream, and the layer's own keys and values [T, H, K].
        """
        c, dtype = self.config, self.dtype
        y = RMSNorm(c.norm_eps, dtype, name="attn_norm")(x_TD)
        attn = Attention(c, dtype, name="attn")
        kv = attn.keys_values(y)
        x_TD = x_TD + attn(y, context, kv, mask_TS, biases)
        if cross is not None:
            shared_PD, states_SD, cross_mask_TS = cross
            y = RMSNorm(c.norm_eps, dtype, name="cross_norm")(x_TD)
            attn = Attention(c, dtype, name="cross")
            shared, own = attn.keys_values(shared_PD), attn.keys_values(states_SD)
            x_TD = x_TD + attn(y, shared, own, cross_mask_TS)
        y = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x_TD)
        return x_TD + MLP(c, dtype, name="mlp")(y), kv


class Head(nn.Module):
    """An output matrix of its own, with logits accumulated in at least float32."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_MD: jax.Array) -> jax.Array:
        """Returns logits [M, V]."""
        shape = (self.config.width, self.config.vocab)
        kernel_DV = self.param("kernel", nn.initializers.normal(0.02), shape).astype(self.dtype)
        acc = accumulate(self.dtype)
        return jnp.einsum("md,dv->mv", x_MD, kernel_DV, preferred_element_type=acc)
