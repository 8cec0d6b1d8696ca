"""The log-probability of every token of a text after a lane's context."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.inference.pool import SIZES, Tree, abstract, compiled, padded
from softprompt.inference.pool_programs import ALTERNATIVES, Choice, Lane
from softprompt.models.decoder import Decoder
from softprompt.models.layers import collections
from softprompt.models.rows import Rows

BLOCK = 32  # positions whose logits are in memory at once; divides all of `SIZES`


def score_text(model: Decoder, weights: Tree, lane: Lane, ids_T: jax.Array) -> Choice:
    """Scores each token of a text given those before it.

    Args:
        model: the decoder.
        weights: its frozen weights.
        lane: the context, and the variables that rows read.
        ids_T: the text, padded on the right to a multiple of `BLOCK`.

    Returns:
        Fields [T]: entry t is about token t + 1, and the last entry means nothing.
    """
    apply: Any = functools.partial(model.apply, collections(weights, lane.variables))
    row = Rows(ids_T, jnp.ones_like(ids_T), jnp.arange(len(ids_T)))
    x_TD = apply(lane.context, row, method="hidden")
    next_T = jnp.roll(ids_T, -1)

    def block(inputs: tuple[jax.Array, jax.Array]) -> Choice:
        x_MD, ids_M = inputs
        logprobs_MV = jax.nn.log_softmax(apply(x_MD, method="logits"))
        chosen_M = jnp.take_along_axis(logprobs_MV, ids_M[:, None], axis=-1)[:, 0]
        top, top_ids = jax.lax.top_k(logprobs_MV, ALTERNATIVES)
        return Choice(ids_M, chosen_M, top_ids, top)

    blocks = x_TD.reshape(-1, BLOCK, x_TD.shape[-1]), next_T.reshape(-1, BLOCK)
    scored: Choice = jax.lax.map(block, blocks)
    return Choice(*(field.reshape(len(ids_T), *field.shape[2:]) for field in scored))


class TextScores:
    """Compiled programs that score texts of up to `most` tokens behind one kind of lane."""

    def __init__(self, model: Decoder, weights: Tree, like: Lane, most: int) -> None:
        self._weights = weights
        self._programs = compiled(self._lowered(model, like, padded(most)))

    def __call__(self, lane: Lane, ids: Sequence[int]) -> Choice:
        """`score_text` without padding: fields [T - 1], about all tokens but the first."""
        ids_T = np.zeros(padded(len(ids)), np.int32)
        ids_T[: len(ids)] = ids
        found = self._programs[len(ids_T)](self._weights, lane, ids_T)
        return Choice(*(np.asarray(field)[: len(ids) - 1] for field in found))

    def _lowered(self, model: Decoder, like: Lane, most: int) -> Iterator[tuple[int, Any]]:
        run, shapes = jax.jit(functools.partial(score_text, model)), jax.tree.map(abstract, like)
        for size in (size for size in SIZES if size <= most):
            yield size, run.lower(self._weights, shapes, np.zeros(size, np.int32))
