"""A finished trial put to use: scores on any split or task, answers to lines of text."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from softprompt.config import ConfigDict, from_dict, members, to_dict
from softprompt.data.eval_batches import coarse_shape, eval_batches
from softprompt.errors import UserError, unknown
from softprompt.evaluation.generation import read_labels
from softprompt.evaluation.metrics import classification, over_tasks
from softprompt.evaluation.scoring import normalise, probabilities, score_batches
from softprompt.inference.decode import generate
from softprompt.methods import METHODS
from softprompt.progress import Progress
from softprompt.training.delta_file import load_delta
from softprompt.training.prepare import (
    Prepared,
    behind,
    delta_shapes,
    delta_shardings,
    prepare,
)
from softprompt.training.session import SPLITS, Session, encode_records
from softprompt.training.sharding import put
from softprompt.training.trial import DELTA, read_config, score

GROUP = 64  # lines answered together


def evaluate_run(
    folder: epath.PathLike,
    *,
    task: str | None = None,
    split: str = "test",
    generated: bool = False,
    any_weights: bool = False,
    progress: Progress,
) -> dict[str, Any]:
    """Scores a trial's selected delta.

    Args:
        folder: of a trial.
        task: one of the trial's, or another for the same prompt (domain shift); None for its own.
        split: train, validation or test.
        generated: also let the model write its answers, greedily, and count the illegal ones.
        any_weights: also where it was trained on other weights than the model's.
        progress: where waiting is reported.

    Returns:
        {"task", "split", "accuracy", "macro_f1", "examples"}, those of a mixture as `over_tasks`
        has them, and with `generated` also {"generated": {..., "illegal": share of answers that are
        no label}}.
    """
    if split not in SPLITS:
        raise unknown("--split", split, SPLITS)
    config, known = for_task(read_config(folder), task)
    prepared, delta = open_run(folder, config, progress, any_weights=any_weights)
    prepared = prepared.of(task) if task in known else prepared
    metrics, _ = score(prepared, delta, split)
    names = ",".join(one.task.name for one in prepared.tasks)
    result: dict[str, Any] = {"task": names, "split": split, **metrics}
    if generated:
        result["generated"] = generated_scores(prepared, delta, split)
    return result


def for_task(config: ConfigDict, task: str | None) -> tuple[ConfigDict, list[str]]:
    """A trial's config for a task that it may not have been trained on, and the config's tasks.

    Raises:
        UserError: another task where each has a prompt of its own.
    """
    known = [one.task.name for one in members(config)]
    if task is None or task in known:
        return config, known
    if config.method.name == "multitask":
        raise unknown("--task", task, known)
    tree = to_dict(config)
    tree["task"] = {"name": task}
    tree["data"] |= {"mixture": ""}
    return from_dict(tree), [task]


def open_run(
    folder: epath.PathLike, config: ConfigDict, progress: Progress, *, any_weights: bool = False
) -> tuple[Prepared, Any]:
    """A trial's model and data, and its selected delta on the devices.

    An attention kernel that was asked for in training is used where it can serve: neither the
    machine nor the rows need be those of training.

    Raises:
        UserError: no delta there yet, one that was trained on other weights, or, with
            `any_weights`, one that does not fit these.
    """
    file = epath.Path(folder) / DELTA
    if not file.exists():
        raise UserError(f"{folder}: the trial has no {DELTA} yet; finish it with softprompt train")
    delta, origin = load_delta(file)
    if config.mesh.attention != "reference":
        tree = to_dict(config)
        tree["mesh"] |= {"attention": "auto"}
        config = from_dict(tree)
    prepared = prepare(config, Session(progress))
    if origin.get("fingerprint") != prepared.loaded.fingerprint:
        if not any_weights:
            raise UserError(
                f"{file} was trained on weights {origin.get('fingerprint')}, {config.model.name} "
                f"has {prepared.loaded.fingerprint}; --any-weights uses it nevertheless"
            )
        check_fit(delta, prepared, file=str(file))
    return prepared, jax.tree.map(put, delta, delta_shardings(prepared, delta))


def check_fit(delta: Any, prepared: Prepared, *, file: str) -> None:
    """Checks that every leaf of a delta is one of the model's and method's, with its shape.

    Raises:
        UserError: names the first that is not.
    """
    step = prepared.step
    fold = functools.partial(METHODS[step.method].fold, cfg=step.method_config)
    expected = jax.eval_shape(fold, delta_shapes(prepared))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(expected, sep="/").items()}
    for path, leaf in flatten_dict(delta, sep="/").items():
        if leaf.shape != shapes.get(path):
            allowed = list(shapes[path]) if path in shapes else f"the leaves {', '.join(shapes)}"
            raise UserError(
                f"{file}: {path} {list(leaf.shape)} does not fit this model; allowed: {allowed}"
            )


def generated_scores(prepared: Prepared, delta: Any, split: str) -> dict[str, float]:
    """Metrics of greedy answers; one that is no legal label is wrong, and counted."""
    tokenizer, shared = prepared.loaded.tokenizer, prepared.shared(delta)
    scores = {}
    for one in prepared.tasks:
        encoded = one.split(split)
        numbers = [encoded.task(example) for example in range(len(encoded.ids))]
        answers = generate(
            prepared.step.model,
            prepared.frozen,
            shared,
            encoded.inputs,
            max_new=max(len(ids) for ids in encoded.candidates) + 1,
            eos_id=tokenizer.eos_id,
            batch=GROUP,
            mesh=prepared.mesh,
            which=numbers if prepared.layout.prompts else None,
        )
        texts = list(one.task.verbalizers.values())
        labels_N, illegal = read_labels(answers, texts, tokenizer)
        found = classification(labels_N, encoded.labels, len(texts))
        scores[one.task.name] = {**found, "illegal": illegal}
    return over_tasks(scores)


def predict_lines(
    folder: epath.PathLike,
    lines: Iterable[str],
    progress: Progress,
    *,
    task: str | None = None,
    group: int = GROUP,
    any_weights: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answers lines of text with a trained prompt.

    A line is the task's only text field; a task with several takes them separated by tabs.

    Args:
        folder: of a trial.
        lines: texts, without line ends.
        progress: where waiting is reported.
        task: as for `evaluate_run`; needed where the trial has several.
        group: lines answered together; 1 answers each as it comes.
        any_weights: also where the prompt was trained on other weights than the model's.

    Yields:
        {"text", "label", "probabilities": {label: share}} for each line, in order.

    Raises:
        UserError: a line with another number of fields; no word on which of several tasks.
    """
    config, known = for_task(read_config(folder), task)
    if task is None and len(known) > 1:
        raise UserError(f"--task is not given; allowed: {', '.join(known)}, the trial's tasks")
    prepared, delta = open_run(folder, config, progress, any_weights=any_weights)
    prepared = prepared.of(task or known[0])
    shared = prepared.shared(delta)
    source, first = iter(lines), 1
    while together := list(itertools.islice(source, group)):
        yield from _answer(prepared, shared, together, first=first)
        first += len(together)


def _answer(
    prepared: Prepared, shared: Any, lines: list[str], *, first: int
) -> Iterator[dict[str, Any]]:
    """Answers one group of lines; `first` is the number of its first line."""
    task, fields = prepared.data.task, prepared.data.task.fields
    tasks_N = np.full(len(lines), prepared.data.test.task(0), np.int32)
    (config,) = (one for one in members(prepared.config) if one.task.name == task.name)
    records: list[dict[str, str | None]] = []
    for number, line in enumerate(lines, first):
        texts = line.split("\t") if len(fields) > 1 else [line]
        if len(texts) != len(fields):
            raise UserError(
                f"line {number} has {len(texts)} tab-separated fields; "
                f"the task takes {len(fields)}: {', '.join(fields)}"
            )
        texts_by_field = dict(zip(fields, texts, strict=True))
        records.append({"id": f"line {number}", "label": None, **texts_by_field})
    encoded = encode_records(config, prepared.loaded, task, records, bos=prepared.bos)
    encoded = dataclasses.replace(behind(prepared.prefix, encoded), tasks=tasks_N)
    rows = 8 if len(lines) > 1 else 1
    multiple, layout = prepared.mesh.shape["data"], prepared.layout
    shape = coarse_shape(encoded, rows=-(-rows // multiple) * multiple, layout=layout)
    batches = eval_batches(encoded, shape, layout=layout)
    model, weights = prepared.step.model, prepared.frozen
    sums_NC, lengths_NC = score_batches(model, weights, shared, batches, mesh=prepared.mesh)
    shares_NC = probabilities(normalise(sums_NC, lengths_NC, config.eval.score))
    labels = list(task.verbalizers)
    for line, share_C in zip(lines, shares_NC, strict=True):
        shares = dict(zip(labels, np.round(share_C, 6).tolist(), strict=True))
        yield {"text": line, "label": labels[int(share_C.argmax())], "probabilities": shares}
