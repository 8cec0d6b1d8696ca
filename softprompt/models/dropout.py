"""Dropout whose masks belong to examples, whatever they are packed, batched or sharded with.

A mask is drawn from the step's key, the place in the model (module and layer) and the example's id.
All positions of the example share it, as in T5X; so do both copies where a step has one twice. Of
attention, keys are dropped: for all of an example's queries at once, head by head of keys and
values, which is to drop their values. What LoRA's factors read is dropped position by position, as
in PEFT.

What is computed once for all rows (a context) has one mask a step: it is like one example, whose
key is another than the rows'.

A model drops where it is given shares to keep (the variable "kept" of a collection "dropout") and a
key (Flax's stream of the same name). Evaluation and generation give neither. The shares are data,
so that one program serves all rates; whether there is one is the structure of `Shares`.

Source: arXiv 1910.10683, section 2.1; for the shared masks, `broadcast_dims=(-2,)` and
`broadcast_dropout` in the T5.1.1 of google-research/prompt-tuning.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

STREAM = "dropout"  # Flax's stream of keys, and the collection that has the shares
Share = jax.Array | np.ndarray | float


class Shares(NamedTuple):
    """Shares [] that are not dropped; None where nothing is.

    They and not the rates, for a mask is drawn with a share, which float32 would round once more.

    Attributes:
        model: in the model.
        lora: of what LoRA's factors read.
        prompt: of a prompt, once a step (`softprompt.methods.prompt.dropped`).
    """

    model: Share | None = None
    lora: Share | None = None
    prompt: Share | None = None

    @property
    def by_example(self) -> bool:
        """Whether something is dropped of rows."""
        return self.model is not None or self.lora is not None


@struct.dataclass
class Drop:
    """Whose masks the positions of a row get.

    Attributes:
        ids_E: ids of the row's examples.
        place_T: which of them a position belongs to; any in padding.
        offset_T: how many positions of its example stand before it.
        kept: how much is not dropped.
    """

    ids_E: jax.Array
    place_T: jax.Array
    offset_T: jax.Array
    kept: Shares

    def at(self, index_M: jax.Array) -> "Drop":
        """The same for some of the positions."""
        return Drop(self.ids_E, self.place_T[index_M], self.offset_T[index_M], self.kept)


def kept_in(model: nn.Module) -> Shares | None:
    """What the outermost module is given to keep; None where nothing is dropped of rows."""
    kept: Shares | None = model.get_variable(STREAM, "kept")
    return kept if kept is not None and kept.by_example else None


def row_drop(
    kept: Shares | None, examples_E: jax.Array | None, segments_T: jax.Array
) -> Drop | None:
    """What a row's layers are told; None where nothing is dropped.

    Args:
        kept: what the model is given.
        examples_E: the id of the example that is segment 1, of that which is segment 2, ...
        segments_T: positions of one segment lie side by side.
    """
    if kept is None:
        return None
    assert examples_E is not None, "dropout goes by the ids of examples"
    index_T = jnp.arange(segments_T.shape[0])
    starts_T = jnp.where(segments_T != jnp.roll(segments_T, 1), index_T, 0)
    offset_T = index_T - jax.lax.cummax(starts_T)
    return Drop(examples_E, jnp.maximum(segments_T - 1, 0), offset_T, kept)


def context_drop(kept: Shares | None, length: int) -> Drop | None:
    """What the layers of a context of this length are told; None where nothing is dropped."""
    return None if kept is None else _shared(length, kept)


def _shared(length: int, kept: Shares) -> Drop:
    """For positions that all rows have in common."""
    return Drop(jnp.zeros(1, int), jnp.zeros(length, int), jnp.arange(length), kept)


def dropped(module: nn.Module, x: jax.Array, drop: Drop | None) -> jax.Array:
    """Vectors [T, ...] with entries dropped, and the others scaled up to the same mean."""
    if drop is None or drop.kept.model is None or not x.shape[0]:
        return x
    key, kept = module.make_rng(STREAM), drop.kept.model

    def keep(example: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, example), kept, x.shape[1:])

    keep_E = jax.vmap(keep)(drop.ids_E)
    return masked(keep_E[drop.place_T], x, kept)


def lora_dropped(module: nn.Module, x: jax.Array, drop: Drop | None) -> jax.Array:
    """The same at LoRA's rate, each position by itself."""
    if drop is None or drop.kept.lora is None:
        return x
    return _each_position(module, x, drop, x.shape[1:], drop.kept.lora)


def dropped_keys(
    module: nn.Module, parts: Sequence[tuple[jax.Array, jax.Array]], drop: Drop | None
) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [S, G, K], some of the values zero, as if their keys had no attention.

    Args:
        module: has the key.
        parts: those that all rows see, and last the row's own.
        drop: of the row that the last are of.
    """
    if drop is None or drop.kept.model is None:
        return list(parts)
    drops = [_shared(k.shape[0], drop.kept) for k, _ in parts[:-1]] + [drop]
    made = []
    for (k_SGK, v_SGK), one in zip(parts, drops, strict=True):
        heads = (v_SGK.shape[1], 1)
        made.append((k_SGK, _each_position(module, v_SGK, one, heads, drop.kept.model)))
    return made


def _each_position(
    module: nn.Module, x: jax.Array, drop: Drop, shape: tuple[int, ...], kept: Share
) -> jax.Array:
    """`x` [T, ...] with a mask of this shape for every position."""
    if not x.shape[0]:
        return x
    key = module.make_rng(STREAM)

    def keep(example: jax.Array, offset: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, example), offset)
        return jax.random.bernoulli(own, kept, shape)

    return masked(jax.vmap(keep)(drop.ids_E[drop.place_T], drop.offset_T), x, kept)


def masked(keep: jax.Array, x: jax.Array, kept: Share) -> jax.Array:
    """`x` where the mask keeps it, scaled up to the same mean and rounded once; else 0."""
    return jnp.where(keep, (x * (1 / kept)).astype(x.dtype), 0)
