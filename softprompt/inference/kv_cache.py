"""Prefill of a batch of inputs, and the cache of generated tokens.

A cache is a pair (keys, values) [L, B, N, G, K], or [L, B, C, N, G, K] for C beams of each input.
It holds the generated tokens only. All rows write to the same slot; the position of a row's slot
follows from the length of its input. The layers only read the cache; the keys and values of a new
token are written once, after all layers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.models import Model
from softprompt.models.decoder import Cached
from softprompt.models.layers import collections

Tree = Any
Cache = tuple[jax.Array, jax.Array]


def prefill(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    which_B: jax.Array | None = None,
    *,
    slots: int,
) -> tuple[jax.Array, Any]:
    """Runs the inputs of a generation.

    Args:
        model: a decoder or a T5.
        weights: its frozen weights.
        shared: the method's variables and the context.
        tokens_BT: the inputs, padded on the right.
        lengths_B: the number of tokens of each input.
        which_B: the number of each input's prompt. None: there is one prompt.
        slots: size of the input cache for an input's tokens, at least T.

    Returns:
        Logits [B, V] of the first new token, and the input cache with batch axes
        `model.input_cache_axes`.
    """
    variables, context = shared
    apply = functools.partial(model.apply, collections(weights, variables))

    def one(tokens_T: jax.Array, length: jax.Array, which: jax.Array | None) -> Any:
        x_D, input_cache = apply(context, tokens_T, length, which, slots=slots, method="prefill")
        logits_1V: Any = apply(x_D[None], method="logits")
        return logits_1V[0], input_cache

    return jax.vmap(one, out_axes=(0, model.input_cache_axes))(tokens_BT, lengths_B, which_B)


def empty_cache(input_cache: Any, new: int, *beams: int) -> Cache:
    """A cache for `new` tokens of each row of a batch, or of each beam of a row."""
    like = input_cache.cached.k_LSGK
    layers, rows, _, *sizes = like.shape
    zeros = jnp.zeros((layers, rows, *beams, new, *sizes), like.dtype)
    return zeros, zeros


def extend(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    input_cache: Any,
    cache: Cache,
    tokens: jax.Array,
    nth: jax.Array,
) -> tuple[jax.Array, Cache]:
    """Runs one new token of every row, or of every beam of every row.

    The first arguments are as for `prefill`, which made `input_cache`. `cache` has `nth` tokens
    that were generated before. `tokens` is [B], or [B, C] for beams.

    Returns:
        Logits [B, V] or [B, C, V] of the next token, and the cache with these tokens.
    """
    variables, context = shared
    apply = functools.partial(model.apply, collections(weights, variables))

    def one(input_cache: Any, kv: Cache, token: jax.Array) -> Any:
        slots_N = jnp.arange(kv[0].shape[1])
        cached = Cached(*kv, input_cache.length + slots_N, slots_N < nth)
        position = input_cache.length + nth
        x_1D, new = apply(
            context, input_cache, cached, token[None], position[None], method="extend"
        )
        logits_1V: Any = apply(x_1D, method="logits")
        return logits_1V[0], new

    each = one if tokens.ndim == 1 else jax.vmap(one, (None, 1, 0), (0, 1))
    logits, new = jax.vmap(each, (model.input_cache_axes, 1, 0), (0, 1))(input_cache, cache, tokens)

    def write(old: jax.Array, column: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(old, column, nth, axis=old.ndim - 3)

    return logits, (write(cache[0], new[0]), write(cache[1], new[1]))
