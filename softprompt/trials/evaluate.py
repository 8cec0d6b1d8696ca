"""A finished trial put to use: scores on any split or task, answers to lines of text."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from softprompt.config import (
    ConfigDict,
    from_dict,
    members,
    of_task,
    to_dict,
    trial_name,
    weights_key,
)
from softprompt.console import Progress
from softprompt.data.eval_batches import coarse_shape, eval_batches
from softprompt.data.tasks import SPLITS, get_task
from softprompt.errors import UserError, unknown
from softprompt.evaluation.generation import read_labels
from softprompt.evaluation.metrics import classification, over_tasks
from softprompt.evaluation.ranking import normalise, probabilities, score_batches
from softprompt.inference.decode import generate
from softprompt.training.delta_file import load_delta
from softprompt.training.sharding import nearest_sizes, put
from softprompt.trials import side_by_side as many
from softprompt.trials.data import TaskData, TrialData, encode_records
from softprompt.trials.delta_shapes import check_fit
from softprompt.trials.prepare import Prepared, behind, delta_shardings, prepare
from softprompt.trials.run import DELTA, read_config, score
from softprompt.trials.session import Session

GROUP = 64  # lines answered together


def evaluate_runs(
    folders: Sequence[epath.PathLike],
    *,
    task: str | None = None,
    split: str = "test",
    generated: bool = False,
    any_weights: bool = False,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Scores the selected deltas of trials, those of one model, task and shape side by side.

    Args:
        folders: of trials.
        task: one of each trial's, or another for the same prompts (domain shift); None for their
            own.
        split: train, validation or test.
        generated: also let the model write its answers, greedily, and count the illegal ones.
        any_weights: also where they were trained on other weights than the model's.
        progress: where waiting is reported, and said which are scored side by side.

    Returns:
        For each {"task", "split", "accuracy", "macro_f1", "examples"}, those of a mixture as
        `over_tasks` has them, and with `generated` also {"generated": {..., "illegal": share of
        answers that are no label}}.
    """
    if split not in SPLITS:
        raise unknown("--split", split, SPLITS)
    asked = [for_task(stored_config(folder), task) for folder in folders]
    models: dict[str, list[int]] = {}
    for place, (config, _) in enumerate(asked):
        check_trained(folders[place])
        models.setdefault(weights_key(config), []).append(place)
    results: dict[int, dict[str, Any]] = {}
    for places in models.values():  # each is loaded once, and forgotten
        session, programs = Session(progress), dict[Any, dict[int, Prepared]]()
        for place in places:
            config, known = asked[place]
            prepared = prepare(config, session)
            prepared = prepared.of(task) if task in known else prepared
            programs.setdefault(many.program(prepared), {})[place] = prepared
        for group in programs.values():
            trials = [(folders[place], prepared) for place, prepared in group.items()]
            found = _scored(trials, split, generated=generated, any_weights=any_weights)
            results.update(zip(group, found, strict=True))
    return [results[place] for place in range(len(folders))]


def _scored(
    trials: Sequence[tuple[epath.PathLike, Prepared]],
    split: str,
    *,
    generated: bool,
    any_weights: bool,
) -> Iterator[dict[str, Any]]:
    """What `evaluate_runs` returns of trials (folders, and what they are) of one program."""
    first = trials[0][1]
    sizes, left = many.chunks(first, len(trials), split), iter(trials)
    if sizes[0] > 1:
        name = trial_name(read_config(trials[0][0]))
        first.session.progress.say(
            f"{len(trials)} trials like {name} are scored side by side, {sizes[0]} at a time"
        )
    for size in sizes:
        prepared, deltas = [], []
        for folder, one in itertools.islice(left, size):
            prepared.append(one)
            deltas.append(trained_delta(folder, one, any_weights=any_weights))
        if sizes[0] == 1:
            found = [score(prepared[0], deltas[0], split)[0]]
        else:
            shared = [one.shared(delta) for one, delta in zip(prepared, deltas, strict=True)]
            shared += shared[:1] * (sizes[0] - size)  # spare places: one program for all parts
            found = [one.metrics for one in many.score_deltas(first, shared, split)[:size]]
        for one, delta, metrics in zip(prepared, deltas, found, strict=True):
            names = ",".join(each.task.name for each in one.tasks)
            result: dict[str, Any] = {"task": names, "split": split, **metrics}
            if generated:
                result["generated"] = generated_scores(one, delta, split)
            yield result


def for_task(config: ConfigDict, task: str | None) -> tuple[ConfigDict, list[str]]:
    """A trial's config for a task that it may not have been trained on, and the config's tasks.

    Few shots are drawn anew, from that task; the rest is as `of_task` says.

    Raises:
        UserError: another task where each has a prompt of its own.
    """
    known = [one.task.name for one in members(config)]
    if task is None or task in known:
        return config, known
    if config.method.name == "multitask":
        raise unknown("--task", task, known)
    return of_task(config, {"name": task}), [task]


def stored_config(folder: epath.PathLike) -> ConfigDict:
    """A trial's config, on a mesh that this machine has, its attention kernel where it can serve.

    Neither the machine nor the rows need be those of training, and files that it started from or
    measured its perplexity on need not be there.
    """
    tree = to_dict(read_config(folder))
    mesh = tree["mesh"]
    mesh["data"], mesh["model"] = nearest_sizes(
        mesh["data"], mesh["model"], count=jax.device_count()
    )
    if mesh["attention"] != "reference":
        mesh["attention"] = "auto"
    if tree["method"]["init"] not in ("noise", "zeros"):  # else it may say where a prefix can stand
        tree["method"]["init"] = "uniform"
    tree["eval"]["text"] = ""
    return from_dict(tree)


def check_trained(folder: epath.PathLike) -> None:
    """Checks that a trial has a delta.

    Raises:
        UserError: not yet.
    """
    if not (epath.Path(folder) / DELTA).exists():
        raise UserError(f"{folder}: the trial has no {DELTA} yet; finish it with softprompt train")


def trained_delta(folder: epath.PathLike, prepared: Prepared, *, any_weights: bool = False) -> Any:
    """A trial's selected delta, on the devices.

    Raises:
        UserError: one that was trained on other weights (not with `any_weights`), or that is not
            whole, of the model's shapes, or read by the method.
    """
    file = epath.Path(folder) / DELTA
    delta, origin = load_delta(file)
    if origin.get("fingerprint") != prepared.loaded.fingerprint and not any_weights:
        raise UserError(
            f"{file} was trained on weights {origin.get('fingerprint')}, "
            f"{prepared.config.model.name} has {prepared.loaded.fingerprint}; --any-weights "
            "uses it nevertheless"
        )
    check_fit(delta, prepared.config, prepared.loaded.config, file=str(file))
    return jax.tree.map(put, delta, delta_shardings(prepared, delta))


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


class Unread(Session):
    """A session whose tasks have no examples: answers need none, nor the files that hold them."""

    def data(self, config: ConfigDict, *, bos: bool) -> TrialData:
        """The task without examples."""
        tasks = []
        for one in members(config):
            task = get_task(one.task)
            none = encode_records(one, self.model(config), task, [], bos=bos)
            tasks.append(TaskData(task, none, none, none))
        return TrialData(tasks)


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
        task: as for `evaluate_runs`; needed where the trial has several.
        group: lines answered together; 1 answers each as it comes.
        any_weights: also where the prompt was trained on other weights than the model's.

    Yields:
        {"text", "label", "probabilities": {label: share}} for each line, in order.

    Raises:
        UserError: a line with another number of fields; no word on which of several tasks.
    """
    config, known = for_task(stored_config(folder), task)
    if task is None and len(known) > 1:
        raise UserError(f"--task is not given; allowed: {', '.join(known)}, the trial's tasks")
    check_trained(folder)
    session = Session(progress) if config.method.name == "fewshot" else Unread(progress)
    prepared = prepare(config, session).of(task or known[0])
    shared = prepared.shared(trained_delta(folder, prepared, any_weights=any_weights))
    source, first = iter(lines), 1
    while together := list(itertools.islice(source, group)):
        yield from _answer(prepared, shared, together, first=first)
        first += len(together)


def _answer(
    prepared: Prepared, shared: Any, lines: list[str], *, first: int
) -> Iterator[dict[str, Any]]:
    """Answers one group of lines; `first` is the number of its first line."""
    task, fields = prepared.tasks[0].task, prepared.tasks[0].task.fields
    known = members(prepared.config)
    number = [one.task.name for one in known].index(task.name)
    config, tasks_N = known[number], np.full(len(lines), number, np.int32)
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
