"""Greedy generation by running the whole row again for every token."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.pipeline import GenerationBatch
from softprompt.models.decoder import Context, Decoder
from softprompt.models.tokenizer import Tokenizer

Tree = Any


@functools.lru_cache(maxsize=32)
def greedy_function(model: Decoder, max_new: int) -> Callable[..., jax.Array]:
    """The compiled (weights, shared, tokens_BT, lengths_B) -> likeliest tokens [B, max_new]."""

    def one(
        weights: Tree, shared: tuple[Tree, Context], tokens_T: jax.Array, length: jax.Array
    ) -> jax.Array:
        variables, context = shared
        collections = {"params": weights, "delta": variables}
        same_T, positions_T = jnp.ones_like(tokens_T), jnp.arange(tokens_T.shape[0])

        def extend(nth: jax.Array, row_T: jax.Array) -> jax.Array:
            x_TD: Any = model.apply(
                collections, context, row_T, same_T, positions_T, method="hidden"
            )
            last = length + nth
            logits_1V: Any = model.apply(collections, x_TD[last - 1][None], method="logits")
            return row_T.at[last].set(jnp.argmax(logits_1V[0]).astype(row_T.dtype))

        row_T = jax.lax.fori_loop(0, max_new, extend, tokens_T)
        return jax.lax.dynamic_slice(row_T, (length,), (max_new,))

    return jax.jit(jax.vmap(one, in_axes=(None, None, 0, 0)))


def generate(
    model: Any,
    weights: Tree,
    shared: tuple[Tree, Context],
    batches: Sequence[GenerationBatch],
    *,
    max_new: int,
    eos_id: int | None,
) -> dict[int, list[int]]:
    """Greedy continuations.

    Args:
        model: the decoder.
        weights: its frozen weights.
        shared: the method's variables and the context.
        batches: from `generation_batches` with the same `max_new`.
        max_new: tokens to generate.
        eos_id: what ends a continuation (and is cut off); None runs to `max_new`.

    Returns:
        Generated ids by the example's index.
    """
    greedy = greedy_function(model, max_new)
    answers = {}
    for batch in batches:
        out_BN = np.asarray(greedy(weights, shared, batch.tokens_BT, batch.lengths_B))
        for example, ids in zip(batch.example_B.tolist(), out_BN.tolist(), strict=True):
            if example >= 0:
                answers[example] = ids[: ids.index(eos_id)] if eos_id in ids else ids
    return answers


def read_labels(
    answers: Mapping[int, Sequence[int]], verbalizers: Sequence[str], tokenizer: Tokenizer
) -> tuple[np.ndarray, float]:
    """Reads generated answers as labels.

    An answer is the label whose verbalizer it begins with, ending at a word's end; the longest one
    where several fit.

    Args:
        answers: generated ids by example index 0..N-1.
        verbalizers: target texts, in the order of the labels.
        tokenizer: of the model.

    Returns:
        Label indices [N], -1 for an answer that is no legal label, and the share of those.
    """
    words = [text.strip() for text in verbalizers]
    labels_N = np.full(len(answers), -1)
    for example, ids in answers.items():
        said = tokenizer.decode(ids).strip()
        fitting = [
            word
            for word in words
            if said.startswith(word) and not said[len(word) : len(word) + 1].isalnum()
        ]
        if fitting:
            labels_N[example] = words.index(max(fitting, key=len))
    return labels_N, float(np.mean(labels_N < 0)) if len(answers) else 0.0
