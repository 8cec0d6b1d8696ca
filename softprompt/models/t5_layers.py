"""Layers of T5 over ONE row: attention with a relative bias and no scaling, feed-forward, block.

Source: arXiv 1910.10683, section 2.1 (T5 1.0); arXiv 2002.05202 (the gated feed-forward of T5 1.1).
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

from softprompt.models.attention import Part, accumulate, attend
from softprompt.models.dropout import RowDropout, dropped, dropped_keys
from softprompt.models.layers import Adapter, Linear, RMSNorm, activate

KeysValues = tuple[jax.Array, jax.Array]
Kept = tuple[KeysValues, tuple[KeysValues, KeysValues] | None]


@dataclasses.dataclass(frozen=True)
class T5Config:
    """What a T5 is built of: 1.0, 1.1 and LM-adapted, Flan-T5, mT5, UMT5, ByT5.

    Attributes:
        vocab: V, rows of the embedding matrix.
        width: D, of the residual stream.
        encoder_layers: L of the encoder.
        decoder_layers: L of the decoder.
        heads: H.
        head_size: K; times H it need not be D.
        ffn: F.
        gated: the feed-forward is act(gate x) * (up x) (1.1 and later), not act(up x) (1.0).
        activation: of the feed-forward, a name of `layers.ACTIVATIONS`.
        tied: the head is the embedding matrix, and its input is scaled by D ** -0.5 (1.0).
        norm_eps: added to the mean square.
        buckets: of the relative bias.
        max_distance: from which on all distances share the last bucket.
        bias_per_layer: every layer has relative biases of its own (UMT5), not each stack.
        context_length: positions it was pretrained on; relative positions run on beyond it.
        start: the id that every sequence of the decoder begins with.
    """

    vocab: int
    width: int
    encoder_layers: int
    decoder_layers: int
    heads: int
    head_size: int
    ffn: int
    gated: bool = True
    activation: str = "gelu_tanh"
    tied: bool = False
    norm_eps: float = 1e-6
    buckets: int = 32
    max_distance: int = 128
    bias_per_layer: bool = False
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


def buckets_within(config: T5Config, causal: bool, length: int) -> np.ndarray:
    """The bucket of each pair of a row's positions [T, S].

    It asks only that a segment's positions lie side by side, so the rows of a batch share it: under
    `vmap` what follows from it is computed once.
    """
    index_T = np.arange(length)
    return _bucket_of(config, causal, index_T - index_T[:, None])


def buckets_before(
    config: T5Config, causal: bool, positions_T: jax.Array, positions_S: jax.Array
) -> jax.Array:
    """The bucket of each pair of a position and a key [T, S] that stands before it."""
    furthest = config.max_distance  # the last bucket holds all beyond
    by_distance = jnp.asarray(_bucket_of(config, causal, -np.arange(furthest + 1)))
    return by_distance[jnp.clip(positions_T[:, None] - positions_S, 0, furthest)]


def _bucket_of(config: T5Config, causal: bool, distance: np.ndarray) -> np.ndarray:
    sizes = {"buckets": config.buckets, "max_distance": config.max_distance}
    return bucket(distance, **sizes, causal=causal)


class RelativeBias(nn.Module):
    """What is added to the scores of self-attention; it depends on i - j alone."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, buckets: Sequence[jax.Array | np.ndarray]) -> tuple[jax.Array, ...]:
        """Biases [H, T, S] for each array of buckets [T, S], from the table [buckets, H]."""
        shape = (self.config.buckets, self.config.heads)
        table = self.param("embedding", nn.initializers.normal(0.02), shape)
        acc = accumulate(self.dtype)
        return tuple(jnp.transpose(table[b_TS].astype(acc), (2, 0, 1)) for b_TS in buckets)


@struct.dataclass
class Layer:
    """What differs from layer to layer, scanned along the first axis: [L, ...] outside.

    `cross` holds the keys and values of encoder states, those of the context and the row's own,
    where they are known already; `cross_prefix` those that every position of a decoder sees
    besides.
    """

    context: KeysValues
    cached: tuple[KeysValues, ...] = ()
    cross: tuple[KeysValues, KeysValues] | None = None
    cross_prefix: KeysValues | None = None


@struct.dataclass
class Row:
    """What all layers are told of the row.

    Attributes:
        masks: which keys each position sees of the context (None: all), of each cached part and of
            the row.
        biases: the stack's relative biases towards the same; None where each layer has its own.
        buckets: where those find them, [T, S] for each part.
        states: encoder states that every row sees [P, D], and the row's own [S, D]; None in the
            encoder, and where their keys and values are known.
        cross_mask_TS: which of the row's own encoder states each position sees.
        drop: whose masks the positions get, and the encoder's positions in cross-attention; None
            where nothing is dropped.
        keep_cross: the layers return the keys and values of `states`.
    """

    masks: tuple[jax.Array | None, ...]
    biases: tuple[jax.Array, ...] | None
    buckets: tuple[jax.Array, ...] = ()
    states: tuple[jax.Array, jax.Array] | None = None
    cross_mask_TS: jax.Array | None = None
    drop: tuple[RowDropout | None, RowDropout | None] = (None, None)
    keep_cross: bool = struct.field(pytree_node=False, default=False)


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

    def keys_values(self, x_SD: jax.Array, drop: RowDropout | None) -> KeysValues:
        """Keys and values [S, H, K] of vectors that are already normalised."""
        return self.k(x_SD, drop), self.v(x_SD, drop)

    def __call__(
        self, x_TD: jax.Array, parts: Sequence[Part], drop: RowDropout | None
    ) -> jax.Array:
        """Attends to the parts, without scaling; returns [T, D]."""
        return self.o(attend(self.q(x_TD, drop), parts), drop)


class MLP(nn.Module):
    """Feed-forward, gated or plain."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array, drop: RowDropout | None) -> jax.Array:
        """Returns [T, D]."""
        width, ffn = self.config.width, self.config.ffn
        y = Linear("td,df->tf", (width, ffn), self.dtype, name="up")(x_TD, drop)
        if self.config.gated:
            gate = Linear("td,df->tf", (width, ffn), self.dtype, name="gate")(x_TD, drop)
            y = activate(self.config.activation, gate, y)
        else:
            y = activate(self.config.activation, y)
        down = Linear("tf,fd->td", (ffn, width), self.dtype, rescales_input=True, name="down")
        return down(dropped(self, y, drop), drop)


class Block(nn.Module):
    """One pre-norm layer of either stack, as `nn.scan` wants it."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array, layer: Layer, row: Row) -> tuple[jax.Array, Kept]:
        """Runs the layer.

        Returns:
            The residual stream [T, D]; the layer's own keys and values [T, H, K]; and, where they
            are asked for, those of the encoder's states, as in `Layer.cross`.
        """
        c, dtype, (drop, cross_drop) = self.config, self.dtype, row.drop
        y = RMSNorm(c.norm_eps, dtype, name="attn_norm")(x_TD)
        attn = Attention(c, dtype, name="attn")
        kv = attn.keys_values(y, drop)
        parts = dropped_keys(self, [layer.context, *layer.cached, kv], drop)
        biases = row.biases
        if biases is None:
            biases = RelativeBias(c, dtype, name="relative_bias")(row.buckets)
        seen = zip(parts, row.masks, biases, strict=True)
        y = attn(y, [Part(*part, mask, bias) for part, mask, bias in seen], drop)
        x_TD = x_TD + Adapter(dtype, name="attn_adapter")(dropped(self, y, drop))
        cross = layer.cross
        if row.cross_mask_TS is not None:
            y = RMSNorm(c.norm_eps, dtype, name="cross_norm")(x_TD)
            attn = Attention(c, dtype, name="cross")
            if row.states is not None:
                shared_PD, states_SD = row.states
                cross = attn.keys_values(shared_PD, None), attn.keys_values(states_SD, cross_drop)
            assert cross is not None, "neither states nor their keys and values"
            prefix = [] if layer.cross_prefix is None else [layer.cross_prefix]
            *shared, own = dropped_keys(self, [*prefix, *cross], cross_drop)
            whole = [Part(*part) for part in shared]
            y = attn(y, [*whole, Part(*own, row.cross_mask_TS)], drop)
            x_TD = x_TD + Adapter(dtype, name="cross_adapter")(dropped(self, y, drop))
        y = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x_TD)
        y = dropped(self, MLP(c, dtype, name="mlp")(y, drop), drop)
        x_TD = x_TD + Adapter(dtype, name="mlp_adapter")(y)
        return x_TD, (kv, cross if row.keep_cross else None)
