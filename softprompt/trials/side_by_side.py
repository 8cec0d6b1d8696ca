"""Trials scored side by side: deltas of equal shapes behind one model, on the same examples.

The program is the scoring of one delta under `jax.vmap`; the weights are not batched, and of a
method only what its rows share is. Rows are packed once. A batch has as many tokens in all as one
of a single delta, so that it fits where that does.

Several contexts end to end (`Context.choices`) would do for prompts and prefixes alone, and a token
would be scored against the keys of all N to see those of one.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from softprompt.evaluation.evaluators import ranked
from softprompt.evaluation.metrics import over_tasks
from softprompt.evaluation.ranking import score_side_by_side, scored_at_once, scoring_budget
from softprompt.methods import METHODS
from softprompt.training.memory import MEMORY_SHARE, bytes_here, bytes_of, device_memory
from softprompt.training.step import Shared
from softprompt.trials.data import evaluators_of
from softprompt.trials.prepare import (
    Prepared,
    delta_shapes,
)


class Scored(NamedTuple):
    """A delta on a split.

    Attributes:
        metrics: as `over_tasks` has them.
        predictions: task -> example id -> {"label", "predicted", "scores": {label: score}}.
    """

    metrics: dict[str, float]
    predictions: dict[str, dict[str, dict[str, Any]]]


def score_deltas(prepared: Prepared, shared: Sequence[Shared], split: str) -> list[Scored]:
    """Scores a split behind each of several deltas.

    Args:
        prepared: of any of their trials: they agree in their `program`.
        shared: what `Prepared.shared` makes of each delta.
        split: train, validation or test.
    """
    session, mesh, step = prepared.session, prepared.mesh, prepared.step
    parts = prepared.data.parts(split, mesh=mesh, layout=prepared.layout)
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
    found = [run(own) for own in batches]
    results = []
    for n in range(len(shared)):
        ranks = [
            ranked(part, of_task[n], prepared.config.eval.score)
            for part, of_task in zip(parts, found, strict=True)
        ]
        pairs = list(zip(parts, ranks, strict=True))
        metrics = over_tasks({part.task.name: one.metrics for part, one in pairs})
        predictions = {
            part.task.name: dict(zip(part.encoded.ids, one.predictions, strict=True))
            for part, one in pairs
        }
        results.append(Scored(metrics, predictions))
    return results


def program(prepared: Prepared) -> tuple[Any, ...]:
    """What trials of a session have in common that can be scored side by side.

    They may differ in seed, initialiser, training and what follows from it.
    """
    step = prepared.step
    static = (step.model, step.method, step.method_config, prepared.layout, prepared.contexts)
    return (
        static,
        prepared.data,
        prepared.config.eval.score,
        prepared.loaded.fingerprint,
        prepared.mesh,
    )


def chunks(prepared: Prepared, count: int, split: str) -> list[int]:
    """How many of `count` deltas of one program are scored at a time: equal parts, the last short.

    As many as leave each a row on every device within the tokens of a batch, and whose contexts fit
    into memory beside the weights, by estimate. Weights that were trained are scored one by one,
    and so are trials that are measured by more than ranking.
    """
    asked = {name for one in prepared.tasks for name in evaluators_of(one.task, prepared.config)}
    if METHODS[prepared.step.method].Settings.trains_weights or asked != {"ranking"}:
        return [1] * count
    shape = prepared.data.eval_shape(  # of a row a device
        split, mesh=prepared.mesh, layout=prepared.layout, deltas=scoring_budget()
    )
    each = 2 * shared_bytes(prepared)  # they are copied into one
    weights = bytes_here(prepared.frozen)
    room = int((MEMORY_SHARE * device_memory() - weights) // each) if each else count
    tokens = shape.rows * (shape.tokens + shape.inputs)
    most = max(1, min(scoring_budget() // tokens, room, count))
    parts = -(-count // most)
    size = -(-count // parts)
    return [min(size, count - first) for first in range(0, count, size)]


def shared_bytes(prepared: Prepared) -> int:
    """Of the variables and the context of one delta."""
    step = prepared.step
    fold = functools.partial(METHODS[step.method].fold, cfg=step.method_config)
    shapes = jax.eval_shape(fold, delta_shapes(prepared))
    return bytes_of(jax.eval_shape(prepared.shared, shapes))
