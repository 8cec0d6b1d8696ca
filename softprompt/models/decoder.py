"""A causal decoder in the form that makes a prompt cheap: a context once, then one row at a time.

Everything that a row sees of its task is a stack of keys and values that the row does not change:

    context = model.apply(variables, method="prompt_context")                   once a step
    x_TD = model.apply(variables, context, tokens_T, ..., method="hidden")      one row

`jax.vmap` over rows leaves the context unbatched: it is computed once, forward and backward.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from softprompt.models.layers import (
    Linear,
    RMSNorm,
    accumulate,
    attend,
    read_delta,
    rotary_table,
    rotate,
)


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a Llama-style decoder (RMSNorm, rotary positions, grouped queries, SwiGLU).

    `context_length` is the largest number of positions, prompt included, that the model was trained
    for. `tied`: the output head is the embedding matrix.
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    context_length: int
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    tied: bool = True


@struct.dataclass
class Context:
    """Keys (rotated) and values that every row sees before its own tokens. P may be 0."""

    k_LPGK: jax.Array
    v_LPGK: jax.Array

    @property
    def length(self) -> int:
        """P, the number of positions the context takes."""
        return self.k_LPGK.shape[-3]


class Attention(nn.Module):
    """Self-attention of a row over `[context; the row]`."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        context: tuple[jax.Array, jax.Array],
        mask_TS: jax.Array,
        table: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the mixed values [T, D], and the row's own keys and values [T, G, K]."""
        c = self.config
        width, size = c.width, c.head_size
        q = Linear("td,dhk->thk", (width, c.heads, size), self.dtype, name="q")(x_TD)
        k = Linear("td,dgk->tgk", (width, c.kv_heads, size), self.dtype, name="k")(x_TD)
        v = Linear("td,dgk->tgk", (width, c.kv_heads, size), self.dtype, name="v")(x_TD)
        q, k = rotate(q, table), rotate(k, table)
        mixed_THK = attend(q, context, (k, v), mask_TS)
        out = Linear("thk,hkd->td", (c.heads, size, width), self.dtype, name="o")(mixed_THK)
        return out, (k, v)


class MLP(nn.Module):
    """SwiGLU feed-forward. Source: arXiv 2002.05202."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_TD: jax.Array) -> jax.Array:
        """Returns [T, D]."""
        width, ffn = self.config.width, self.config.ffn
        gate = Linear("td,df->tf", (width, ffn), self.dtype, name="gate")(x_TD)
        up = Linear("td,df->tf", (width, ffn), self.dtype, name="up")(x_TD)
        return Linear("tf,fd->td", (ffn, width), self.dtype, name="down")(jax.nn.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm layer, as `nn.scan` wants it: carry in, carry and keys/values out."""

    config: DecoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self,
        x_TD: jax.Array,
        context: tuple[jax.Array, jax.Array],
        mask_TS: jax.Array,
        table: tuple[jax.Array, jax.Array],
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns the residual stream [T, D], and this layer's keys and values [T, G, K]."""
        eps = self.config.norm_eps
        y = RMSNorm(eps, self.dtype, name="attn_norm")(x_TD)
        y, kv = Attention(self.config, self.dtype, name="attn")(y, context, mask_TS, table)
        x_TD = x_TD + y
        y = RMSNorm(eps, self.dtype, name="mlp_norm")(x_TD)
        return x_TD + MLP(self.config, self.dtype, name="mlp")(y), kv


class Embed(nn.Module):
    """The embedding matrix, which a tied head reads too."""

    config: DecoderConfig
    dtype: jnp.dtype

    def setup(self) -> None:
        """Declares the matrix."""
        shape = (self.config.vocab, self.config.width)
        self.embedding = self.param("embedding", nn.initializers.normal(0.02), shape)

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        """Rows of the matrix, [T, D]."""
        return self.embedding[tokens_T].astype(self.dtype)

    def attend(self, x_MD: jax.Array) -> jax.Array:
        """Products with every row, [M, V]."""
        matrix_VD = self.embedding.astype(self.dtype)
        acc = accumulate(self.dtype)
        return jnp.einsum("md,vd->mv", x_MD, matrix_VD, preferred_element_type=acc)


class Decoder(nn.Module):
    """The model. Each method takes one row; `jax.vmap` over rows is the caller's.

    Attributes:
        config: sizes.
        dtype: what it computes in. Norms, softmax and logits are at least float32.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.dtype("float32")

    def setup(self) -> None:
        """Declares the modules; the layers are one scanned block with stacked weights [L, ...]."""
        c = self.config
        self.embed = Embed(c, self.dtype)
        self.layers = nn.scan(
            Block,
            variable_axes={"params": 0, "delta": 0, "read": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),
            length=c.layers,
        )(c, self.dtype)
        self.final_norm = RMSNorm(c.norm_eps, self.dtype)
        if not c.tied:
            self.head = Linear("md,dv->mv", (c.width, c.vocab), self.dtype)

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
            positions_T: position of each token in its example, from 0; the context comes before.
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
        x_MD = self.final_norm(x_MD)
        logits_MV = self.embed.attend(x_MD) if self.config.tied else self.head(x_MD)
        return logits_MV.astype(accumulate(self.dtype))

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
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The layers; the rotary table is computed once, outside the scan."""
        table = rotary_table(positions_T, self.config.head_size, self.config.rope_base)
        return self.layers(x_TD, (context.k_LPGK, context.v_LPGK), mask_TS, table)
