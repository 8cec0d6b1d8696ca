"""A causal decoder in the form that makes a prompt cheap: a context once, then one row at a time.

Everything that a row sees of its task is a stack of keys and values that the row does not change:

    context = model.apply(variables, method="prompt_context")                   once a step
    x_TD = model.apply(variables, context, tokens_T, ..., method="hidden")      one row

`jax.vmap` over rows leaves the context unbatched: it is computed once, forward and backward.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from softprompt.models.layers import (
    ACTIVATIONS,
    NORMS,
    Embed,
    Linear,
    RopeScaling,
    accumulate,
    attend,
    read_delta,
    rotary_table,
    rotate,
    window_masks,
)
from softprompt.models.stack import Gather, stack


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a decoder is built of; the defaults are a Llama's.

    Attributes:
        vocab: V, rows of the embedding matrix.
        width: D, of the residual stream.
        layers: L.
        heads: H, of queries.
        kv_heads: G, of keys and values.
        head_size: K.
        ffn: F.
        context_length: largest number of positions, prompt included, that it was trained for.
        tied: the output head is the embedding matrix.
        embed_width: of the embedding matrix, and so of a prompt, where it is not `width` and
            projections lead in and out (OPT-350m); 0 where it is.
        embed_scale: what token embeddings are multiplied by (Gemma). A prompt is not: it enters
            after the scaling.
        final_softcap: c in c tanh(logit / c); 0 for none.
        positions: "rotary" or "learned". Both count from 0 with the prompt's first vector.
        position_offset: rows of the learned matrix before that of position 0 (OPT).
        rope_base: of rotary positions.
        rope_base_local: of layers with a window, where those differ; 0 where they do not.
        rope_scaling: of layers without a window of their own base.
        rotary_size: entries of a head that are rotated, where not all are; 0 for all.
        windows: for each layer, how many positions back it sees, its own included; 0 for all. ()
            where no layer has a window. The context leaves a window like any other token.
        query_scale: what queries are multiplied by; 0 for head_size ** -0.5.
        attn_softcap: as `final_softcap`, of attention scores.
        qk_norm: queries and keys are normalised, head by head, before they are rotated.
        qkv_bias: the projections to queries, keys and values have biases.
        out_bias: the projection of attention's output has a bias.
        mlp_bias: the feed-forward's projections have biases.
        gated: the feed-forward is act(gate x) * (up x), not act(up x).
        activation: of the feed-forward, a name of `layers.ACTIVATIONS`.
        norm: "rms" or "layer".
        norm_eps: added to the mean square.
        norms: "before" attention and feed-forward; "both", before them and on what they add
            (Gemma 2); "after", on the sum (OPT-350m).
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
class Context:
    """Keys (rotated) and values that every row sees before its own tokens. P may be 0."""

    k_LPGK: jax.Array
    v_LPGK: jax.Array

    @property
    def length(self) -> int:
        """P, the number of positions the context takes."""
        return self.k_LPGK.shape[-3]


@struct.dataclass
class Layer:
    """What differs from layer to layer, scanned along the first axis: [L, ...] outside."""

    context: tuple[jax.Array, jax.Array]
    window: jax.Array | None  # a scalar; None where no layer of the model has a window


@struct.dataclass
class Row:
    """What all layers are told of the row.

    `positions_T` is there when a window can end inside the row or its context; `local` is the
    rotary table of layers with a window, where they have their own.
    """

    mask_TS: jax.Array
    positions_T: jax.Array | None
    table: tuple[jax.Array, jax.Array] | None
    local: tuple[jax.Array, jax.Array] | None


KeysValues = tuple[jax.Array, jax.Array]
UNBOUNDED = 2**30  # the window of a layer that sees everything


class Attention(nn.Module):
    """Self-attention of a row over `[context; the row]`."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array, layer: Layer, row: Row) -> tuple[jax.Array, KeysValues]:
        """Returns the mixed values [T, D], and the row's own keys and values [T, G, K]."""
        c, dtype = self.config, self.dtype
        wide, narrow = ((c.width, n, c.head_size) for n in (c.heads, c.kv_heads))
        q = Linear("td,dhk->thk", wide, dtype, c.qkv_bias, name="q")(x_TD)
        k = Linear("td,dgk->tgk", narrow, dtype, c.qkv_bias, name="k")(x_TD)
        v = Linear("td,dgk->tgk", narrow, dtype, c.qkv_bias, name="v")(x_TD)
        if c.qk_norm:
            q = NORMS[c.norm](c.norm_eps, dtype, name="q_norm")(q)
            k = NORMS[c.norm](c.norm_eps, dtype, name="k_norm")(k)
        if row.table is not None:
            table = _table(layer, row)
            q, k = rotate(q, table), rotate(k, table)
        masks: tuple[jax.Array | None, jax.Array] = None, row.mask_TS
        if layer.window is not None and row.positions_T is not None:
            length = layer.context[0].shape[0]
            masks = window_masks(layer.window, row.mask_TS, row.positions_T, length)
        scale = c.query_scale or c.head_size**-0.5
        mixed_THK = attend(q, layer.context, (k, v), masks, scale=scale, softcap=c.attn_softcap)
        shape = (c.heads, c.head_size, c.width)
        return Linear("thk,hkd->td", shape, dtype, c.out_bias, name="o")(mixed_THK), (k, v)


def _table(layer: Layer, row: Row) -> Any:
    """The layer's rotary table: chosen by its window, for a scan has no branches."""
    if row.local is None or layer.window is None:
        return row.table
    has_window = layer.window < UNBOUNDED
    return jax.tree.map(lambda a, b: jnp.where(has_window, a, b), row.local, row.table)


class MLP(nn.Module):
    """Feed-forward, gated or plain. Source: arXiv 2002.05202."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """Returns [T, D]."""
        c, dtype = self.config, self.dtype
        act, bias = ACTIVATIONS[c.activation], c.mlp_bias
        x_TF = Linear("td,df->tf", (c.width, c.ffn), dtype, bias, name="up")(x_TD)
        if c.gated:
            gate_TF = Linear("td,df->tf", (c.width, c.ffn), dtype, bias, name="gate")(x_TD)
            x_TF = act(gate_TF) * x_TF
        else:
            x_TF = act(x_TF)
        return Linear("tf,fd->td", (c.ffn, c.width), dtype, bias, name="down")(x_TF)


class Block(nn.Module):
    """One layer, as `nn.scan` wants it: carry in, carry and keys/values out."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array, layer: Layer, row: Row) -> tuple[jax.Array, KeysValues]:
        """Returns the residual stream [T, D], and this layer's keys and values [T, G, K]."""
        c = self.config

        def norm(x_TD: jax.Array, name: str, *places: str) -> jax.Array:
            here = c.norms in places
            return NORMS[c.norm](c.norm_eps, self.dtype, name=name)(x_TD) if here else x_TD

        y_TD = norm(x_TD, "attn_norm", "before", "both")
        y_TD, kv = Attention(c, self.dtype, name="attn")(y_TD, layer, row)
        y_TD = norm(y_TD, "attn_post_norm", "both")
        mid_TD = norm(x_TD + y_TD, "attn_norm", "after")
        y_TD = norm(x_TD if c.parallel else mid_TD, "mlp_norm", "before", "both")
        y_TD = MLP(c, self.dtype, name="mlp")(y_TD)
        y_TD = norm(y_TD, "mlp_post_norm", "both")
        return norm(mid_TD + y_TD, "mlp_norm", "after"), kv


class Decoder(nn.Module):
    """The model. Each method takes one row; `jax.vmap` over rows is the caller's.

    A soft prompt enters after the embeddings' scaling and before what leads from the embedding
    width into the model's; with learned positions it gets its positions added like any token. It is
    what transformers does with `inputs_embeds`, and PEFT with a prompt.

    Attributes:
        config: sizes and parts.
        dtype: what it computes in. Norms, biases, softmax and logits are at least float32.
        gather: see `stack`; None where weights lie as they are computed with.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    gather: Gather | None = None

    def setup(self) -> None:
        """Declares the modules; the layers are one scanned block with stacked weights [L, ...]."""
        c = self.config
        self.embed = Embed(c.vocab, c.prompt_width, self.dtype, c.embed_scale)
        if c.embed_width:
            self.project_in = Linear("te,ed->td", (c.embed_width, c.width), self.dtype)
            self.project_out = Linear("md,de->me", (c.width, c.embed_width), self.dtype)
        if c.positions == "learned":
            rows = c.context_length + c.position_offset
            self.positions = Embed(rows, c.width, self.dtype)
        axes = (0, nn.broadcast)
        layers = stack(Block, length=c.layers, in_axes=axes, gather=self.gather)
        self.layers = layers(c, self.dtype)
        if c.final_norm:
            self.final_norm = NORMS[c.norm](c.norm_eps, self.dtype)
        if not c.tied:
            self.head = Linear("md,dv->mv", (c.prompt_width, c.vocab), self.dtype)

    def empty_context(self) -> Context:
        """The context of the plain base model: no positions."""
        c = self.config
        none = jnp.zeros((c.layers, 0, c.kv_heads, c.head_size), self.dtype)
        return Context(none, none)

    def prompt_context(self) -> Context:
        """The context of the trained variable "prompt" [P, D]; empty where there is none."""
        prompt_PD = read_delta(self, "prompt")
        if prompt_PD is None:
            return self.empty_context()
        return self._context_of(prompt_PD.astype(self.dtype))

    def text_context(self, tokens_P: jax.Array) -> Context:
        """The context of a text: a hard prompt, or few-shot examples."""
        return self._context_of(self.embed(tokens_P))

    def hidden(
        self,
        context: Context,
        tokens_T: jax.Array,
        segments_T: jax.Array,
        positions_T: jax.Array,
        branches_T: jax.Array | None = None,
    ) -> jax.Array:
        """Runs one row after a context.

        Args:
            context: what every segment of the row sees.
            tokens_T: token ids; several examples may share the row.
            segments_T: which example a token belongs to; it sees that example only. 0 is padding.
            positions_T: position of each token in its example, from 0 and below T; the context
                comes before.
            branches_T: 0 for what a segment's branches share, else the branch (a candidate answer);
                a token sees the shared part and its own branch.

        Returns:
            The residual stream after the last layer [T, D]; `logits` normalises what it is given.
        """
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = (segments_T[:, None] == segments_T) & (index_T[:, None] >= index_T)
        if branches_T is not None:
            mask_TS &= (branches_T == 0) | (branches_T[:, None] == branches_T)
        x_TD, _ = self._run(self.embed(tokens_T), context, mask_TS, positions_T + context.length)
        return x_TD

    def logits(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of positions of the residual stream, at least float32."""
        c = self.config
        x_MD = self.final_norm(x_MD) if c.final_norm else x_MD
        x_ME = self.project_out(x_MD) if c.embed_width else x_MD
        logits_MV = self.embed.attend(x_ME) if c.tied else self.head(x_ME)
        logits_MV = logits_MV.astype(accumulate(self.dtype))
        if c.final_softcap:
            logits_MV = c.final_softcap * jnp.tanh(logits_MV / c.final_softcap)
        return logits_MV

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        """Logits [T, V] of one plain text after the trained prompt, if there is one."""
        same_T = jnp.ones_like(tokens_T)
        positions_T = jnp.arange(tokens_T.shape[0])
        return self.logits(self.hidden(self.prompt_context(), tokens_T, same_T, positions_T))

    def _context_of(self, x_PD: jax.Array) -> Context:
        """Runs vectors as their own causal sequence and keeps the keys and values."""
        index_P = jnp.arange(x_PD.shape[0])
        mask_PS = index_P[:, None] >= index_P
        _, (k_LPGK, v_LPGK) = self._run(x_PD, self.empty_context(), mask_PS, index_P)
        return Context(k_LPGK, v_LPGK)

    def _run(
        self, x_TD: jax.Array, context: Context, mask_TS: jax.Array, positions_T: jax.Array
    ) -> tuple[jax.Array, KeysValues]:
        """The layers, from vectors of the embedding width; what they share is computed once."""
        c = self.config
        if c.embed_width:
            x_TD = self.project_in(x_TD)
        if c.positions == "learned":
            x_TD = x_TD + self.positions(positions_T + c.position_offset)
        table = local = window_L = None
        if c.positions == "rotary":
            size = c.rotary_size or c.head_size
            table = rotary_table(positions_T, size, c.rope_base, c.rope_scaling)
            if c.rope_base_local:
                local = rotary_table(positions_T, size, c.rope_base_local)
        if c.windows:
            window_L = jnp.array([window or UNBOUNDED for window in c.windows])
        reach = context.length + x_TD.shape[0]
        cuts = any(0 < window < reach for window in c.windows)
        row = Row(mask_TS, positions_T if cuts else None, table, local)
        return self.layers(x_TD, Layer((context.k_LPGK, context.v_LPGK), window_L), row)
