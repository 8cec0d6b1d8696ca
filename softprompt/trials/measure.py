"""Measures a trial's delta with the evaluators of its config."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import jax
from etils import epath

from softprompt.config import ConfigDict, transfers
from softprompt.evaluation import latency
from softprompt.evaluation.evaluators import Evaluator, Result, Split, generation, ranking
from softprompt.evaluation.metrics import over_tasks
from softprompt.evaluation.perplexity import likelihood, perplexity
from softprompt.evaluation.ranking import shared_function
from softprompt.files import write_text
from softprompt.methods import METHODS
from softprompt.training.step import Shared
from softprompt.trials.data import evaluators_of
from softprompt.trials.prepare import Prepared, prepare_scoring

Tree = Any
Predictions = list[list[dict[str, Any]]]  # a list for each task, a dict for each example

PREDICTIONS = "predictions.jsonl"


def evaluator(name: str, config: ConfigDict) -> Evaluator:
    """Makes an evaluator by name, with a config's settings."""
    if name == "ranking":
        return ranking(config.eval.score)
    if name == "likelihood":
        return likelihood
    return generation(config.eval.beams, max_new=config.task.max_target)


def measure(prepared: Prepared, delta: Tree, split: str) -> tuple[dict[str, float], Predictions]:
    """Measures a delta on a split with every evaluator of the config.

    Returns:
        The metrics, joined by `over_tasks`, and the predictions of all evaluators.
    """
    shared, metrics, predictions = prepared.shared(delta), {}, []
    for part in prepared.data.task_splits(split, mesh=prepared.mesh, layout=prepared.layout):
        results = [
            measure_one(name, prepared, shared, part, split)
            for name in evaluators_of(part.task, prepared.config)
        ]
        metrics[part.task.name] = {k: v for one in results for k, v in one.metrics.items()}
        predictions.append(
            [
                {key: value for one in of_evaluators for key, value in one.items()}
                for of_evaluators in zip(*(one.predictions for one in results), strict=True)
            ]
        )
    return over_tasks(metrics), predictions


def measure_one(name: str, prepared: Prepared, shared: Shared, part: Split, split: str) -> Result:
    """Runs one evaluator on one task."""
    verb = "generate" if name == "generation" else "score"
    report = functools.partial(prepared.session.progress.stage, f"{verb} {split}")
    return evaluator(name, prepared.config)(prepared.evaluator_inputs, shared, part, report)


def predictions_by_id(
    prepared: Prepared, split: str, found: Predictions, *, named: bool = False
) -> Iterator[dict]:
    """Lines of predictions.jsonl: id and prediction of each example.

    Lines of a mixture also have the task; `named` adds it to those of a single task.
    """
    for one, of_task in zip(prepared.tasks, found, strict=True):
        task = {"task": one.task.name} if named or len(prepared.tasks) > 1 else {}
        for name, prediction in zip(one.split(split).ids, of_task, strict=True):
            yield task | {"id": name} | prediction


def read_predictions(folder: epath.PathLike) -> list[dict[str, Any]]:
    """The lines of a trial's predictions.jsonl."""
    text = (epath.Path(folder) / PREDICTIONS).read_text()
    return [json.loads(line) for line in text.splitlines()]


def final_metrics(prepared: Prepared, folder: epath.Path, delta: Tree) -> dict[str, Any]:
    """Metrics of the selected delta on the test split.

    If the config asks for them, also on the test splits of other tasks and on a text, and the
    latency. Writes the predictions of the test splits.
    """
    tested, found = measure(prepared, delta, "test")
    metrics: dict[str, Any] = {"test": tested}
    lines = list(predictions_by_id(prepared, "test", found))
    if others := transfers(prepared.config):
        metrics["transfer"] = {}
        for config in others:
            other = prepare_scoring(config, prepared.session)
            tested, found = measure(other, delta, "test")
            metrics["transfer"][config.task.name] = tested
            lines += predictions_by_id(other, "test", found, named=True)
        if not prepared.frozen:
            prepared.session.release(prepared.config)
    if jax.process_index() == 0:
        text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
        write_text(folder / PREDICTIONS, text)
    if prepared.config.eval.text:
        pieces = prepared.session.text(prepared.config, bos=prepared.bos)
        report = functools.partial(prepared.session.progress.stage, "score text")
        shared = prepared.with_opening(()).shared(delta)
        metrics["text"] = perplexity(prepared.evaluator_inputs, shared, pieces, report)
    if prepared.config.eval.latency:
        metrics["latency"] = latency_metrics(prepared, delta)
    return metrics


def latency_metrics(prepared: Prepared, delta: Tree) -> dict[str, Any]:
    """The latency of the delta against the base model: see `latency.compare`.

    The inputs are those of a mixture's first task. Trained weights are cast to the base's dtype.
    """
    session, mesh, step = prepared.session, prepared.mesh, prepared.step
    session.progress.stage("time prefill and decoding")
    weights = session.model(prepared.config).weights  # loaded again if training freed them
    plain = shared_function(step._replace(method="none", method_config=None), mesh)
    inputs = prepared.tasks[0].test.inputs
    base = latency.Served(weights, plain({}, weights), inputs)
    if METHODS[step.method].Settings.trains_weights:
        trained = jax.tree.map(lambda new, old: new.astype(old.dtype), delta, weights)
        ours = latency.Served(trained, plain({}, trained), inputs)
    else:
        which = 0 if prepared.layout.prompts else None
        ours = latency.Served(weights, prepared.shared(delta), inputs, which)
    rows = -(-latency.ROWS // mesh.shape["data"]) * mesh.shape["data"]
    return latency.compare(step.model, base, ours, mesh=mesh, rows=rows)
