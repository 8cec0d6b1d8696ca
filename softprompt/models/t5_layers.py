"""The layers of T5 for one row: attention with a relative bias and without scaling, feed-forward.

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
LayerOutput = tuple[KeysValues, tuple[KeysValues, KeysValues] | None]  # own, and cross-attention's


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and architecture of a T5: 1.0, 1.1 and LM-adapted, Flan-T5, mT5, UMT5, ByT5.

    Attributes:
        vocab: V, rows of the embedding matrix.
        width: D, the width of the residual stream.
        encoder_layers: L of the encoder.
        decoder_layers: L of the decoder.
        heads: H.
        head_size: K; H * K may differ from D.
        ffn: F.
        gated: the feed-forward is act(gate x) * (up x) (1.1 and later), not act(up x) (1.0).
        activation: of the feed-forward, a key of `layers.ACTIVATIONS`.
        tied: the head is the embedding matrix, and its input is scaled by D ** -0.5 (1.0).
        norm_eps: added to the mean square.
        buckets: the number of buckets of the relative bias.
        max_distance: the distance from which the last bucket is used.
        bias_per_layer: each layer has its own relative biases (UMT5); else each stack has.
        context_length: the length it was pretrained with; relative positions have no limit.
        start: the id of the start token of the decoder's sequences.
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
    """The bucket of each distance "key position - query position", computed statically by NumPy.

    Half of the buckets hold one distance each. The others grow logarithmically up to
    `max_distance`, and the last holds all larger distances. Unless `causal`, half of the buckets
    are for keys after the query.
    """
    after = np.zeros_like(distance)
    if causal:
        size = np.maximum(-distance, 0)
    else:
        buckets //= 2
        after, size = buckets * (distance > 0), np.abs(distance)
    exact = buckets // 2
    ratio = np.log(np.maximum(size, exact) / exact) / math.log(max_distance / exact)
    # 1e-9 keeps a distance at the edge of two buckets, such as 16, in the upper one.
    grown = exact + np.floor(ratio * (buckets - exact) + 1e-9).astype(distance.dtype)
    return after + np.where(size < exact, size, np.minimum(grown, buckets - 1))


def buckets_within(config: T5Config, causal: bool, length: int) -> np.ndarray:
    """The bucket of each pair of a row's positions [T, S].

    It is the same for all rows, because a segment's positions are adjacent. Under `vmap` the biases
    are therefore computed once.
    """
    index_T = np.arange(length)
    return _bucket_of(config, causal, index_T - index_T[:, None])


def buckets_before(
    config: T5Config, causal: bool, positions_T: jax.Array, positions_S: jax.Array
) -> jax.Array:
    """The bucket of each pair of a position and an earlier key [T, S]."""
    furthest = config.max_distance  # the last bucket holds all larger distances
    by_distance = jnp.asarray(_bucket_of(config, causal, -np.arange(furthest + 1)))
    return by_distance[jnp.clip(positions_T[:, None] - positions_S, 0, furthest)]


def _bucket_of(config: T5Config, causal: bool, distance: np.ndarray) -> np.ndarray:
    sizes = {"buckets": config.buckets, "max_distance": config.max_distance}
    return bucket(distance, **sizes, causal=causal)


class RelativeBias(nn.Module):
    """The bias of self-attention scores, a function of the distance i - j."""

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
    """Inputs that differ between layers; `nn.scan` takes them from arrays [L, ...].

    `cross` holds the keys and values of the encoder states of the context and of the row, if they
    are computed already. `cross_prefix` holds the trained keys and values of cross-attention.
    """

    context: KeysValues
    cached: tuple[KeysValues, ...] = ()
    cross: tuple[KeysValues, KeysValues] | None = None
    cross_prefix: KeysValues | None = None


@struct.dataclass
class RowInputs:
    """Inputs of a row that are the same for all layers.

    Attributes:
        masks: the masks of the keys of the context (None: all are seen), of each cached part and
            of the row.
        biases: the stack's relative biases of the same keys; None if each layer has its own.
        buckets: the buckets of the layers' own biases, [T, S] for each part; else ().
        states: encoder states of the context [P, D] and of the row [S, D]; None in the encoder, and
            if `Layer.cross` has their keys and values.
        cross_mask_TS: which of the row's encoder states each position sees.
        drop: the dropout masks of the positions, and of the encoder's positions in cross-attention;
            None if nothing is dropped.
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
    """Self- or cross-attention; the caller passes the keys and values."""

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
    """One pre-norm layer of either stack, in the form of `nn.scan`."""

    config: T5Config
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_TD: jax.Array, layer: Layer, row: RowInputs
    ) -> tuple[jax.Array, LayerOutput]:
        """Runs the layer.

        Returns:
            The residual stream [T, D]; the layer's own keys and values [T, H, K]; and, with
            `keep_cross`, those of the encoder's states, as in `Layer.cross`.
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
            assert cross is not None, "cross-attention needs states, or their keys and values"
            prefix = [] if layer.cross_prefix is None else [layer.cross_prefix]
            *shared, own = dropped_keys(self, [*prefix, *cross], cross_drop)
            unmasked = [Part(*part) for part in shared]
            y = attn(y, [*unmasked, Part(*own, row.cross_mask_TS)], drop)
            x_TD = x_TD + Adapter(dtype, name="cross_adapter")(dropped(self, y, drop))
        y = RMSNorm(c.norm_eps, dtype, name="mlp_norm")(x_TD)
        y = dropped(self, MLP(c, dtype, name="mlp")(y, drop), drop)
        x_TD = x_TD + Adapter(dtype, name="mlp_adapter")(y)
        return x_TD, (kv, cross if row.keep_cross else None)
