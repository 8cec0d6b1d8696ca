"""Dropout whose masks belong to examples, whatever they are packed, batched or sharded with.

A mask is drawn from the step's key, the module (its path and its layer) and the example's id. All
positions of an example share a mask, as in T5X; so do both copies where a step has the example
twice. Attention drops keys, for all of an example's queries at once, separately for each head of
keys and values: it zeroes the values of those keys. What LoRA's factors read is dropped position by
position, as in PEFT.

What is computed once for all rows (a context) has one mask a step, like a single example. Its key
differs from the rows' key.

A model drops where it is called with a `Dropout` and with its key as Flax's random stream (see
`streams`). Evaluation and generation give neither. The probabilities are data: a compiled program
serves all rates, and is told apart only by which of them are there.

Source: arXiv 1910.10683, section 2.1; for the shared masks, `broadcast_dims=(-2,)` and
`broadcast_dropout` in the T5.1.1 of google-research/prompt-tuning.
"""

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

STREAM = "dropout"  # the name of Flax's random stream
Probability = jax.Array | np.ndarray | float


@struct.dataclass
class Dropout:
    """A random key, and the probabilities [] of keeping an entry; None where nothing is dropped.

    A mask is drawn with the probability of keeping. A rate of dropping would be rounded once more.

    Attributes:
        key: of a trial, of a step, or of a part of a step.
        model: in the model.
        lora: of what LoRA's factors read.
        prompt: of a prompt, once a step (`softprompt.methods.prompt.dropped`).
    """

    key: jax.Array
    model: Probability | None = None
    lora: Probability | None = None
    prompt: Probability | None = None


def at_step(dropout: Dropout | None, step: int) -> Dropout | None:
    """A trial's dropout with the key of one of its steps."""
    if dropout is None:
        return None
    return replace(dropout, key=jax.random.fold_in(dropout.key, step))


def split(dropout: Dropout) -> tuple[Dropout, Dropout, Dropout]:
    """A step's dropout with the keys of its three parts: the prompt, the context and the rows."""
    prompt, context, rows = jax.random.split(dropout.key, 3)
    return replace(dropout, key=prompt), replace(dropout, key=context), replace(dropout, key=rows)


def streams(dropout: Dropout | None) -> dict[str, jax.Array]:
    """Flax's `rngs` for a model that is called with this dropout."""
    return {} if dropout is None else {STREAM: dropout.key}


@struct.dataclass
class RowDropout:
    """The mask of each position in a row.

    Attributes:
        ids_E: ids of the row's examples.
        example_T: which of the row's examples a position belongs to; any in padding.
        offset_T: how many positions of its example come before it.
        model: see `Dropout`.
        lora: see `Dropout`.
    """

    ids_E: jax.Array
    example_T: jax.Array
    offset_T: jax.Array
    model: Probability | None
    lora: Probability | None

    def at(self, index_M: jax.Array) -> "RowDropout":
        """The same for some of the positions."""
        example_M, offset_M = self.example_T[index_M], self.offset_T[index_M]
        return replace(self, example_T=example_M, offset_T=offset_M)


def row_dropout(
    dropout: Dropout | None, examples_E: jax.Array | None, segments_T: jax.Array
) -> RowDropout | None:
    """The masks of a packed row; None where nothing is dropped in it.

    Args:
        dropout: with the key of the rows, which `streams` gives to the model.
        examples_E: the ids of the examples that are segments 1, 2, ...
        segments_T: positions of one segment are adjacent.
    """
    if dropout is None or dropout.model is None and dropout.lora is None:
        return None
    assert examples_E is not None, "dropout goes by the ids of examples"
    index_T = jnp.arange(segments_T.shape[0])
    starts_T = jnp.where(segments_T != jnp.roll(segments_T, 1), index_T, 0)
    offset_T = index_T - jax.lax.cummax(starts_T)
    example_T = jnp.maximum(segments_T - 1, 0)
    return RowDropout(examples_E, example_T, offset_T, dropout.model, dropout.lora)


def context_dropout(dropout: Dropout | None, length: int) -> RowDropout | None:
    """The masks of a context, which is like a row of one example; None where nothing is dropped."""
    return row_dropout(dropout, jnp.zeros(1, int), jnp.ones(length, int))


def dropped(module: nn.Module, x: jax.Array, drop: RowDropout | None) -> jax.Array:
    """Vectors [T, ...] with entries dropped, and the others scaled up to the same mean."""
    if drop is None or drop.model is None or not x.shape[0]:
        return x
    key, keep = module.make_rng(STREAM), drop.model

    def mask(example: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, example), keep, x.shape[1:])

    mask_E = jax.vmap(mask)(drop.ids_E)
    return masked(mask_E[drop.example_T], x, keep)


def lora_dropped(module: nn.Module, x: jax.Array, drop: RowDropout | None) -> jax.Array:
    """The same with LoRA's probability, each position with a mask of its own."""
    if drop is None or drop.lora is None:
        return x
    owner = drop.ids_E[drop.example_T], drop.offset_T
    return _each_position(module, x, owner, x.shape[1:], drop.lora)


def dropped_keys(
    module: nn.Module, parts: Sequence[tuple[jax.Array, jax.Array]], drop: RowDropout | None
) -> list[tuple[jax.Array, jax.Array]]:
    """Keys and values [S, G, K], some of the values zero, as if their keys had no attention.

    Args:
        module: draws the masks.
        parts: first those that all rows see, last the row's own.
        drop: of the row that the last part belongs to.
    """
    if drop is None or drop.model is None:
        return list(parts)
    lengths = [k_SGK.shape[0] for k_SGK, _ in parts[:-1]]
    shared = [(jnp.zeros(length, int), jnp.arange(length)) for length in lengths]
    owners = [*shared, (drop.ids_E[drop.example_T], drop.offset_T)]
    made = []
    for (k_SGK, v_SGK), owner in zip(parts, owners, strict=True):
        heads = (v_SGK.shape[1], 1)
        made.append((k_SGK, _each_position(module, v_SGK, owner, heads, drop.model)))
    return made


def _each_position(
    module: nn.Module,
    x: jax.Array,
    owner: tuple[jax.Array, jax.Array],
    shape: tuple[int, ...],
    keep: Probability,
) -> jax.Array:
    """`x` [T, ...] with a mask of this shape for every position.

    `owner` has each position's example id and offset in its example, both [T].
    """
    if not x.shape[0]:
        return x
    key = module.make_rng(STREAM)

    def mask(example: jax.Array, offset: jax.Array) -> jax.Array:
        own = jax.random.fold_in(jax.random.fold_in(key, example), offset)
        return jax.random.bernoulli(own, keep, shape)

    return masked(jax.vmap(mask)(*owner), x, keep)


def masked(mask: jax.Array, x: jax.Array, keep: Probability) -> jax.Array:
    """`x` where the mask is true, scaled up to the same mean and rounded once; else 0."""
    return jnp.where(mask, (x * (1 / keep)).astype(x.dtype), 0)
