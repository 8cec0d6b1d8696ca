"""T5, an encoder-decoder, which runs one row at a time; callers apply `jax.vmap` over rows.

A trained prompt precedes the encoder's input, the decoder's, or both: the variables
"encoder/prompt" and "decoder/prompt" [P, D]. It has one of two forms.

Inline (`prompt_to_input`, as in the paper): each segment of a row has its own copy. The row has P
slots before the segment's tokens, in the same segment; `Rows.prompt_index` is 0..P-1 there and -1
elsewhere, and the slots' token ids are ignored. Several prompts [N, P, D] are concatenated to
N * P vectors, which `prompt_index` numbers. In the encoder, prompt and input attend to each other;
the decoder's prompt is causal and sees the input by cross-attention.

Context (`prompt_to_input` off): the prompt does not see the input, so it is the same for all rows.
It is computed once a step, and every segment sees it as if it came right before its tokens.

    contexts = model.apply(variables, method="prompt_context")                once a step
    states_SD = model.apply(variables, contexts, row.encoder, method="encode")    one row
    x_TD = model.apply(variables, contexts, states_SD, row, method="decode")      one row

With inline prompts the contexts are empty and the calls are the same. A segment's positions, its
slots first, must be adjacent in the row, because the relative bias is computed from row indices.

Generation uses `prefill` and `extend`, as in a decoder. The input cache also holds the keys and
values for cross-attention, which are computed once.
"""

from dataclasses import replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from softprompt.models.decoder import Cached, Context
from softprompt.models.dropout import Dropout, RowDropout, row_dropout
from softprompt.models.layers import Embed, Linear
from softprompt.models.rows import Rows
from softprompt.models.stack import Gather
from softprompt.models.t5_layers import KeysValues, T5Config
from softprompt.models.t5_stack import Stack


@struct.dataclass
class Contexts:
    """Keys, values and states of prompts that do not see the input; each may be empty.

    `encoder` and `decoder` hold keys and values for self-attention. `states_PD` are the encoder's
    final states of its prompt, for the decoder's cross-attention; `cross` are the trained keys and
    values of cross-attention, or None.
    """

    encoder: Context
    states_PD: jax.Array
    decoder: Context
    cross: Context | None = None


@struct.dataclass
class InputCache:
    """The constant state of an input during generation.

    Attributes:
        shared: keys and values [L, P, H, K] of the contexts' states, for cross-attention; the same
            for every input.
        cross: keys and values [L, S, H, K] of the input's own encoder states.
        valid_S: true where a state is of a token or of a prompt's slot.
        cached: keys and values of the decoder's inline slots and start token.
        length: the number of positions in `cached`.
    """

    shared: KeysValues
    cross: KeysValues
    valid_S: jax.Array
    cached: Cached
    length: jax.Array


class T5(nn.Module):
    """The model. Each method takes one row.

    Dropout (see `dropout`) applies to embeddings, to the output of each sublayer, inside the
    feed-forward, after the final norms, and to the keys of attention, as in T5X.

    Attributes:
        config: sizes and architecture.
        dtype: of the computation. Norms, softmax, relative biases and logits are at least float32.
        prompt_to_input: whether a prompt sees the input; see the module's docstring.
        remat: what the backward pass recomputes, see `stack`.
        gather: see `stack`; None if weights need no gathering.
        unroll: see `stack`.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.dtype("float32")
    prompt_to_input: bool = True
    remat: str = "none"
    gather: Gather | None = None
    unroll: bool = False

    def setup(self) -> None:
        """Declares the embeddings, the two stacks, and the head unless it is tied."""
        c = self.config
        self.embed = Embed(c.vocab, c.width, self.dtype)
        options = self.remat, self.gather, self.unroll
        self.encoder = Stack(c, c.encoder_layers, False, self.dtype, *options)
        self.decoder = Stack(c, c.decoder_layers, True, self.dtype, *options)
        if not c.tied:
            self.head = Linear("md,dv->mv", (c.width, c.vocab), self.dtype, wide=True)

    def prompt_context(self, dropout: Dropout | None = None) -> Contexts:
        """The contexts of the trained prefixes and, unless they are inline, of the prompts."""
        cross = self.decoder.cross_context()
        if self.prompt_to_input:
            none = jnp.zeros((0, self.config.width), self.dtype)
            encoder, decoder = self.encoder.prefix_context(), self.decoder.prefix_context()
            return Contexts(encoder, none, decoder, cross)
        encoder, states_PD = self.encoder.prompt_context(dropout)
        decoder, _ = self.decoder.prompt_context(dropout)
        return Contexts(encoder, states_PD, decoder, cross)

    def encode(self, contexts: Contexts, row: Rows, drop: RowDropout | None = None) -> jax.Array:
        """Runs one row of the encoder.

        Args:
            contexts: keys and values that every segment sees.
            row: the encoder's; its positions give distances to the context only.
            drop: the dropout masks of its positions.

        Returns:
            Normalised states [S, D], including those of the prompt's slots.
        """
        x_SD = self.encoder.with_prompt(self.embed(row.tokens), row.prompt_index)
        mask_SS = row.segments[:, None] == row.segments
        drops = (drop, None)
        x_SD, _ = self.encoder(x_SD, contexts.encoder, mask_SS, row.positions, drop=drops)
        return self.encoder.final_states(x_SD, drop)

    def decode(
        self,
        contexts: Contexts,
        states_SD: jax.Array,
        row: Rows,
        drop: tuple[RowDropout | None, RowDropout | None] = (None, None),
    ) -> jax.Array:
        """Runs one row of the decoder.

        Args:
            contexts: keys and values that every segment sees.
            states_SD: the states of `row.encoder`, from `encode`.
            row: the decoder's. Each sequence begins with the start token; each branch is a complete
                sequence with its own start token and slots.
            drop: the dropout masks of its positions, and of the encoder's.

        Returns:
            The residual stream after the last layer [T, D], before the final norm.
        """
        assert row.encoder is not None, "the decoder's row needs the encoder's in `row.encoder`"
        x_TD = self.decoder.with_prompt(self.embed(row.tokens), row.prompt_index)
        index_T = jnp.arange(row.tokens.shape[0])
        mask_TS = (row.segments[:, None] == row.segments) & (index_T[:, None] >= index_T)
        if row.branches is not None:
            mask_TS &= row.branches[:, None] == row.branches
        x_TD, _ = self.decoder(
            x_TD,
            contexts.decoder,
            mask_TS,
            row.positions,
            states=(contexts.states_PD, states_SD),
            cross_mask_TS=row.segments[:, None] == row.encoder.segments,
            cross_prefix=contexts.cross,
            drop=drop,
        )
        return x_TD

    def target_states(
        self, contexts: Contexts, row: Rows, dropout: Dropout | None = None
    ) -> jax.Array:
        """The head's inputs [M, D] at the decoder's positions `row.index`."""
        assert row.encoder is not None, "the decoder's row needs the encoder's in `row.encoder`"
        drop = row_dropout(dropout, row.examples, row.segments)
        encoder_drop = row_dropout(dropout, row.examples, row.encoder.segments)
        states_SD = self.encode(contexts, row.encoder, encoder_drop)
        x_TD = self.decode(contexts, states_SD, row, (drop, encoder_drop))
        return self.decoder.final_states(x_TD[row.index], drop and drop.at(row.index))

    # The axes of `prefill`'s input cache for `jax.vmap` over inputs.
    _axes = Cached(1, 1, None, None)  # type: ignore[arg-type]
    input_cache_axes: ClassVar[Any] = InputCache(None, 1, 0, _axes, None)  # type: ignore[arg-type]

    def prefill(
        self,
        contexts: Contexts,
        tokens_S: jax.Array,
        length: jax.Array,
        which: jax.Array | None = None,
        *,
        slots: int,
    ) -> tuple[jax.Array, InputCache]:
        """Encodes an input, and runs the decoder on its inline prompt and the start token.

        Args:
            contexts: keys and values that the input sees.
            tokens_S: the input's tokens, padded on the right.
            length: the number of tokens, a scalar.
            which: the number of the input's prompt, a scalar. None: there is one prompt.
            slots: size of the input cache for the input's tokens, at least S.

        Returns:
            The decoder's residual stream [D] at the start token, and the input cache for `extend`.
        """
        spare = slots - tokens_S.shape[0]
        encoder = self._plain_row(self.encoder, tokens_S, which)
        inline = encoder.tokens.shape[0] - tokens_S.shape[0]
        valid_S = jnp.arange(encoder.tokens.shape[0]) < inline + length
        states_SD = self.encode(contexts, replace(encoder, segments=valid_S))
        start_1 = jnp.full(1, self.config.start, tokens_S.dtype)
        row = self._plain_row(self.decoder, start_1)
        index_T = jnp.arange(row.tokens.shape[0])
        x_TD, (kv, cross) = self.decoder(
            self.decoder.with_prompt(self.embed(row.tokens), row.prompt_index),
            contexts.decoder,
            index_T[:, None] >= index_T,
            index_T,
            states=(contexts.states_PD, states_SD),
            cross_mask_TS=valid_S,
            cross_prefix=contexts.cross,
            keep_cross=True,
        )
        assert cross is not None, "`keep_cross` returns them"
        shared, (k_LSHK, v_LSHK) = cross
        pads = ((0, 0), (0, spare), (0, 0), (0, 0))
        own = jnp.pad(k_LSHK, pads), jnp.pad(v_LSHK, pads)
        cached = Cached(*kv, index_T, index_T >= 0)
        return x_TD[-1], InputCache(
            shared, own, jnp.pad(valid_S, (0, spare)), cached, jnp.array(len(index_T))
        )

    def extend(
        self,
        contexts: Contexts,
        input_cache: InputCache,
        cache: Cached,
        tokens_T: jax.Array,
        positions_T: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        """Runs the next tokens of the decoder; see `Decoder.extend`.

        Positions include the inline prompt and the start token.
        """
        index_T = jnp.arange(tokens_T.shape[0])
        x_TD, (kv, _) = self.decoder(
            self.embed(tokens_T),
            contexts.decoder,
            index_T[:, None] >= index_T,
            positions_T,
            cached=(input_cache.cached, cache),
            known_cross=(input_cache.shared, input_cache.cross),
            cross_mask_TS=input_cache.valid_S,
            cross_prefix=contexts.cross,
        )
        return x_TD, kv

    def logits(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of the decoder's residual stream [M, D], at least float32."""
        return self.unembed(self.decoder.final_states(x_MD, None))

    def unembed(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of the head's inputs [M, D]."""
        if not self.config.tied:
            return self.head(x_MD)
        return self.embed.attend(x_MD) * self.config.width**-0.5

    def __call__(self, tokens_S: jax.Array, tokens_T: jax.Array) -> jax.Array:
        """Logits [T, V] of one pair; the decoder's tokens begin with the start token.

        Trained prompts, if there are any, precede both in the form that `prompt_to_input` selects.
        """
        contexts = self.prompt_context()
        encoder = self._plain_row(self.encoder, tokens_S)
        row = replace(self._plain_row(self.decoder, tokens_T), encoder=encoder)
        x_TD = self.decode(contexts, self.encode(contexts, encoder), row)
        return self.logits(x_TD[-tokens_T.shape[0] :])

    def _plain_row(self, stack: Stack, tokens_T: jax.Array, which: jax.Array | None = None) -> Rows:
        """A stack's row of one segment, with the slots of an inline prompt."""
        prompts_NPD = stack.prompts() if self.prompt_to_input else None
        choices, length = (1, 0) if prompts_NPD is None else prompts_NPD.shape[:2]
        assert which is not None or choices == 1, (
            "`which` is needed where there are several prompts"
        )
        row_T = jnp.concatenate([jnp.zeros(length, tokens_T.dtype), tokens_T])
        index_T = jnp.arange(row_T.shape[0])
        first = 0 if which is None else which * length
        slots_T = None if prompts_NPD is None else jnp.where(index_T < length, first + index_T, -1)
        positions_T = jnp.maximum(index_T - length, 0)
        return Rows(row_T, jnp.ones_like(row_T), positions_T, prompt_index=slots_T)
