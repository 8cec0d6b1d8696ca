"""One of T5's two stacks: its layers, its relative bias, and its trained prompt or prefix."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from softprompt.models.decoder import Cached, Context
from softprompt.models.dropout import Dropout, RowDropout, context_dropout, dropped
from softprompt.models.layers import Prefix, RMSNorm, read_delta
from softprompt.models.stack import Gather, stack
from softprompt.models.t5_layers import (
    Block,
    KeysValues,
    Layer,
    LayerOutput,
    RelativeBias,
    RowInputs,
    T5Config,
    buckets_before,
    buckets_within,
)


class Stack(nn.Module):
    """The encoder or the decoder, without embeddings and without head."""

    config: T5Config
    layer_count: int
    causal: bool
    dtype: jnp.dtype
    remat: str
    gather: Gather | None
    unroll: bool

    def setup(self) -> None:
        """Declares the modules; the layers are one scanned block with stacked weights [L, ...]."""
        if not self.config.bias_per_layer:
            self.relative_bias = RelativeBias(self.config, self.dtype)
        layers = stack(
            Block,
            length=self.layer_count,
            remat=self.remat,
            gather=self.gather,
            path="/".join([*self.path, "layers"]),
            unroll=self.unroll,
        )
        self.layers = layers(self.config, self.dtype)
        self.final_norm = RMSNorm(self.config.norm_eps, self.dtype)
        self.prefix = Prefix(self.dtype)
        self.cross_prefix = Prefix(self.dtype)

    def prompts(self) -> jax.Array | None:
        """The trained variable "prompt", [P, D] or [N, P, D], as [N, P, D]; or None."""
        prompt = read_delta(self, "prompt")
        if prompt is None:
            return None
        return (prompt if prompt.ndim == 3 else prompt[None]).astype(self.dtype)

    def with_prompt(self, x_TD: jax.Array, prompt_index_T: jax.Array | None) -> jax.Array:
        """Replaces `x_TD` by rows of the concatenated prompts where `prompt_index_T` is not -1."""
        if prompt_index_T is None:
            return x_TD
        prompts_NPD = self.prompts()
        assert prompts_NPD is not None, "a row has slots, but the delta has no prompt"
        if prompts_NPD.size == 0:
            return x_TD
        prompt_PD = prompts_NPD.reshape(-1, prompts_NPD.shape[-1])
        slots_TD = prompt_PD[jnp.maximum(prompt_index_T, 0)]
        return jnp.where(prompt_index_T[:, None] >= 0, slots_TD, x_TD)

    def empty_context(self) -> Context:
        """A context without positions."""
        c = self.config
        none = jnp.zeros((self.layer_count, 0, c.heads, c.head_size), self.dtype)
        return Context(none, none)

    def prefix_context(self) -> Context:
        """The trained prefix, or an empty context."""
        prefix = self.prefix()
        return self.empty_context() if prefix is None else Context(*prefix)

    def cross_context(self) -> Context | None:
        """The trained prefix of cross-attention, or None."""
        prefix = self.cross_prefix() if self.causal else None
        return None if prefix is None else Context(*prefix)

    def prompt_context(self, dropout: Dropout | None) -> tuple[Context, jax.Array]:
        """The context and final states [P, D] of the prompt, or of the prefix (no states)."""
        prompts_NPD = self.prompts()
        if prompts_NPD is None:
            return self.prefix_context(), jnp.zeros((0, self.config.width), self.dtype)
        assert len(prompts_NPD) == 1, "several prompts must be inline"
        return self.context_of(prompts_NPD[0], dropout)

    def context_of(self, x_PD: jax.Array, dropout: Dropout | None) -> tuple[Context, jax.Array]:
        """Runs vectors by themselves: their keys and values, and their final states [P, D]."""
        index_P = jnp.arange(x_PD.shape[0])
        mask_PS = (index_P[:, None] >= index_P) | (not self.causal)
        drop = context_dropout(dropout, x_PD.shape[0])
        given = x_PD, self.empty_context(), mask_PS, index_P
        x_PD, ((k_LPGK, v_LPGK), _) = self(*given, drop=(drop, None))
        return Context(k_LPGK, v_LPGK), self.final_states(x_PD, drop)

    def final_states(self, x_TD: jax.Array, drop: RowDropout | None) -> jax.Array:
        """The stack's output: the normalised residual stream."""
        return dropped(self, self.final_norm(x_TD), drop)

    def __call__(
        self,
        x_TD: jax.Array,
        context: Context,
        mask_TS: jax.Array,
        positions_T: jax.Array,
        *,
        cached: tuple[Cached, ...] = (),
        known_cross: tuple[KeysValues, KeysValues] | None = None,
        cross_prefix: Context | None = None,
        drop: tuple[RowDropout | None, RowDropout | None] = (None, None),
        **cross: Any,
    ) -> tuple[jax.Array, LayerOutput]:
        """Runs the layers; biases of all layers are computed once, outside the scan.

        Args:
            x_TD: the row; positions of a segment are adjacent.
            context: keys and values that come right before every segment.
            mask_TS: which positions of the row each position sees.
            positions_T: of the row, from 0, without the context. They give the distances to context
                and cache.
            cached: keys and values of earlier tokens of the row.
            known_cross: keys and values for cross-attention, as in `Layer.cross`.
            cross_prefix: trained keys and values of cross-attention.
            drop: as in `RowInputs`.
            **cross: fields of `RowInputs` for cross-attention.
        """
        config, causal, positions_T = self.config, self.causal, context.length + positions_T
        keys = [jnp.arange(context.length), *(c.positions_S + context.length for c in cached)]
        earlier = [buckets_before(config, causal, positions_T, keys_S) for keys_S in keys]
        buckets = (*earlier, jnp.asarray(buckets_within(config, causal, x_TD.shape[0])))
        biases = None if config.bias_per_layer else self.relative_bias(buckets)
        masks = (None, *(c.valid_S for c in cached), mask_TS)
        row = RowInputs(masks, biases, buckets if biases is None else (), drop=drop, **cross)
        kv = tuple((c.k_LSGK, c.v_LSGK) for c in cached)
        own = (context.k_LPGK, context.v_LPGK)
        extra = None if cross_prefix is None else (cross_prefix.k_LPGK, cross_prefix.v_LPGK)
        x_TD = dropped(self, x_TD, drop[0])
        return self.layers(x_TD, Layer(own, kv, known_cross, extra), row)
