"""A causal decoder that computes a prompt once a step (the context), and then one row at a time.

A row attends to the context's keys and values in every layer and does not change them:

    context = model.apply(variables, method="prompt_context")              once a step
    x_MD = model.apply(variables, context, row, method="target_states")    one row, a `Rows`
    logits_MV = model.apply(variables, x_MD, method="unembed")

The encoder-decoder (softprompt/models/t5.py) has the same three methods. The first two take a
`Dropout` as their last argument; without it nothing is dropped.

Under `jax.vmap` over rows the context has no batch axis: it is computed once, forward and backward.

Generation uses the context and a cache of the row's own keys and values:

    x_D, input_cache = model.apply(variables, context, tokens_T, length, method="prefill")
    x_TD, kv = model.apply(variables, context, input_cache, cache, tokens_T, positions_T,
                           method="extend")
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from softprompt.models.decoder_layers import (
    UNBOUNDED,
    Block,
    DecoderConfig,
    KeysValues,
    Layer,
    RowInputs,
    attention_case,
    has_shorter_window,
)
from softprompt.models.dropout import Dropout, RowDropout, context_dropout, dropped, row_dropout
from softprompt.models.kernels import REFERENCE, Kernel
from softprompt.models.layers import NORMS, Embed, Linear, Prefix, accumulate, read_delta
from softprompt.models.positions import rotary_table
from softprompt.models.rows import Rows
from softprompt.models.stack import Gather, stack


@struct.dataclass
class Context:
    """Keys (rotated) and values that every row sees before its own tokens. P may be 0.

    It may hold `choices` contexts of equal length, concatenated; a token sees one of them. Or it
    may be padded: then `used`, a scalar, is the number of positions that a token sees, and contexts
    of different lengths share a program.
    """

    k_LPGK: jax.Array
    v_LPGK: jax.Array
    choices: int = struct.field(pytree_node=False, default=1)
    used: jax.Array | None = None

    @property
    def slots(self) -> int:
        """P, the number of positions of one context, padding included."""
        return self.k_LPGK.shape[-3] // self.choices

    @property
    def length(self) -> Any:
        """The number of positions before a row's first token: an int, or `used`."""
        return self.slots if self.used is None else self.used

    def positions(self) -> jax.Array:
        """The position of each key, from 0."""
        return jnp.tile(jnp.arange(self.slots), self.choices)

    def mask(self, which: jax.Array | None) -> jax.Array | None:
        """The mask [..., keys] of tokens that see context number `which` [...].

        None (all keys are seen) if `which` is None, for which there must be a single context, and
        there is no padding.
        """
        if which is None:
            assert self.choices == 1, "`which` is needed where there are several contexts"
            return None if self.used is None else jnp.arange(self.slots) < self.used
        assert self.used is None, "several contexts are not padded"
        return which[..., None] == jnp.repeat(jnp.arange(self.choices), self.slots)


@struct.dataclass
class Cached:
    """Keys (rotated) and values of S slots, which a row's next tokens attend to.

    Attributes:
        k_LSGK: keys of every layer.
        v_LSGK: values of every layer.
        positions_S: the position of each slot's token in the row, from 0, without the context.
        valid_S: true where a slot holds a token of the row.
    """

    k_LSGK: jax.Array
    v_LSGK: jax.Array
    positions_S: jax.Array
    valid_S: jax.Array


@struct.dataclass
class InputCache:
    """The constant state of an input during generation.

    It holds the input's keys and values, its length, and the number of the context that it sees
    (None: there is one context).
    """

    cached: Cached
    length: jax.Array
    which: jax.Array | None = None


class Decoder(nn.Module):
    """The model. Each method takes one row; callers apply `jax.vmap` over rows.

    A soft prompt enters after the scaling of embeddings and before the projection from the
    embedding width to the model's width. Learned positions are added to it as to any token. This is
    what transformers does with `inputs_embeds`, and PEFT with a prompt.

    Dropout (see `dropout`) applies to embeddings, to the output of each sublayer and to the keys of
    attention, as in GPT-2.

    Attributes:
        config: sizes and architecture.
        dtype: dtype of the computation. Norms, biases, softmax and logits are at least float32.
        remat: what the backward pass recomputes, see `stack`.
        gather: see `stack`; None if weights need no gathering.
        unroll: see `stack`.
        attention: the kernel of `hidden` for the cases it supports; others use the reference.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "none"
    gather: Gather | None = None
    unroll: bool = False
    attention: Kernel = REFERENCE

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
        layers = stack(
            Block, length=c.layers, remat=self.remat, gather=self.gather, unroll=self.unroll
        )
        self.layers = layers(c, self.dtype)
        self.prefix = Prefix(self.dtype)
        if c.final_norm:
            self.final_norm = NORMS[c.norm](c.norm_eps, self.dtype)
        if not c.tied:
            self.head = Linear("md,dv->mv", (c.prompt_width, c.vocab), self.dtype, wide=True)

    def empty_context(self) -> Context:
        """The context of the base model without a prompt: no positions."""
        c = self.config
        none = jnp.zeros((c.layers, 0, c.kv_heads, c.head_size), self.dtype)
        return Context(none, none)

    def prompt_context(
        self, dropout: Dropout | None = None, opening_P: jax.Array | None = None
    ) -> Context:
        """The context of all rows: the delta's prefix or prompt, then the opening of all texts.

        A prompt [P, D] is run through the layers; several prompts [N, P, D] make N contexts,
        concatenated. The tokens of the opening are run after the prompt, or after the prefix.
        """
        prefix, prompt = self.prefix(), read_delta(self, "prompt")
        before = self.empty_context() if prefix is None else Context(*prefix)
        if prompt is None and opening_P is None:
            return before
        if prompt is None:
            prompt = jnp.zeros((0, self.config.prompt_width))
        x_NPD = prompt.astype(self.dtype) if prompt.ndim == 3 else prompt.astype(self.dtype)[None]
        if opening_P is not None:
            x_PD = self.embed(opening_P)
            repeated_NPD = jnp.broadcast_to(x_PD, (len(x_NPD), *x_PD.shape))
            x_NPD = jnp.concatenate([x_NPD, repeated_NPD], axis=1)
        return self._context_of(x_NPD, before, dropout)

    def text_context(self, tokens_P: jax.Array) -> Context:
        """The context of a text, such as a hard prompt or few-shot examples."""
        return self._context_of(self.embed(tokens_P)[None], self.empty_context(), None)

    def hidden(self, context: Context, row: Rows, dropout: Dropout | None = None) -> jax.Array:
        """Runs one row after a context.

        Args:
            context: keys and values that every segment of the row sees.
            row: its positions must be below T.
            dropout: with the key of the rows.

        Returns:
            The residual stream after the last layer [T, D], before the final norm.
        """
        tokens_T, segments_T, branches_T = row.tokens, row.segments, row.branches
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = (segments_T[:, None] == segments_T) & (index_T[:, None] >= index_T)
        if branches_T is not None:
            mask_TS &= (branches_T == 0) | (branches_T[:, None] == branches_T)
        drop = row_dropout(dropout, row.examples, segments_T)
        x_TD, positions_T = self.embed(tokens_T), row.positions + context.length
        case = attention_case(
            *(self.config, self.dtype),
            context=context.slots,
            tokens=tokens_T.shape[0],
            branches=branches_T is not None,
        )
        kernel, inputs = self.attention.serving(case), (x_TD, context, mask_TS, positions_T)
        return self._run(*inputs, which=row.which, drop=drop, kernel=(kernel, segments_T))[0]

    def target_states(
        self, context: Context, row: Rows, dropout: Dropout | None = None
    ) -> jax.Array:
        """The head's inputs [M, D] at the positions `row.index`; arguments as for `hidden`."""
        return self.final_states(self.hidden(context, row, dropout)[row.index])

    # The axes of `prefill`'s input cache for `jax.vmap` over inputs.
    input_cache_axes: ClassVar[Any] = InputCache(Cached(1, 1, None, 0), 0, 0)  # type: ignore[arg-type]

    def prefill(
        self,
        context: Context,
        tokens_T: jax.Array,
        length: jax.Array,
        which: jax.Array | None = None,
        *,
        slots: int,
    ) -> tuple[jax.Array, InputCache]:
        """Runs the input of a generation.

        Args:
            context: keys and values that the input sees.
            tokens_T: the input's tokens, padded on the right.
            length: the number of tokens, a scalar, at least 1.
            which: the number of the context that the input sees, a scalar. None: there is one.
            slots: S of the input cache, at least T.

        Returns:
            The residual stream [D] at the last token, and the input cache for `extend`.
        """
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = index_T[:, None] >= index_T
        positions_T = index_T + context.length
        x_TD, kv = self._run(self.embed(tokens_T), context, mask_TS, positions_T, which=which)
        index_S = jnp.arange(slots)
        spare = ((0, 0), (0, slots - index_T.shape[0]), (0, 0), (0, 0))
        k_LSGK, v_LSGK = (jnp.pad(part, spare) for part in kv)
        cached = Cached(k_LSGK, v_LSGK, index_S, index_S < length)
        return x_TD[length - 1], InputCache(cached, length, which)

    def extend(
        self,
        context: Context,
        input_cache: InputCache,
        cache: Cached,
        tokens_T: jax.Array,
        positions_T: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        """Runs the next tokens of one row; they attend to the context, both caches, each other.

        Args:
            context: as for `prefill`.
            input_cache: of the row's input, from `prefill`.
            cache: keys and values of the tokens between the input and these.
            tokens_T: consecutive tokens.
            positions_T: their positions in the row, from 0, without the context.

        Returns:
            The residual stream [T, D], and the tokens' keys and values [L, T, G, K], which the
            caller writes into the cache.
        """
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = index_T[:, None] >= index_T
        x_TD, positions_T = self.embed(tokens_T), positions_T + context.length
        cached = input_cache.cached, cache
        return self._run(x_TD, context, mask_TS, positions_T, cached, which=input_cache.which)

    def logits(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of the residual stream [M, D], at least float32."""
        return self.unembed(self.final_states(x_MD))

    def final_states(self, x_MD: jax.Array) -> jax.Array:
        """The final norm of the residual stream: the head's input."""
        return self.final_norm(x_MD) if self.config.final_norm else x_MD

    def unembed(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of the head's inputs [M, D]."""
        c = self.config
        x_ME = self.project_out(x_MD) if c.embed_width else x_MD
        logits_MV = self.embed.attend(x_ME) if c.tied else self.head(x_ME)
        logits_MV = logits_MV.astype(accumulate(self.dtype))
        if c.final_softcap:
            logits_MV = c.final_softcap * jnp.tanh(logits_MV / c.final_softcap)
        return logits_MV

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        """Logits [T, V] of one text after the trained prompt, if there is one."""
        row = Rows(tokens_T, jnp.ones_like(tokens_T), jnp.arange(tokens_T.shape[0]))
        return self.logits(self.hidden(self.prompt_context(), row))

    def _context_of(self, x_NPD: jax.Array, before: Context, dropout: Dropout | None) -> Context:
        """The context `before`, then N causal sequences of vectors, run as one packed row."""
        choices, length, width = x_NPD.shape
        index = jnp.arange(choices * length)
        mask = index[:, None] >= index
        if choices > 1:
            which = jnp.repeat(jnp.arange(choices), length)
            mask &= which[:, None] == which
        positions = before.length + jnp.tile(jnp.arange(length), choices)
        x_PD = x_NPD.reshape(choices * length, width)
        drop = context_dropout(dropout, choices * length)
        _, (k_LPGK, v_LPGK) = self._run(x_PD, before, mask, positions, drop=drop)
        if before.length:
            assert choices == 1, "a prefix is followed by one sequence"
            k_LPGK = jnp.concatenate([before.k_LPGK, k_LPGK], axis=1)
            v_LPGK = jnp.concatenate([before.v_LPGK, v_LPGK], axis=1)
        return Context(k_LPGK, v_LPGK, choices)

    def _run(
        self,
        x_TD: jax.Array,
        context: Context,
        mask_TS: jax.Array,
        positions_T: jax.Array,
        cached: tuple[Cached, ...] = (),
        which: jax.Array | None = None,
        drop: RowDropout | None = None,
        kernel: tuple[Kernel, jax.Array | None] = (REFERENCE, None),
    ) -> tuple[jax.Array, KeysValues]:
        """Runs the layers on vectors of the embedding width.

        `positions_T` include the context; without a cache they are below P + T. `which` is the
        context that each token sees, [T] or a scalar. `kernel` computes the attention of the row;
        with it come the segments that `mask_TS` describes.
        """
        c = self.config
        if c.embed_width:
            x_TD = self.project_in(x_TD)
        if c.positions == "learned":
            x_TD = x_TD + self.positions(positions_T + c.position_offset)
        x_TD = dropped(self, x_TD, drop)
        table = local = window_L = None
        if c.positions == "rotary":
            size = c.rotary_size or c.head_size
            table = rotary_table(positions_T, size, c.rope_base, c.rope_scaling)
            if c.rope_base_local:
                local = rotary_table(positions_T, size, c.rope_base_local)
        if c.windows:
            window_L = jnp.array([window or UNBOUNDED for window in c.windows])
        span = context.slots + x_TD.shape[0]
        windowed = any(c.windows) if cached else has_shorter_window(c, span)
        earlier = (
            (context.positions(), context.mask(which)),
            *((part.positions_S + context.length, part.valid_S) for part in cached),
        )
        attention, segments_T = kernel
        # Only splash reads the segments; the other kernels need not carry the array.
        segments_T = segments_T if attention.name == "splash" else None
        window_T = positions_T if windowed else None
        row = RowInputs(mask_TS, window_T, table, local, earlier, drop, segments_T, attention)
        kv = tuple((part.k_LSGK, part.v_LSGK) for part in cached)
        depth_L = jnp.arange(1.0, c.layers + 1) if c.scale_by_depth else None
        layers = Layer((context.k_LPGK, context.v_LPGK), window_L, kv, depth_L)
        return self.layers(x_TD, layers, row)
