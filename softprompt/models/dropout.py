"""Dropout whose masks belong to examples, whatever they are packed, batched or sharded with.

A mask is drawn from the step's key, the place in the model (module and layer) and the example's id.
All positions of the example share it, as in T5X; so do both copies where a step has one twice. Of
attention, keys are dropped: for all of an example's queries at once, head by head of keys and
values, which is to drop their values. What LoRA's factors read is dropped position by position, as
in PEFT.

What is computed once for all rows (a context) has one mask a step: it is like one example, whose
key is another than the rows'.

A model drops where it has a rate and is given a key (Flax's stream "dropout"). Evaluation and
generation give none.

Source: arXiv 1910.10683, section 2.1; for the shared masks, `broadcast_dims=(-2,)` and
`broadcast_dropout` in the T5.1.1 of google-research/prompt-tuning.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

STREAM = "dropout"


class Rates(NamedTuple):
    """Shares that are dropped: in the model, and of what LoRA's factors read."""

    model: float = 0.0
    lora: float = 0.0


@struct.dataclass
class Drop:
    """Whose masks the positions of a row get.

    Attributes:
        ids_E: ids of the row's examples.
        place_T: which of them a position belongs to; any in padding.
        offset_T: how many positions of its example stand before it.
        rates: how much is dropped.
    """

    ids_E: jax.Array
    place_T: jax.Array
    offset_T: jax.Array
    rates: Rates = struct.field(pytree_node=False)

    def at(self, index_M: jax.Array) -> "Drop":
        """The same for some of the positions."""
        return Drop(self.ids_E, self.place_T[index_M], self.offset_T[index_M], self.rates)


def row_drop(
    model: nn.Module, rates: Rates, examples_E: jax.Array | None, segments_T: jax.Array
) -> Drop | None:
    """What a row's layers are told; None where nothing is dropped.

    Args:
        model: is given a key, or not.
        rates: how much is dropped.
        examples_E: the id of the example that is segment 1, of that which is segment 2, ...
        segments_T: positions of one segment lie side by side.
    """
    if not any(rates) or not model.has_rng(STREAM):
        return None
    assert examples_E is not None, "dropout goes by the ids of examples"
    index_T = jnp.arange(segments_T.shape[0])
    starts_T = jnp.where(segments_T != jnp.roll(segments_T, 1), index_T, 0)
    offset_T = index_T - jax.lax.cummax(starts_T)
    return Drop(examples_E, jnp.maximum(segments_T - 1, 0), offset_T, rates)


def context_drop(model: nn.Module, rates: Rates, length: int) -> Drop | None:
    """What the layers of a context of this length are told; None where nothing is dropped."""
    return _shared(length, rates) if any(rates) and model.has_rng(STREAM) else None


def _shared(length: int, rates: Rates) -> Drop:
    """For positions that all rows have in common."""
    return Drop(jnp.zeros(1, int), jnp.zeros(length, int), jnp.arange(length), rates)


def dropped(module: nn.Module, x: jax.Array, drop: Drop | None) -> jax.Array:
    """Vectors [T, ...] with entries dropped, and the others scaled up to the same mean."""
    if drop is None or not drop.rates.model or not x.shape[0]:
        return x
    key, kept = module.make_rng(STREAM), 1 - drop.rates.model

    def keep(example: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, example), kept, x.shape[1:])

    keep_E = jax.vmap(keep)(drop.ids_E)
    return jnp.where(keep_E[drop.place_T], x / kept, 0)


def lora_dropped(module: nn.Module, x: jax.Array, drop: Drop | None) -> jax.Array:
    """The same at LoRA's rate, each position by itself."""
    if drop is None or not drop.rates.lora:
        return x
    return _each_position(module, x, drop, x.shape[1:], drop.rates.lora)


def dropped_keys(
    module: nn.Module, parts: Sequence[tuple[jax.Array, jax.Array]], drop: Drop | None
) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [S, G, K], some of the values zero, as if their keys had no attention.

    Args:
        module: has the key.
        parts: those that all rows see, and last the row's own.
        drop: of the row that the last are of.
    """
    if drop is None or not drop.rates.model:
        return list(parts)
    drops = [_shared(k.shape[0], drop.rates) for k, _ in parts[:-1]] + [drop]
    made = []
    for (k_SGK, v_SGK), one in zip(parts, drops, strict=True):
        heads = (v_SGK.shape[1], 1)
        made.append((k_SGK, _each_position(module, v_SGK, one, heads, drop.rates.model)))
    return made


def _each_position(
    module: nn.Module, x: jax.Array, drop: Drop, shape: tuple[int, ...], rate: float
) -> jax.Array:
    """`x` [T, ...] with a mask of this shape for every position."""
    if not x.shape[0]:
        return x
    key = module.make_rng(STREAM)

    def keep(example: jax.Array, offset: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, example), offset)
        return jax.random.bernoulli(own, 1 - rate, shape)

    return jnp.where(jax.vmap(keep)(drop.ids_E[drop.place_T], drop.offset_T), x / (1 - rate), 0)
