"""Uses finished trials: metrics on any split or task, and answers to lines of text."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from softprompt.config import (
    ConfigDict,
    from_dict,
    method_settings,
    task_config,
    task_configs,
    to_dict,
    trial_name,
    weights_key,
)
from softprompt.console import Progress
from softprompt.data.builtin_tasks import get_task
from softprompt.data.encode import Encoded
from softprompt.data.eval_batches import coarse_shape, eval_batches
from softprompt.data.subsets import check_digests
from softprompt.data.tasks import SPLITS, parse_template
from softprompt.errors import UserError, unknown
from softprompt.evaluation.evaluators import Split, generation
from softprompt.evaluation.metrics import over_tasks
from softprompt.evaluation.ranking import normalise, probabilities, score_batches
from softprompt.inference.decode import generate
from softprompt.inference.sampling import GREEDY, Sampling
from softprompt.methods.delta_file import load_delta
from softprompt.training.sharding import nearest_sizes, put
from softprompt.trials import side_by_side
from softprompt.trials.data import encode_records, long_opening, with_number
from softprompt.trials.delta_checks import ANY_WEIGHTS, read_delta
from softprompt.trials.forward import ForwardPass, prepare_forward, text_bos
from softprompt.trials.measure import measure, measure_one
from softprompt.trials.prepare import Prepared, delta_shardings, prepare_scoring
from softprompt.trials.run import DELTA, check_trained, read_config
from softprompt.trials.session import Session

LINES = 64  # in a batch


def evaluate_trials(
    folders: Sequence[epath.PathLike],
    *,
    task: str | None = None,
    split: str = "test",
    generated: bool = False,
    any_weights: bool = False,
    progress: Progress,
) -> list[dict[str, Any]]:
    """Measures the selected deltas of trials; equal models, tasks and shapes run side by side.

    Args:
        folders: of trials.
        task: a task of each trial, or another one (domain shift); None for the trials' own.
        split: train, validation or test.
        generated: also generate answers greedily, and count those that are not labels.
        any_weights: also accept deltas that were trained on other weights than the model's.
        progress: the display.

    Returns:
        For each trial {"task", "split", metrics of the task's evaluators, "examples"}, with the
        metrics of a mixture joined by `over_tasks`; with `generated` also {"generated": {...}}.
    """
    if split not in SPLITS:
        raise unknown("--split", split, SPLITS)
    requests = [for_task(on_this_machine(read_config(folder)), task) for folder in folders]
    models: dict[str, list[int]] = {}
    for index, (config, _) in enumerate(requests):
        check_trained(folders[index])
        models.setdefault(weights_key(config), []).append(index)
    results: dict[int, dict[str, Any]] = {}

    def run(indices: Sequence[int]) -> None:
        """Loads a model; it is freed when the call ends, before the next one is loaded."""
        session, programs = Session(progress), dict[Any, dict[int, Prepared]]()
        for index in indices:
            config, known = requests[index]
            prepared = prepare_scoring(config, session)
            prepared = prepared.for_task(task) if task in known else prepared
            programs.setdefault(side_by_side.program_key(prepared), {})[index] = prepared
        for group in programs.values():
            trials = [(folders[index], prepared) for index, prepared in group.items()]
            found = _measured(trials, split, generated=generated, any_weights=any_weights)
            results.update(zip(group, found, strict=True))

    for indices in models.values():
        run(indices)
    return [results[index] for index in range(len(folders))]


def _measured(
    trials: Sequence[tuple[epath.PathLike, Prepared]],
    split: str,
    *,
    generated: bool,
    any_weights: bool,
) -> Iterator[dict[str, Any]]:
    """The results of `evaluate_trials` for (folder, trial) pairs that share a program."""
    first = trials[0][1]
    sizes, left = side_by_side.chunk_sizes(first, len(trials), split), iter(trials)
    if sizes[0] > 1:
        name = trial_name(read_config(trials[0][0]))
        first.session.progress.say(
            f"{len(trials)} trials like {name} are scored side by side, {sizes[0]} at a time"
        )
    for size in sizes:
        chunk = list(itertools.islice(left, size))
        deltas = [trained_delta(folder, one, any_weights=any_weights) for folder, one in chunk]
        for folder, one in chunk:
            warn_other_data(folder, one, split)
        prepared = [one for _, one in chunk]
        if sizes[0] == 1:
            found = [measure(prepared[0], deltas[0], split)[0]]
        else:
            shared = [one.shared(delta) for one, delta in zip(prepared, deltas, strict=True)]
            shared += shared[:1] * (sizes[0] - size)  # padding, so that all chunks share a program
            scored = side_by_side.score_deltas(first, shared, split)[:size]
            found = [metrics for metrics, _ in scored]
        for one, delta, metrics in zip(prepared, deltas, found, strict=True):
            names = ",".join(each.task.name for each in one.tasks)
            result: dict[str, Any] = {"task": names, "split": split, **metrics}
            if generated:
                result["generated"] = generated_metrics(one, delta, split)
            yield result


def generated_metrics(prepared: Prepared, delta: Any, split: str) -> dict[str, float]:
    """Metrics of greedily generated answers; an answer that is not a label counts as wrong."""
    shared, found = prepared.shared(delta), {}
    for part in prepared.data.task_splits(split, mesh=prepared.mesh, layout=prepared.layout):
        metrics = measure_one("generation", prepared, shared, part, split).metrics
        found[part.task.name] = {k.removeprefix("generated_"): v for k, v in metrics.items()}
    return over_tasks(found)


def for_task(config: ConfigDict, task: str | None) -> tuple[ConfigDict, list[str]]:
    """A trial's config for a task, which may be a new one, and the names of the config's tasks.

    Few-shot examples are drawn from a new task; otherwise see `task_config`.

    Raises:
        UserError: the task is new, and the method has a prompt for each task.
    """
    known = [one.task.name for one in task_configs(config)]
    if task is None or task in known:
        return config, known
    if method_settings(config).per_task:
        raise unknown("--task", task, known)
    return task_config(config, {"name": task}), [task]


def on_this_machine(config: ConfigDict) -> ConfigDict:
    """A config with a mesh for this machine, and with a supported attention kernel.

    The machine and the shapes of rows may differ from those of training.
    """
    tree = to_dict(config)
    mesh, compute = tree["mesh"], tree["compute"]
    mesh["data"], mesh["model"] = nearest_sizes(
        mesh["data"], mesh["model"], count=jax.device_count()
    )
    if compute["attention"] != "reference":
        compute["attention"] = "auto"
    return from_dict(tree)


def trained_delta(folder: epath.PathLike, trial: ForwardPass, *, any_weights: bool = False) -> Any:
    """Loads a trial's selected delta to the devices.

    Raises:
        UserError: the delta was trained on other weights (unless `any_weights`), or does not have
            the leaves and shapes of its method and model.
    """
    file, remedy = epath.Path(folder) / DELTA, ANY_WEIGHTS
    delta = read_delta(file, trial.config, trial.loaded, any_weights=any_weights, remedy=remedy)
    return jax.tree.map(put, delta, delta_shardings(trial, delta))


def warn_other_data(folder: epath.PathLike, prepared: Prepared, split: str) -> None:
    """Prints a warning if a split has changed since the trial ran."""
    origin = load_delta(epath.Path(folder) / DELTA)[1]
    names = ",".join(one.task.name for one in prepared.tasks)
    then = origin.get("data", {}) if origin.get("task") == names else {}
    now = {name: one for name, one in prepared.data.digests.items() if name.endswith(split)}
    try:
        check_digests(now, then, made=os.fspath(folder))
    except UserError as error:
        prepared.session.progress.say(f"warning: {error}")


class Predictor:
    """Answers texts with a finished trial.

    Args:
        folder: of the trial.
        progress: the display.
        task: a task of the trial, or another one; required if the trial has several.
        any_weights: also accept a delta that was trained on other weights than the model's.
        session: has loaded models; by default a new one.

    Raises:
        UserError: the trial has several tasks and none is given; see also `trained_delta`.
    """

    def __init__(
        self,
        folder: epath.PathLike,
        progress: Progress,
        *,
        task: str | None = None,
        any_weights: bool = False,
        session: Session | None = None,
    ) -> None:
        config, known = for_task(on_this_machine(read_config(folder)), task)
        if task is None and len(known) > 1:
            raise UserError(f"--task is not given; allowed: {', '.join(known)}, the trial's tasks")
        check_trained(folder)
        session = session or Session(progress)
        train = None
        if method_settings(config).shows_examples:
            bos = text_bos(config, session.model(config))
            train = session.data(config, bos=bos).train
        self.trial = prepare_forward(config, session, train=train)
        self.delta = trained_delta(folder, self.trial, any_weights=any_weights)
        self.number = known.index(task or known[0])
        self.config = task_configs(config)[self.number]
        self.task = get_task(self.config.task)
        self._openings: dict[tuple[int, ...], tuple[ForwardPass, Any]] = {}

    def predict(self, lines: Sequence[str], *, first: int = 1) -> Iterator[dict[str, Any]]:
        """Answers lines in a batch; `first` is the number of the first line, for errors.

        A line has the task's text field, or its text fields separated by tabs.

        Yields:
            {"text", "label", "probabilities": {label: share}} for each line; {"text", "answer"}
            for a free-text task.

        Raises:
            UserError: a line has another number of fields.
        """
        records = [self._record(number, line) for number, line in enumerate(lines, first)]
        encoded = encode_records(
            self.config, self.trial.loaded, self.task, records, bos=self.trial.bos
        )
        opening = self._opening(encoded)
        encoded = with_number(self.number, encoded).without_opening(len(opening))
        trial, shared = self._with_opening(opening)
        if not self.task.verbalizers:
            evaluator = generation(self.config.eval.beams, max_new=self.config.task.max_target)
            part = Split(self.task, encoded, lambda: [])
            result = evaluator(trial.evaluator_inputs, shared, part, lambda done, total: None)
            for line, prediction in zip(lines, result.predictions, strict=True):
                yield {"text": line, "answer": prediction["predicted"]}
            return
        rows = 8 if len(lines) > 1 else 1
        multiple, layout = trial.mesh.shape["data"], trial.layout
        shape = coarse_shape(encoded, rows=-(-rows // multiple) * multiple, layout=layout)
        batches = eval_batches(encoded, shape, layout=layout)
        model, weights = trial.step.model, trial.frozen
        found = score_batches(model, weights, shared, batches, mesh=trial.mesh)
        shares_NC = probabilities(normalise(*found, self.config.eval.score))
        labels = list(self.task.verbalizers)
        for line, share_C in zip(lines, shares_NC, strict=True):
            shares = dict(zip(labels, np.round(share_C, 6).tolist(), strict=True))
            yield {"text": line, "label": labels[int(share_C.argmax())], "probabilities": shares}

    def generate(
        self, texts: Sequence[str], *, max_new: int, sampling: Sampling = GREEDY, seed: int = 0
    ) -> list[str]:
        """Continues texts with the delta, without the task's template.

        Args:
            texts: any.
            max_new: largest number of tokens of a continuation.
            sampling: how tokens are chosen; by default the most likely.
            seed: of the sampling.
        """
        loaded, start = self.trial.loaded, list[int]()
        if self.trial.bos and loaded.tokenizer.bos_id is not None:
            start = [loaded.tokenizer.bos_id]
        ids = generate(
            self.trial.step.model,
            self.trial.frozen,
            self._with_opening(())[1],
            [[*start, *loaded.tokenizer.encode(text)] for text in texts],
            max_new=max_new,
            eos_id=loaded.tokenizer.eos_id,
            sampling=sampling,
            seed=seed,
            mesh=self.trial.mesh,
            which=[self.number] * len(texts) if self.trial.layout.prompts else None,
        )
        return [loaded.tokenizer.decode(one) for one in ids]

    def _opening(self, encoded: Encoded) -> tuple[int, ...]:
        """The tokens of the template's first words that all inputs begin with.

        A longer beginning that these lines share by chance stays in the rows, since each opening
        compiles another program.
        """
        loaded = self.trial.loaded
        if loaded.encoder_decoder:
            return ()
        start = [loaded.tokenizer.bos_id] if self.trial.bos else []
        words = loaded.tokenizer.encode(parse_template(self.task.template)[0][0])
        return long_opening([np.array([*start, *words, -1]), *encoded.inputs])

    def _with_opening(self, opening: tuple[int, ...]) -> tuple[ForwardPass, Any]:
        """The forward pass for texts with this opening, and its variables and context."""
        if opening not in self._openings:
            trial = self.trial.with_opening(opening)
            self._openings[opening] = trial, trial.shared(self.delta)
        return self._openings[opening]

    def _record(self, number: int, line: str) -> dict[str, str | None]:
        """The record of a line."""
        fields = self.task.fields
        texts = [line] if len(fields) == 1 else line.split("\t") if line else []
        if len(texts) != len(fields):
            raise UserError(
                f"line {number} has {len(texts)} tab-separated fields; "
                f"the task takes {len(fields)}: {', '.join(fields) or 'an empty line'}"
            )
        texts = [self.task.clean(text) for text in texts] if self.task.clean else texts
        return {"id": f"line {number}", "label": None, **dict(zip(fields, texts, strict=True))}


def predict_lines(
    folder: epath.PathLike,
    lines: Iterable[str],
    progress: Progress,
    *,
    task: str | None = None,
    batch_size: int = LINES,
    any_weights: bool = False,
) -> Iterator[dict[str, Any]]:
    """Answers lines of text with a finished trial; see `Predictor`.

    Args:
        folder: of the trial.
        lines: texts, without line ends.
        progress: the display.
        task: as for `Predictor`.
        batch_size: lines in a batch; with 1 each line is answered at once.
        any_weights: as for `Predictor`.

    Yields:
        The results of `Predictor.predict` for each line, in order.
    """
    predictor = Predictor(folder, progress, task=task, any_weights=any_weights)
    source, first = iter(lines), 1
    while batch := list(itertools.islice(source, batch_size)):
        yield from predictor.predict(batch, first=first)
        first += len(batch)
