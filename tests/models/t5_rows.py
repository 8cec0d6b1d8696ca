"""A T5 on one pair and on a packed row, compiled once a model and shape."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.models.rows import Rows
from softprompt.models.t5 import T5


@functools.cache
def compiled(model: T5) -> Any:
    """The model on one pair, compiled once a shape whichever test asks."""
    return jax.jit(lambda variables, *tokens: model.apply(variables, *tokens))


def alone(model: T5, variables: Any, tokens_S: Any, tokens_T: Any) -> np.ndarray:
    """Logits [T, V] of one pair; the targets are padded behind, so that shapes are few."""
    padded_T = np.pad(tokens_T, (0, -len(tokens_T) % 8))
    return np.asarray(compiled(model)(variables, jnp.array(tokens_S), padded_T))[: len(tokens_T)]


@functools.cache
def compiled_row(model: T5) -> Any:
    """The model on a row of the encoder and one of the decoder: logits [T, V]."""

    def run(variables: Any, encoder: Rows, decoder: Rows) -> jax.Array:
        contexts = model.apply(variables, method="prompt_context")
        index_T = jnp.arange(decoder.tokens.shape[0])
        row = dataclasses.replace(decoder, encoder=encoder, index=index_T)
        x_TD = model.apply(variables, contexts, row, method="target_states")
        return model.apply(variables, x_TD, method="unembed")

    return jax.jit(run)


def packed(sequences: list[list[int]], segments: list[int], *, slots: int, length: int) -> Rows:
    """A stack's row, each segment behind its slots."""
    columns: list[tuple[int, int, int, int]] = []
    for tokens, segment in zip(sequences, segments, strict=True):
        columns += [(0, segment, 0, p) for p in range(slots)]
        columns += [(t, segment, i, -1) for i, t in enumerate(tokens)]
    columns += [(3, 0, i, -1) for i in range(length - len(columns))]
    tokens, segments_T, positions, index = map(jnp.array, zip(*columns, strict=True))
    return Rows(tokens, segments_T, positions, prompt_index=index if slots else None)
