"""T5, an encoder-decoder, one row at a time; `jax.vmap` over rows is the caller's.

A trained prompt stands before the encoder's input, the decoder's, or both: the variables
"encoder/prompt" and "decoder/prompt" [P, D]. It comes in one of two forms.

Inline (`prompt_to_input`, the paper): each segment of a row has its own copy. The row keeps P
slots before the segment's tokens, in the same segment; `prompt_index` is 0..P-1 there and -1
elsewhere, and the slots' token ids do not matter. Prompt and input of the encoder see each other
both ways; the decoder's prompt is causal and sees the input by cross-attention.

Once (`prompt_to_input` off): the prompt does not see the input, hence is the same for all: a
context, computed once a step and seen by every segment as if it stood right before its tokens.

    contexts = model.apply(variables, method="prompt_contexts")                    once a step
    states_SD = model.apply(variables, contexts, *encoder_row, method="encode")    one row
    x_TD = model.apply(variables, contexts, states_SD, encoder_segments_S, *decoder_row,
                       method="decode")                                            one row

Inline, the contexts are empty and the same calls apply. A segment's positions, its slots first,
must lie side by side in the row: the relative bias is that of row indices.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from softprompt.models.decoder import Context
from softprompt.models.layers import RMSNorm, accumulate, read_delta
from softprompt.models.stack import Gather, stack
from softprompt.models.t5_layers import Block, Cross, Head, KeysValues, RelativeBias, T5Config


@struct.dataclass
class Contexts:
    """What every row sees of prompts that do not see the input; all of it may be empty.

    `encoder` and `decoder` hold keys and values for self-attention. `states_PD` is what the encoder
    makes of its prompt, for the decoder's cross-attention.
    """

    encoder: Context
    states_PD: jax.Array
    decoder: Context


class Stack(nn.Module):
    """The encoder or the decoder, without embeddings and head."""

    config: T5Config
    layer_count: int
    causal: bool
    dtype: jnp.dtype
    gather: Gather | None = None

    def setup(self) -> None:
        """Declares the modules; the layers are one scanned block with stacked weights [L, ...]."""
        self.relative_bias = RelativeBias(self.config, self.causal, self.dtype)
        axes = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        path = "/".join([*self.path, "layers"])
        layers = stack(Block, length=self.layer_count, in_axes=axes, gather=self.gather, path=path)
        self.layers = layers(self.config, self.dtype)
        self.final_norm = RMSNorm(self.config.norm_eps, self.dtype)

    def prompt(self) -> jax.Array | None:
        """The trained variable "prompt" [P, D], if there is one."""
        prompt_PD = read_delta(self, "prompt")
        return None if prompt_PD is None else prompt_PD.astype(self.dtype)

    def with_prompt(self, x_TD: jax.Array, prompt_index_T: jax.Array | None) -> jax.Array:
        """Puts the prompt's rows where `prompt_index_T` is not negative."""
        if prompt_index_T is None:
            return x_TD
        prompt_PD = self.prompt()
        assert prompt_PD is not None, "a row has slots for a prompt that is not there"
        if prompt_PD.shape[0] == 0:
            return x_TD
        slots_TD = prompt_PD[jnp.maximum(prompt_index_T, 0)]
        return jnp.where(prompt_index_T[:, None] >= 0, slots_TD, x_TD)

    def empty_context(self) -> Context:
        """No positions."""
        c = self.config
        none = jnp.zeros((self.layer_count, 0, c.heads, c.head_size), self.dtype)
        return Context(none, none)

    def prompt_context(self) -> tuple[Context, jax.Array]:
        """The prompt run alone: its keys and values, and its final states [P, D]."""
        x_PD = self.prompt()
        if x_PD is None:
            return self.empty_context(), jnp.zeros((0, self.config.width), self.dtype)
        index_P = jnp.arange(x_PD.shape[0])
        mask_PS = (index_P[:, None] >= index_P) | (not self.causal)
        x_PD, (k_LPGK, v_LPGK) = self(x_PD, self.empty_context(), mask_PS, index_P)
        return Context(k_LPGK, v_LPGK), self.final_norm(x_PD)

    def __call__(
        self,
        x_TD: jax.Array,
        context: Context,
        mask_TS: jax.Array,
        positions_T: jax.Array,
        cross: Cross | None = None,
    ) -> tuple[jax.Array, KeysValues]:
        """The layers; the biases are computed once, outside the scan."""
        before = self.relative_bias.context(context.length, positions_T)
        biases = (before, self.relative_bias.own(x_TD.shape[0]))
        return self.layers(x_TD, (context.k_LPGK, context.v_LPGK), mask_TS, biases, cross)


class T5(nn.Module):
    """The model. Each method takes one row.

    Attributes:
        config: sizes.
        dtype: what it computes in. Norms, softmax, relative biases and logits are at least float32.
        prompt_to_input: whether a prompt sees the input; see the module's own docstring.
        gather: see `stack`; None where weights lie as they are computed with.
    """

    config: T5Config
    dtype: jnp.dtype = jnp.dtype("float32")
    prompt_to_input: bool = True
    gather: Gather | None = None

    def setup(self) -> None:
        """Declares embeddings, the two stacks, and the head where it is not tied."""
        c = self.config
        self.embed = nn.Embed(c.vocab, c.width, dtype=self.dtype)
        encoder, decoder = (c.encoder_layers, False), (c.decoder_layers, True)
        self.encoder = Stack(c, *encoder, dtype=self.dtype, gather=self.gather)
        self.decoder = Stack(c, *decoder, dtype=self.dtype, gather=self.gather)
        if not c.tied:
            self.head = Head(c, self.dtype)

    def prompt_contexts(self) -> Contexts:
        """The contexts of the trained prompts; empty inline, and where there is no prompt."""
        if self.prompt_to_input:
            none = jnp.zeros((0, self.config.width), self.dtype)
            return Contexts(self.encoder.empty_context(), none, self.decoder.empty_context())
        encoder, states_PD = self.encoder.prompt_context()
        decoder, _ = self.decoder.prompt_context()
        return Contexts(encoder, states_PD, decoder)

    def encode(
        self,
        contexts: Contexts,
        tokens_S: jax.Array,
        segments_S: jax.Array,
        positions_S: jax.Array,
        prompt_index_S: jax.Array | None = None,
    ) -> jax.Array:
        """Runs one row of the encoder.

        Args:
            contexts: what every segment sees besides itself.
            tokens_S: token ids; several examples may share the row.
            segments_S: which example a position belongs to; it sees that example only. 0 is
                padding.
            positions_S: position of each token in its example, from 0; it matters to contexts only.
            prompt_index_S: which row of the prompt stands in a slot, -1 where a token is. None: no
                slots.

        Returns:
            Normalised states [S, D], those of the prompt's slots included.
        """
        x_SD = self.encoder.with_prompt(self.embed(tokens_S), prompt_index_S)
        mask_SS = segments_S[:, None] == segments_S
        x_SD, _ = self.encoder(x_SD, contexts.encoder, mask_SS, positions_S)
        return self.encoder.final_norm(x_SD)

    def decode(
        self,
        contexts: Contexts,
        states_SD: jax.Array,
        encoder_segments_S: jax.Array,
        tokens_T: jax.Array,
        segments_T: jax.Array,
        positions_T: jax.Array,
        prompt_index_T: jax.Array | None = None,
        branches_T: jax.Array | None = None,
    ) -> jax.Array:
        """Runs one row of the decoder, beside the row of the encoder that holds its segments.

        Args:
            contexts: what every segment sees besides itself.
            states_SD: what `encode` returned.
            encoder_segments_S: the segments it was given.
            tokens_T: token ids; each sequence begins with the start token, id 0.
            segments_T: which example a position belongs to, as in the encoder's row. 0 is padding.
            positions_T: position in its sequence, from 0, without the prompt.
            prompt_index_T: as in `encode`, for the decoder's prompt.
            branches_T: tells apart the sequences of one segment (candidate answers, each whole with
                its start token and slots): a position sees its own branch only. None: one each.

        Returns:
            The residual stream after the last layer [T, D]; `logits` normalises what it is given.
        """
        x_TD = self.decoder.with_prompt(self.embed(tokens_T), prompt_index_T)
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = (segments_T[:, None] == segments_T) & (index_T[:, None] >= index_T)
        if branches_T is not None:
            mask_TS &= branches_T[:, None] == branches_T
        cross = (contexts.states_PD, states_SD, segments_T[:, None] == encoder_segments_S)
        x_TD, _ = self.decoder(x_TD, contexts.decoder, mask_TS, positions_T, cross)
        return x_TD

    def logits(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of positions of the decoder's residual stream, at least float32."""
        x_MD = self.decoder.final_norm(x_MD)
        if not self.config.tied:
            return self.head(x_MD)
        matrix_VD = self.embed.embedding.astype(self.dtype)
        acc = accumulate(self.dtype)
        logits_MV = jnp.einsum("md,vd->mv", x_MD, matrix_VD, preferred_element_type=acc)
        return logits_MV * self.config.width**-0.5

    def __call__(self, tokens_S: jax.Array, tokens_T: jax.Array) -> jax.Array:
        """Logits [T, V] of one plain pair, the decoder's tokens beginning with the start token.

        Trained prompts, if there are any, precede both in the form `prompt_to_input` says.
        """
        contexts = self.prompt_contexts()
        tokens_S, positions_S, index_S = self._plain_row(self.encoder, tokens_S)
        row_T, positions_T, index_T = self._plain_row(self.decoder, tokens_T)
        same_S, same_T = jnp.ones_like(tokens_S), jnp.ones_like(row_T)
        states_SD = self.encode(contexts, tokens_S, same_S, positions_S, index_S)
        x_TD = self.decode(contexts, states_SD, same_S, row_T, same_T, positions_T, index_T)
        return self.logits(x_TD[-tokens_T.shape[0] :])

    def _plain_row(
        self, stack: Stack, tokens_T: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Tokens, positions and prompt index of a single segment, slots included."""
        prompt_PD = stack.prompt() if self.prompt_to_input else None
        length = 0 if prompt_PD is None else prompt_PD.shape[0]
        row_T = jnp.concatenate([jnp.zeros(length, tokens_T.dtype), tokens_T])
        index_T = jnp.arange(row_T.shape[0])
        slots_T = None if prompt_PD is None else jnp.where(index_T < length, index_T, -1)
        return row_T, jnp.maximum(index_T - length, 0), slots_T
