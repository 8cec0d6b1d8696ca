"""Rank scoring: the log-probability of every candidate answer after every input.

The context is computed once per evaluation. Rows are packed, and each input is run once for all of
its candidates.
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
from softprompt.inference.decode import Report
from softprompt.models import Model
from softprompt.models.rows import Rows
from softprompt.training.sharding import by_row, put_batch, replicated
from softprompt.training.step import Shared, StepConfig, row_logits, shared_part

Params = ParamSpec("Params")
Program = Callable[..., Any]
Tree = Any
Scores = tuple[np.ndarray, np.ndarray]  # sums of log-probabilities, and numbers of tokens


def scoring_budget() -> int:
    """Tokens in a batch: as many as fit into a CPU's caches, or enough to fill an accelerator."""
    return 512 if jax.default_backend() == "cpu" else 16384


def scored_at_once(mesh: Mesh) -> int:
    """Batches scored concurrently.

    The cores of a CPU are partly idle in one program. Two at a time take a fifth less time on two
    cores.
    """
    return 2 if jax.default_backend() == "cpu" and mesh.size == 1 else 1


def one_program(make: Callable[Params, Program]) -> Callable[Params, Program]:
    """Caches the jitted functions that `make` returns, so that all threads share them.

    JAX compiles a jitted function once, even if several threads call it. `lru_cache` alone could
    call `make` in each of several threads, and each would compile its own function.
    """
    lock = threading.Lock()
    cached: Program = functools.lru_cache(maxsize=64)(make)

    @functools.wraps(make)
    def locked(*args: Params.args, **kwargs: Params.kwargs) -> Program:
        with lock:
            return cached(*args, **kwargs)

    return locked


@one_program
def shared_function(config: StepConfig, mesh: Mesh | None) -> Callable[[Tree, Tree], Any]:
    """The jitted `shared_part`: (delta, weights) -> (variables, context), on every device."""
    del mesh  # only a key of the cache: the arguments have shardings
    return jax.jit(functools.partial(shared_part, config))


@one_program
def score_function(model: Model, mesh: Mesh, *, many: bool = False) -> Callable[..., jax.Array]:
    """The jitted (weights, shared, rows, pairs) -> log-probability of each pair [R, C], float32.

    With `many`, `shared` is stacked over N deltas, and the output is [N, R, C].
    """

    def score(weights: Tree, shared: Shared, rows: Rows, pairs: Pairs) -> Any:
        logits_RMV = row_logits(model, weights, shared, rows)
        norm_RM = jax.nn.logsumexp(logits_RMV, axis=-1)

        def log_probs(logits_MV: jax.Array, norm_M: jax.Array, pairs: Pairs) -> Any:
            return logits_MV[pairs.position, pairs.token] - norm_M[pairs.position]

        return jax.vmap(log_probs)(logits_RMV, norm_RM, pairs)

    function = jax.vmap(score, in_axes=(None, 0, None, None)) if many else score
    split = by_row(mesh)
    shardings = (None, None, split, split)
    return jax.jit(function, in_shardings=shardings, out_shardings=replicated(mesh))


def score_batches(
    model: Model,
    weights: Tree,
    shared: Shared,
    batches: Sequence[EvalBatch],
    *,
    mesh: Mesh,
    at_once: int = 1,
    progress: Report = lambda done, total: None,
) -> Scores:
    """Scores every candidate of every example.

    Args:
        model: a decoder or an encoder-decoder.
        weights: its frozen weights.
        shared: the method's variables and the context, from `shared_function`.
        batches: from `eval_batches`; the mesh's data axis divides their rows.
        mesh: the devices.
        at_once: batches that run concurrently. More than one needs a mesh of one device. Each then
            runs in its own thread, where thread-local JAX settings of the caller do not apply.
        progress: called with the batches done and their total.

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
    progress: Report = lambda done, total: None,
) -> list[Scores]:
    """Scores every candidate of every example with each of several deltas, in one program.

    Args:
        model: of all deltas.
        weights: of all deltas.
        shared: one for each delta, of equal shapes; see `score_batches`.
        batches: as for `score_batches`; the program runs each batch with all deltas.
        mesh: the devices.
        at_once: as for `score_batches`.
        progress: called with the batches done and their total.

    Returns:
        For each delta the result of `score_batches`.
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
    progress: Report,
) -> list[np.ndarray]:
    """The outputs of `run` for each batch."""
    assert at_once == 1 or mesh.size == 1, "programs that communicate start in one order everywhere"

    def start(batch: EvalBatch) -> jax.Array:
        return run(*put_batch(mesh, (batch.rows, batch.pairs)))

    outputs: list[np.ndarray] = []
    for output in (
        _pipelined(start, batches) if at_once == 1 else _concurrent(start, batches, at_once)
    ):
        outputs.append(np.asarray(output))
        progress(len(outputs), len(batches))
    return outputs


def _pipelined(
    start: Callable[[EvalBatch], jax.Array], batches: Sequence[EvalBatch]
) -> Iterator[jax.Array]:
    """Outputs in order; each is fetched while the next batch runs."""
    pending: jax.Array | None = None
    for batch in batches:
        running = start(batch)
        if pending is not None:
            yield pending
        pending = running
    assert pending is not None, "an empty split is refused when it is read"
    yield pending


def _concurrent(
    start: Callable[[EvalBatch], jax.Array], batches: Sequence[EvalBatch], at_once: int
) -> Iterator[np.ndarray]:
    """Outputs in order; `at_once` batches run concurrently, each in a thread."""
    with ThreadPoolExecutor(at_once) as pool:
        yield from pool.map(lambda batch: np.asarray(start(batch)), batches)


def normalise(sums_NC: np.ndarray, lengths_NC: np.ndarray, score: str) -> np.ndarray:
    """Scores of candidates: the "sum" of log-probabilities, or the "mean" over tokens."""
    return sums_NC / np.maximum(lengths_NC, 1) if score == "mean" else sums_NC


def probabilities(scores_NC: np.ndarray) -> np.ndarray:
    """Softmax over candidates, [N, C]."""
    shares = np.exp(scores_NC - scores_NC.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)


def token_nll(sums_NC: np.ndarray, lengths_NC: np.ndarray) -> float:
    """Mean negative log-probability per target token, in nats, over examples and candidates."""
    return float(-sums_NC.sum() / lengths_NC.sum())
