"""A causal decoder in the form that makes a prompt cheap: a context once, then one row at a time.

Everything that a row sees of its task is a stack of keys and values that the row does not change:

    context = model.apply(variables, method="prompt_context")              once a step
    x_MD = model.apply(variables, context, row, method="target_states")    one row, a `Rows`
    logits_MV = model.apply(variables, x_MD, method="unembed")

The encoder-decoder (softprompt/models/t5.py) has the same three methods. The first two take a
`Dropout` as their last argument; without it nothing is dropped.

`jax.vmap` over rows leaves the context unbatched: it is computed once, forward and backward.

Text is generated from a context too, a row's own keys and values beside it:

    x_D, memory = model.apply(variables, context, tokens_T, length, method="prefill")
    x_TD, kv = model.apply(variables, context, memory, cache, tokens_T, positions_T,
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
    Row,
    attention_case,
    cuts,
)
from softprompt.models.dropout import (
    Dropout,
    RowDropout,
    context_dropout,
    dropped,
    row_dropout,
)
from softprompt.models.kernels import REFERENCE, Kernel
from softprompt.models.layers import (
    NORMS,
    Embed,
    Linear,
    Prefix,
    accumulate,
    read_delta,
)
from softprompt.models.positions import rotary_table
from softprompt.models.rows import Rows
from softprompt.models.stack import Gather, stack


@struct.dataclass
class Context:
    """Keys (rotated) and values that every row sees before its own tokens. P may be 0.

    Several contexts of one length may lie end to end, `choices` of them: a token sees one.
    """

    k_LPGK: jax.Array
    v_LPGK: jax.Array
    choices: int = struct.field(pytree_node=False, default=1)

    @property
    def length(self) -> int:
        """P, the number of positions the context takes."""
        return self.k_LPGK.shape[-3] // self.choices

    def places(self) -> jax.Array:
        """Where each of its keys stands, from 0."""
        return jnp.tile(jnp.arange(self.length), self.choices)

    def mask(self, which: jax.Array | None) -> jax.Array | None:
        """Which of its keys are seen, [..., keys], by what sees context number `which` [...].

        None: all of them, of an only context.
        """
        if which is None:
            assert self.choices == 1, "a token has to say which of several contexts it sees"
            return None
        return which[..., None] == jnp.repeat(jnp.arange(self.choices), self.length)


@struct.dataclass
class Cached:
    """Keys (rotated) and values of S slots that a row's next tokens may see.

    Attributes:
        k_LSGK: keys of every layer.
        v_LSGK: values.
        positions_S: where each slot's token stands, from 0; the context comes before.
        valid_S: which slots hold a token of the row.
    """

    k_LSGK: jax.Array
    v_LSGK: jax.Array
    positions_S: jax.Array
    valid_S: jax.Array


@struct.dataclass
class Memory:
    """What generation keeps of an input, and never changes.

    Its keys and values, its length, and which of several contexts it sees (None: the only one).
    """

    cached: Cached
    length: jax.Array
    which: jax.Array | None = None


class Decoder(nn.Module):
    """The model. Each method takes one row; `jax.vmap` over rows is the caller's.

    A soft prompt enters after the embeddings' scaling and before what leads from the embedding
    width into the model's; with learned positions it gets its positions added like any token. It is
    what transformers does with `inputs_embeds`, and PEFT with a prompt.

    Dropout (see `dropout`) is of entries of embeddings and of what each sublayer makes, and of keys
    of attention, as in GPT-2.

    Attributes:
        config: sizes and parts.
        dtype: what it computes in. Norms, biases, softmax and logits are at least float32.
        remat: what the backward pass computes again, see `stack`.
        gather: see `stack`; None where weights lie as they are computed with.
        attention: the kernel of `hidden` where it can serve; the rest is left to the reference.
    """

    config: DecoderConfig
    dtype: jnp.dtype = jnp.dtype("float32")
    remat: str = "none"
    gather: Gather | None = None
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
        layers = stack(Block, length=c.layers, remat=self.remat, gather=self.gather)
        self.layers = layers(c, self.dtype)
        self.prefix = Prefix(self.dtype)
        if c.final_norm:
            self.final_norm = NORMS[c.norm](c.norm_eps, self.dtype)
        if not c.tied:
            self.head = Linear("md,dv->mv", (c.prompt_width, c.vocab), self.dtype, wide=True)

    def empty_context(self) -> Context:
        """The context of the plain base model: no positions."""
        c = self.config
        none = jnp.zeros((c.layers, 0, c.kv_heads, c.head_size), self.dtype)
        return Context(none, none)

    def prompt_context(self, dropout: Dropout | None = None) -> Context:
        """The context of the delta: a prefix, or what a prompt [P, D] becomes, or no positions.

        Of several prompts [N, P, D] it is the contexts of all, end to end.
        """
        if (prefix := self.prefix()) is not None:
            return Context(*prefix)
        prompt = read_delta(self, "prompt")
        if prompt is None:
            return self.empty_context()
        prompt = prompt.astype(self.dtype)
        return self._context_of(prompt if prompt.ndim == 3 else prompt[None], dropout)

    def text_context(self, tokens_P: jax.Array) -> Context:
        """The context of a text: a hard prompt, or few-shot examples."""
        return self._context_of(self.embed(tokens_P)[None], None)

    def hidden(self, context: Context, row: Rows, dropout: Dropout | None = None) -> jax.Array:
        """Runs one row after a context.

        Args:
            context: what every segment of the row sees.
            row: its positions are below T.
            dropout: of rows.

        Returns:
            The residual stream after the last layer [T, D]; `logits` normalises what it is given.
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
            context=context.length,
            tokens=tokens_T.shape[0],
            branches=branches_T is not None,
        )
        by = self.attention.serving(case), segments_T
        x_TD, _ = self._run(x_TD, context, mask_TS, positions_T, which=row.which, drop=drop, by=by)
        return x_TD

    def target_states(
        self, context: Context, row: Rows, dropout: Dropout | None = None
    ) -> jax.Array:
        """What the head reads [M, D] at the positions `row.index`; arguments as for `hidden`."""
        return self.final_states(self.hidden(context, row, dropout)[row.index])

    # Where `jax.vmap` over inputs finds the axis of inputs in `prefill`'s memory.
    memory_axes: ClassVar[Any] = Memory(Cached(1, 1, None, 0), 0, 0)  # type: ignore[arg-type]

    def prefill(
        self,
        context: Context,
        tokens_T: jax.Array,
        length: jax.Array,
        which: jax.Array | None = None,
        *,
        slots: int,
    ) -> tuple[jax.Array, Memory]:
        """Runs an input that is to be continued.

        Args:
            context: what it sees besides itself.
            tokens_T: its tokens, padded on the right.
            length: how many they are, a scalar from 1.
            which: which of several contexts it sees, a scalar. None: there is one.
            slots: S of the memory, T or more.

        Returns:
            The residual stream [D] at its last token, and what `extend` needs of it.
        """
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = index_T[:, None] >= index_T
        positions_T = index_T + context.length
        x_TD, kv = self._run(self.embed(tokens_T), context, mask_TS, positions_T, which=which)
        index_S = jnp.arange(slots)
        spare = ((0, 0), (0, slots - index_T.shape[0]), (0, 0), (0, 0))
        k_LSGK, v_LSGK = (jnp.pad(part, spare) for part in kv)
        cached = Cached(k_LSGK, v_LSGK, index_S, index_S < length)
        return x_TD[length - 1], Memory(cached, length, which)

    def extend(
        self,
        context: Context,
        memory: Memory,
        cache: Cached,
        tokens_T: jax.Array,
        positions_T: jax.Array,
    ) -> tuple[jax.Array, KeysValues]:
        """Runs further tokens of one row, which see the context, the memory, the cache, each other.

        Args:
            context: as for `prefill`.
            memory: of the row's input.
            cache: what came between the input and these tokens.
            tokens_T: they follow one another.
            positions_T: where they stand, from 0; the context comes before.

        Returns:
            The residual stream [T, D], and these tokens' keys and values [L, T, G, K], which are
            for the caller to put into the cache.
        """
        index_T = jnp.arange(tokens_T.shape[0])
        mask_TS = index_T[:, None] >= index_T
        x_TD, positions_T = self.embed(tokens_T), positions_T + context.length
        cached = memory.cached, cache
        return self._run(x_TD, context, mask_TS, positions_T, cached, which=memory.which)

    def logits(self, x_MD: jax.Array) -> jax.Array:
        """Logits [M, V] of positions of the residual stream, at least float32."""
        return self.unembed(self.final_states(x_MD))

    def final_states(self, x_MD: jax.Array) -> jax.Array:
        """The residual stream as the head reads it."""
        return self.final_norm(x_MD) if self.config.final_norm else x_MD

    def unembed(self, x_MD: jax.Array) -> jax.Array:
        """The head alone: logits [M, V] of what it reads."""
        c = self.config
        x_ME = self.project_out(x_MD) if c.embed_width else x_MD
        logits_MV = self.embed.attend(x_ME) if c.tied else self.head(x_ME)
        logits_MV = logits_MV.astype(accumulate(self.dtype))
        if c.final_softcap:
            logits_MV = c.final_softcap * jnp.tanh(logits_MV / c.final_softcap)
        return logits_MV

    def __call__(self, tokens_T: jax.Array) -> jax.Array:
        """Logits [T, V] of one plain text after the trained prompt, if there is one."""
        row = Rows(tokens_T, jnp.ones_like(tokens_T), jnp.arange(tokens_T.shape[0]))
        return self.logits(self.hidden(self.prompt_context(), row))

    def _context_of(self, x_NPD: jax.Array, dropout: Dropout | None) -> Context:
        """Runs vectors as N causal sequences, packed in one row, and keeps the keys and values."""
        choices, length, width = x_NPD.shape
        index = jnp.arange(choices * length)
        mask = index[:, None] >= index
        if choices > 1:
            which = jnp.repeat(jnp.arange(choices), length)
            mask &= which[:, None] == which
        positions = jnp.tile(jnp.arange(length), choices)
        x_PD = x_NPD.reshape(choices * length, width)
        drop = context_dropout(dropout, choices * length)
        _, (k_LPGK, v_LPGK) = self._run(x_PD, self.empty_context(), mask, positions, drop=drop)
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
        by: tuple[Kernel, jax.Array | None] = (REFERENCE, None),
    ) -> tuple[jax.Array, KeysValues]:
        """The layers, from vectors of the embedding width; what they share is computed once.

        `positions_T` count the context. Without a cache they are below P + T. `which` of several
        contexts is seen is told by token, or once for all. `by` is what mixes values, and the
        segments that `mask_TS` stands for.
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
        reach = context.length + x_TD.shape[0]
        cut = any(c.windows) if cached else cuts(c, reach)
        places = (
            (context.places(), context.mask(which)),
            *((part.positions_S + context.length, part.valid_S) for part in cached),
        )
        kernel, segments_T = by
        # Only splash goes by segments: to the others they are one more array to carry along.
        segments_T = segments_T if kernel.name == "splash" else None
        at_T = positions_T if cut else None
        row = Row(mask_TS, at_T, table, local, places, drop, segments_T, kernel)
        kv = tuple((part.k_LSGK, part.v_LSGK) for part in cached)
        depth_L = jnp.arange(1.0, c.layers + 1) if c.scale_by_depth else None
        layers = Layer((context.k_LPGK, context.v_LPGK), window_L, kv, depth_L)
        return self.layers(x_TD, layers, row)
