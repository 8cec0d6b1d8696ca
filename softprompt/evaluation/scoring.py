"""Rank scoring: the log-probability of every candidate answer after every input.

A context is computed once for a whole evaluation; rows are packed, and an input is run once for all
of its candidates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from softprompt.data.eval_batches import EvalBatch, collect
from softprompt.models import Decoder, Model
from softprompt.models.decoder import Context
from softprompt.training.sharding import by_row, put_batch, replicated
from softprompt.training.step import Shared, StepConfig, row_logits, shared_part

Tree = Any


@functools.lru_cache(maxsize=32)
def shared_function(config: StepConfig, mesh: Mesh) -> Callable[[Tree, Tree], Any]:
    """The compiled `shared_part`: (delta, weights) -> (variables, context), on every device."""
    del mesh  # a key of the cache: the arguments bring their shardings
    return jax.jit(functools.partial(shared_part, config))


@functools.lru_cache(maxsize=32)
def text_context_function(model: Decoder) -> Callable[[Tree, jax.Array], Context]:
    """The compiled context of a text: (weights, tokens_P) -> Context."""

    def text_context(weights: Tree, tokens_P: jax.Array) -> Any:
        return model.apply({"params": weights}, tokens_P, method="text_context")

    return jax.jit(text_context)


@functools.lru_cache(maxsize=32)
def score_function(model: Model, mesh: Mesh) -> Callable[..., jax.Array]:
    """The compiled (weights, shared, batch) -> log-probability of each pair [R, C], float32."""

    def score(weights: Tree, shared: Shared, batch: dict[str, jax.Array]) -> Any:
        logits_RMV = row_logits(model, weights, shared, batch)
        norm_RM = jax.nn.logsumexp(logits_RMV, axis=-1)

        def pairs(logits_MV: jax.Array, norm_M: jax.Array, head_C: Any, token_C: Any) -> Any:
            return logits_MV[head_C, token_C] - norm_M[head_C]

        return jax.vmap(pairs)(logits_RMV, norm_RM, batch["pair_head_RC"], batch["pair_token_RC"])

    return jax.jit(score, in_shardings=(None, None, by_row(mesh)), out_shardings=replicated(mesh))


def score_batches(
    model: Model,
    weights: Tree,
    shared: Shared,
    batches: Sequence[EvalBatch],
    *,
    mesh: Mesh,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores every candidate of every example.

    Args:
        model: of either kind.
        weights: its frozen weights.
        shared: the method's variables and the context, from `shared_function` or a text.
        batches: from `eval_batches`, rows a multiple of the mesh's data axis.
        mesh: where to run.
        progress: called with batches done and in all.

    Returns:
        Sums of log-probabilities (float64) and numbers of tokens, both [examples, candidates].
    """
    score = score_function(model, mesh)
    outputs: list[np.ndarray] = []
    pending: jax.Array | None = None
    for batch in batches:
        running = score(weights, shared, put_batch(mesh, batch.arrays))
        if pending is not None:  # fetched while the next batch runs
            outputs.append(np.asarray(pending))
            progress(len(outputs), len(batches))
        pending = running
    assert pending is not None, "an empty split is refused when it is read"
    outputs.append(np.asarray(pending))
    progress(len(outputs), len(batches))
    return collect(batches, outputs)


def normalise(sums_NC: np.ndarray, lengths_NC: np.ndarray, score: str) -> np.ndarray:
    """Scores by "sum", or by "mean" over a candidate's tokens."""
    return sums_NC / np.maximum(lengths_NC, 1) if score == "mean" else sums_NC


def probabilities(scores_NC: np.ndarray) -> np.ndarray:
    """Softmax over candidates, [N, C]."""
    shares = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def token_nll(sums_NC: np.ndarray, lengths_NC: np.ndarray) -> float:
    """Mean negative log-probability a target token, in nats, over all examples and candidates."""
    return float(-sums_NC.sum() / lengths_NC.sum())
