"""Rank scoring: the log-probability of every candidate answer after every input.

A context is computed once for a whole evaluation; rows are packed, and an input is run once for all
of its candidates.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt.data.eval_batches import collect
from softprompt.data.rows import EvalBatch, Pairs
from softprompt.models import Model
from softprompt.models.rows import Rows
from softprompt.training.sharding import by_row, put_batch, replicated
from softprompt.training.step import Shared, StepConfig, row_logits, shared_part

Asked = ParamSpec("Asked")
Program = Callable[..., Any]
Tree = Any
Scores = tuple[np.ndarray, np.ndarray]  # sums of log-probabilities, and numbers of tokens
Told = Callable[[int, int], None]


def scoring_budget() -> int:
    """Tokens scored at once: what a CPU's caches hold, or enough to fill an accelerator."""
    return 512 if jax.default_backend() == "cpu" else 16384


def scored_at_once(mesh: Mesh) -> int:
    """Batches scored at a time: in one program a CPU's cores wait for one another.

    Two programs leave none idle, and take a fifth less time on two cores.
    """
    return 2 if jax.default_backend() == "cpu" and mesh.size == 1 else 1


def one_program(make: Callable[Asked, Program]) -> Callable[Asked, Program]:
    """Keeps the compiled functions that `make` made, one of each for all threads.

    Of a function JAX makes one program, whoever calls it at once. A cache alone would give each of
    several threads that find nothing a function of its own.
    """
    lock = threading.Lock()
    kept: Program = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def found(*args: Asked.args, **kwargs: Asked.kwargs) -> Program:
        with lock:
            return kept(*args, **kwargs)

    return found


@one_program
def shared_function(config: StepConfig, mesh: Mesh) -> Callable[[Tree, Tree], Any]:
    """The compiled `shared_part`: (delta, weights) -> (variables, context), on every device."""
    del mesh  # a key of the cache: the arguments bring their shardings
    return jax.jit(functools.partial(shared_part, config))


@one_program
def score_function(model: Model, mesh: Mesh, *, many: bool = False) -> Callable[..., jax.Array]:
    """The compiled (weights, shared, rows, pairs) -> log-probability of each pair [R, C], float32.

    `many`: of several deltas, whose shared parts are stacked: [N, R, C]. The weights are not.
    """

    def score(weights: Tree, shared: Shared, rows: Rows, pairs: Pairs) -> Any:
        logits_RMV = row_logits(model, weights, shared, rows)
        norm_RM = jax.nn.logsumexp(logits_RMV, axis=-1)

        def log_probs(logits_MV: jax.Array, norm_M: jax.Array, pairs: Pairs) -> Any:
            return logits_MV[pairs.head, pairs.token] - norm_M[pairs.head]

        return jax.vmap(log_probs)(logits_RMV, norm_RM, pairs)

    function = jax.vmap(score, in_axes=(None, 0, None, None)) if many else score
    own = by_row(mesh)
    return jax.jit(function, in_shardings=(None, None, own, own), out_shardings=replicated(mesh))


def score_batches(
    model: Model,
    weights: Tree,
    shared: Shared,
    batches: Sequence[EvalBatch],
    *,
    mesh: Mesh,
    at_once: int = 1,
    progress: Told = lambda done, total: None,
) -> Scores:
    """Scores every candidate of every example.

    Args:
        model: of either kind.
        weights: its frozen weights.
        shared: the method's variables and the context, from `shared_function`.
        batches: from `eval_batches`, rows a multiple of the mesh's data axis.
        mesh: where to run.
        at_once: batches that run at a time, where more than one each in a thread of its own: on one
            device only, and without JAX settings that are the calling thread's alone.
        progress: called with batches done and in all.

    Returns:
        Sums of log-probabilities (float64) and numbers of tokens, both [examples, candidates].
    """
    run = functools.partial(score_function(model, mesh), weights, shared)
    return collect(batches, _outputs(run, batches, mesh, at_once, progress))


def score_side_by_side(
    model: Model,
    weights: Tree,
    shared: Sequence[Shared],
    batches: Sequence[EvalBatch],
    *,
    mesh: Mesh,
    at_once: int = 1,
    progress: Told = lambda done, total: None,
) -> list[Scores]:
    """Scores every candidate of every example behind each of several deltas, in one program.

    Rows are packed once for all of them; each context has been computed once.

    Args:
        model: of all.
        weights: of all.
        shared: one a delta, of equal shapes; otherwise as for `score_batches`.
        batches: as for `score_batches`; a program runs a batch as often as there are deltas.
        mesh: where to run.
        at_once: as for `score_batches`.
        progress: called with batches done and in all.

    Returns:
        What `score_batches` returns of each.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shared)
    run = functools.partial(score_function(model, mesh, many=True), weights, stacked)
    outputs = _outputs(run, batches, mesh, at_once, progress)
    return [collect(batches, [each_NRC[n] for each_NRC in outputs]) for n in range(len(shared))]


def _outputs(
    run: Callable[[Rows, Pairs], jax.Array],
    batches: Sequence[EvalBatch],
    mesh: Mesh,
    at_once: int,
    progress: Told,
) -> list[np.ndarray]:
    """What `run` returns of each batch's rows and pairs."""
    assert at_once == 1 or mesh.size == 1, "programs that communicate start in one order everywhere"
    start = lambda batch: run(*put_batch(mesh, (batch.rows, batch.pairs)))  # noqa: E731
    found: list[np.ndarray] = []
    for output in _lagging(start, batches) if at_once == 1 else _beside(start, batches, at_once):
        found.append(np.asarray(output))
        progress(len(found), len(batches))
    return found


def _lagging(
    start: Callable[[EvalBatch], jax.Array], batches: Sequence[EvalBatch]
) -> Iterator[jax.Array]:
    """Outputs in order, each to be fetched while the next batch runs."""
    pending: jax.Array | None = None
    for batch in batches:
        running = start(batch)
        if pending is not None:
            yield pending
        pending = running
    assert pending is not None, "an empty split is refused when it is read"
    yield pending


def _beside(
    start: Callable[[EvalBatch], jax.Array], batches: Sequence[EvalBatch], at_once: int
) -> Iterator[np.ndarray]:
    """Outputs in order, so many batches running at a time: those of one thread run in turns."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda batch: np.asarray(start(batch)), batches)


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
