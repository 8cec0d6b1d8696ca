"""Scores several trials side by side: deltas of equal shapes, one model, the same examples.

The program is `jax.vmap` of the scoring of one delta. It batches the method's variables and the
context, not the weights. Rows are packed once. A batch has as many tokens in total as a batch of a
single delta, so it needs about as much memory.

Concatenated contexts (`Context.choices`) would work for prompts and prefixes only, and each token
would attend to the keys of all N contexts, of which it needs one.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax

from softprompt.evaluation.evaluators import ranked
from softprompt.evaluation.metrics import over_tasks
from softprompt.evaluation.ranking import score_side_by_side, scored_at_once, scoring_budget
from softprompt.methods import METHODS
from softprompt.training.memory import MEMORY_SHARE, bytes_here, bytes_of, device_memory
from softprompt.training.step import Shared
from softprompt.trials.data import evaluators_of
from softprompt.trials.measure import Predictions
from softprompt.trials.prepare import Prepared, delta_shapes


def score_deltas(
    prepared: Prepared, shared: Sequence[Shared], split: str
) -> list[tuple[dict[str, float], Predictions]]:
    """Measures each of several deltas on a split; the results are those of `measure`.

    Args:
        prepared: any of their trials, which have equal `program_key`s.
        shared: the result of `Prepared.shared` for each delta.
        split: train, validation or test.
    """
    session, mesh, step = prepared.session, prepared.mesh, prepared.step
    splits = prepared.data.task_splits(split, mesh=mesh, layout=prepared.layout)
    batches = prepared.data.eval_batches(
        split, mesh=mesh, layout=prepared.layout, deltas=len(shared)
    )
    run = functools.partial(
        score_side_by_side,
        step.model,
        prepared.frozen,
        shared,
        mesh=mesh,
        at_once=scored_at_once(mesh),
        progress=functools.partial(session.progress.stage, f"score {split}"),
    )
    scores = [run(task_batches) for task_batches in batches]
    results = []
    for n in range(len(shared)):
        ranks = {
            part.task.name: ranked(part, task_scores[n], prepared.config.eval.score)
            for part, task_scores in zip(splits, scores, strict=True)
        }
        metrics = over_tasks({task: one.metrics for task, one in ranks.items()})
        results.append((metrics, [one.predictions for one in ranks.values()]))
    return results


def program_key(prepared: Prepared) -> tuple[Any, ...]:
    """A key: trials of a session with equal keys can be scored side by side.

    They may differ in seed, initialiser and training.
    """
    step = prepared.step
    static = (
        *(step.model, step.method, step.method_config, step.opening),
        *(prepared.layout, prepared.contexts),
    )
    return (
        static,
        prepared.data,
        prepared.config.eval.score,
        prepared.loaded.fingerprint,
        prepared.mesh,
    )


def chunk_sizes(prepared: Prepared, count: int, split: str) -> list[int]:
    """How many of `count` deltas to score at a time: equal chunks, the last one may be smaller.

    The size is limited by the estimated memory of a chunk's contexts, and by the tokens of a batch,
    which has at least a row per delta and device. Trained weights are scored one by one, and so are
    trials with other evaluators than ranking.
    """
    used = {name for one in prepared.tasks for name in evaluators_of(one.task, prepared.config)}
    if METHODS[prepared.step.method].Settings.trains_weights or used != {"ranking"}:
        return [1] * count
    shape = prepared.data.eval_shape(  # with one row per device
        split, mesh=prepared.mesh, layout=prepared.layout, deltas=scoring_budget()
    )
    each = 2 * shared_bytes(prepared)  # they are copied when they are stacked
    weights = bytes_here(prepared.frozen)
    room = int((MEMORY_SHARE * device_memory() - weights) // each) if each else count
    tokens = shape.rows * (shape.tokens + shape.inputs)
    most = max(1, min(scoring_budget() // tokens, room, count))
    chunks = -(-count // most)
    size = -(-count // chunks)
    return [min(size, count - first) for first in range(0, count, size)]


def shared_bytes(prepared: Prepared) -> int:
    """Bytes of the variables and the context of one delta."""
    step = prepared.step
    fold = functools.partial(METHODS[step.method].fold, cfg=step.method_config)
    shapes = jax.eval_shape(fold, delta_shapes(prepared))
    return bytes_of(jax.eval_shape(prepared.shared, shapes))
