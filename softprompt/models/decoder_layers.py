"""The layers of a decoder for one row (no batch axis), and the decoder's config."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from softprompt.models.attention import Part
from softprompt.models.dropout import RowDropout, dropped, dropped_keys
from softprompt.models.kernels import REFERENCE, Case, Kernel, attend
from softprompt.models.layers import NORMS, Adapter, Linear, activate
from softprompt.models.positions import RopeScaling, rotate, within

KeysValues = tuple[jax.Array, jax.Array]
UNBOUNDED = 2**30  # the window of a layer that sees everything


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and architecture of a decoder; the defaults are those of Llama.

    Attributes:
        vocab: V, rows of the embedding matrix.
        width: D, the width of the residual stream.
        layers: L.
        heads: H, the number of query heads.
        kv_heads: G, the number of key and value heads.
        head_size: K.
        ffn: F.
        context_length: largest number of positions it was trained for, prompt included.
        tied: the output head is the embedding matrix.
        embed_width: width of the embedding matrix and of a prompt if projections lead from it to
            `width` and back (OPT-350m); 0 if it equals `width`.
        embed_scale: factor of the token embeddings (Gemma). A prompt enters after the scaling and
            is not multiplied by it.
        final_softcap: c in c tanh(logit / c); 0 for none.
        positions: "rotary" or "learned". Position 0 is the prompt's first vector in both.
        position_offset: rows of the learned matrix before the row of position 0 (OPT).
        rope_base: base of the rotary frequencies.
        rope_base_local: base in layers with a window, if it differs; else 0.
        rope_scaling: scaling of the frequencies of `rope_base`.
        rotary_size: number of a head's entries that are rotated; 0 for all.
        windows: for each layer, the number of positions a token sees, its own included; 0 for all.
            () if no layer has a window. A window limits the context like any other token.
        query_scale: factor of the queries; 0 for head_size ** -0.5.
        scale_by_depth: the queries of layer n, from 1, are divided by n (GPT-2 in Mistral's runs).
        attn_softcap: as `final_softcap`, for attention scores.
        qk_norm: queries and keys are normalised for each head before the rotation.
        qkv_bias: the projections to queries, keys and values have biases.
        out_bias: the projection of attention's output has a bias.
        mlp_bias: the feed-forward's projections have biases.
        gated: the feed-forward is act(gate x) * (up x), not act(up x).
        activation: of the feed-forward, a key of `layers.ACTIVATIONS`.
        norm: "rms" or "layer".
        norm_eps: added to the mean square.
        norms: "before" attention and feed-forward; "both", before them and on their outputs
            (Gemma 2); "after", on the residual sum (OPT-350m).
        final_norm: there is a norm before the head.
        parallel: attention and feed-forward read the same input (GPT-NeoX).
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    context_length: int
    tied: bool = True
    embed_width: int = 0
    embed_scale: float = 1.0
    final_softcap: float = 0.0
    positions: str = "rotary"
    position_offset: int = 0
    rope_base: float = 10000.0
    rope_base_local: float = 0.0
    rope_scaling: RopeScaling | None = None
    rotary_size: int = 0
    windows: tuple[int, ...] = ()
    query_scale: float = 0.0
    scale_by_depth: bool = False
    attn_softcap: float = 0.0
    qk_norm: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    gated: bool = True
    activation: str = "silu"
    norm: str = "rms"
    norm_eps: float = 1e-5
    norms: str = "before"
    final_norm: bool = True
    parallel: bool = False

    @property
    def prompt_width(self) -> int:
        """Width of the embedding matrix and of a prompt's vectors."""
        return self.embed_width or self.width


@struct.dataclass
class Layer:
    """Inputs that differ between layers; `nn.scan` takes them from arrays [L, ...]."""

    context: KeysValues
    window: jax.Array | None  # a scalar; None where no layer of the model has a window
    cached: tuple[KeysValues, ...] = ()
    depth: jax.Array | None = None  # a scalar, from 1; None without `scale_by_depth`


@struct.dataclass
class RowInputs:
    """Inputs of a row that are the same for all layers.

    Attributes:
        mask_TS: which positions of the row each position sees.
        positions_T: None unless a layer's window is shorter than context and row.
        table: the rotary table.
        local: the rotary table of layers with a window, if it differs.
        earlier: for the context and for each cached part, the positions [S] of its keys, context
            included, and which of them are seen, [S] or [T, S] (None: all).
        drop: the dropout masks of the row's positions; None if nothing is dropped.
        segments_T: what splash reads instead of `mask_TS`.
        kernel: computes the attention.
    """

    mask_TS: jax.Array
    positions_T: jax.Array | None
    table: tuple[jax.Array, jax.Array] | None
    local: tuple[jax.Array, jax.Array] | None
    earlier: tuple[tuple[jax.Array, jax.Array | None], ...]
    drop: RowDropout | None = None
    segments_T: jax.Array | None = None
    kernel: Kernel = struct.field(pytree_node=False, default=REFERENCE)


def attention_case(
    config: DecoderConfig,
    dtype: jnp.dtype,
    *,
    context: int,
    tokens: int | None = None,
    branches: bool = False,
) -> Case:
    """The case of attention in a row of `tokens` tokens after a context of `context` positions."""
    span = None if tokens is None else context + tokens
    return Case(
        dtype=jnp.dtype(dtype).name,
        head_size=config.head_size,
        tokens=tokens,
        softcap=config.attn_softcap > 0,
        window=span is not None and has_shorter_window(config, span),
        branches=branches,
    )


def has_shorter_window(config: DecoderConfig, span: int) -> bool:
    """Whether a layer's window is shorter than `span` positions."""
    return any(0 < window < span for window in config.windows)


class Attention(nn.Module):
    """Self-attention of a row to the context, the cache and the row itself."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_TD: jax.Array, layer: Layer, row: RowInputs
    ) -> tuple[jax.Array, KeysValues]:
        """Returns the output [T, D], and the row's own keys and values [T, G, K]."""
        c, dtype = self.config, self.dtype
        wide, narrow = ((c.width, n, c.head_size) for n in (c.heads, c.kv_heads))
        q = Linear("td,dhk->thk", wide, dtype, c.qkv_bias, name="q")(x_TD, row.drop)
        k = Linear("td,dgk->tgk", narrow, dtype, c.qkv_bias, name="k")(x_TD, row.drop)
        v = Linear("td,dgk->tgk", narrow, dtype, c.qkv_bias, name="v")(x_TD, row.drop)
        if c.qk_norm:
            q = NORMS[c.norm](c.norm_eps, dtype, name="q_norm")(q)
            k = NORMS[c.norm](c.norm_eps, dtype, name="k_norm")(k)
        if row.table is not None:
            table = _table(layer, row)
            q, k = rotate(q, table), rotate(k, table)
        if layer.depth is not None:
            q = (q / layer.depth).astype(dtype)
        parts = dropped_keys(self, [layer.context, *layer.cached, (k, v)], row.drop)
        seen = [Part(*kv, mask) for kv, mask in zip(parts, _masks(layer, row), strict=True)]
        mixed_THK = attend(
            q,
            [*seen[:-1], seen[-1]._replace(segments_T=row.segments_T)],
            scale=c.query_scale or c.head_size**-0.5,
            softcap=c.attn_softcap,
            kernel=row.kernel,
        )
        shape = (c.heads, c.head_size, c.width)
        o = Linear("thk,hkd->td", shape, dtype, c.out_bias, name="o")
        return o(mixed_THK, row.drop), (k, v)


def _table(layer: Layer, row: RowInputs) -> Any:
    """The layer's rotary table, selected by its window with `where`, as `nn.scan` needs."""
    if row.local is None or layer.window is None:
        return row.table
    has_window = layer.window < UNBOUNDED
    return jax.tree.map(lambda a, b: jnp.where(has_window, a, b), row.local, row.table)


def _masks(layer: Layer, row: RowInputs) -> list[jax.Array | None]:
    """The masks of each query for the context, each cached part and the row."""
    masks = [*(seen for _, seen in row.earlier), row.mask_TS]
    if layer.window is None or row.positions_T is None:
        return masks
    positions = [*(positions_S for positions_S, _ in row.earlier), row.positions_T]
    near = [within(layer.window, row.positions_T, keys_S) for keys_S in positions]
    return [a if mask is None else a & mask for a, mask in zip(near, masks, strict=True)]


class MLP(nn.Module):
    """Feed-forward, gated or plain. Source: arXiv 2002.05202."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array, drop: RowDropout | None) -> jax.Array:
        """Returns [T, D]."""
        c, dtype, bias = self.config, self.dtype, self.config.mlp_bias
        x_TF = Linear("td,df->tf", (c.width, c.ffn), dtype, bias, name="up")(x_TD, drop)
        if c.gated:
            gate_TF = Linear("td,df->tf", (c.width, c.ffn), dtype, bias, name="gate")(x_TD, drop)
            x_TF = activate(c.activation, gate_TF, x_TF)
        else:
            x_TF = activate(c.activation, x_TF)
        shape = (c.ffn, c.width)
        down = Linear("tf,fd->td", shape, dtype, bias, rescales_input=True, name="down")
        return down(x_TF, drop)


class Block(nn.Module):
    """One layer in the form of `nn.scan`; the carry is the residual stream."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, x_TD: jax.Array, layer: Layer, row: RowInputs
    ) -> tuple[jax.Array, KeysValues]:
        """Returns the residual stream [T, D], and this layer's keys and values [T, G, K]."""
        c = self.config

        def norm(x_TD: jax.Array, name: str, *placements: str) -> jax.Array:
            used = c.norms in placements
            return NORMS[c.norm](c.norm_eps, self.dtype, name=name)(x_TD) if used else x_TD

        y_TD = norm(x_TD, "attn_norm", "before", "both")
        y_TD, kv = Attention(c, self.dtype, name="attn")(y_TD, layer, row)
        y_TD = Adapter(self.dtype, name="attn_adapter")(dropped(self, y_TD, row.drop))
        y_TD = norm(y_TD, "attn_post_norm", "both")
        mid_TD = norm(x_TD + y_TD, "attn_norm", "after")
        y_TD = norm(x_TD if c.parallel else mid_TD, "mlp_norm", "before", "both")
        y_TD = dropped(self, MLP(c, self.dtype, name="mlp")(y_TD, row.drop), row.drop)
        y_TD = Adapter(self.dtype, name="mlp_adapter")(y_TD)
        y_TD = norm(y_TD, "mlp_post_norm", "both")
        return norm(mid_TD + y_TD, "mlp_norm", "after"), kv
