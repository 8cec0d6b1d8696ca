"""The Python API: what a notebook or a script needs, as `import softprompt as sp`.

The command line is a thin layer over the same functions.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import matplotlib
import pandas as pd
from etils import epath
from matplotlib.figure import Figure

from softprompt.analysis.plots import STYLE, Point, length_plot
from softprompt.analysis.tables import IGNORED, by_differences, summarise
from softprompt.config import (
    ConfigDict,
    base_config,
    flatten,
    from_dict,
    has_effect,
    resolve,
    set_key,
    validate,
)
from softprompt.config.files import load_config
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.methods.delta_file import load_delta
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.results import Row, read_result, read_rows, to_frame
from softprompt.training.logs import read_log
from softprompt.trials.evaluate import Predictor, evaluate_trials
from softprompt.trials.experiment import check_trials_differ, load_experiment, make_trials
from softprompt.trials.measure import read_predictions
from softprompt.trials.run import DELTA, read_config
from softprompt.trials.session import Session
from softprompt.trials.sweep import run_one, run_trials

Source: TypeAlias = str | ConfigDict | Mapping[str, Any]

__all__ = [
    "Loaded",
    "Trial",
    "load_model",
    "load_trial",
    "make_config",
    "plot_learning",
    "plot_lengths",
    "rows",
    "sweep",
    "train",
]


def make_config(source: Source = "", /, **overrides: Any) -> ConfigDict:
    """Returns a valid config.

    Args:
        source: a config file ("configs/x.py" or "configs/x.py:arg"), a config, or a mapping of
            keys, as in {"method.length": 5}; "" takes the defaults.
        **overrides: keys with two underscores for the dot, as in `method__length=5`.

    Raises:
        UserError: the file cannot be read, or a key or value is wrong.

    Example:
        cfg = sp.make_config("configs/quickstart.py", method__length=5, train__steps=20)
    """
    if isinstance(source, str):
        made = load_config(source)
    elif isinstance(source, ConfigDict):
        made = source.copy_and_resolve_references().lock()
    else:
        made = base_config()
        for key, value in source.items():
            set_key(made, key, value)
    for key, value in overrides.items():
        set_key(made, key.replace("__", "."), value)
    validate(made)
    return made


def train(
    source: Source, workdir: epath.PathLike, *, session: Session | None = None, **overrides: Any
) -> "Trial":
    """Trains and tests one trial; the same call resumes it, or returns the finished one.

    Args:
        source: as for `make_config`.
        workdir: the trial's folder.
        session: of several trials that share what they load and compile.
        **overrides: as for `make_config`.

    Raises:
        UserError: anything that the user can mend.

    Example:
        trial = sp.train("configs/quickstart.py", "runs/one", method__length=5)
        print(trial.metrics["test"]["accuracy"])
    """
    resolved = resolve(make_config(source, **overrides))
    if session is not None:
        run_one(resolved, workdir, session)
    else:
        with Progress() as progress:
            run_one(resolved, workdir, Session(progress))
    return load_trial(workdir)


@dataclasses.dataclass(frozen=True)
class Trial:
    """A trial's folder.

    Example:
        trial = sp.load_trial("runs/one")
        trial.log().plot(x="step", y="loss")
    """

    folder: epath.Path

    @functools.cached_property
    def config(self) -> ConfigDict:
        """The resolved config."""
        return read_config(self.folder)

    @property
    def row(self) -> Row:
        """The result row, {} while the trial is not finished."""
        return read_result(self.folder) or {}

    @property
    def metrics(self) -> dict[str, Any]:
        """The row's metrics: "validation", "test", "selected_step" and others."""
        return dict(self.row.get("metrics", {}))

    @property
    def delta(self) -> dict[str, Any]:
        """The selected delta, a tree of arrays."""
        return load_delta(self.folder / DELTA)[0]

    def log(self) -> pd.DataFrame:
        """The log: one row per logged step and per validation."""
        return pd.DataFrame(read_log(self.folder))

    def predictions(self) -> pd.DataFrame:
        """The predictions on the test split, one row per example."""
        return pd.json_normalize(list(read_predictions(self.folder)))

    def evaluate(self, task: str | None = None, split: str = "test") -> dict[str, Any]:
        """Measures the delta on a split, of its own task or of another.

        Example:
            trial.evaluate(task="amazon_sentiment")["accuracy"]
        """
        with Progress() as progress:
            return evaluate_trials([self.folder], task=task, split=split, progress=progress)[0]

    def predict(self, texts: Sequence[str], task: str | None = None) -> list[dict[str, Any]]:
        """Labels texts, or answers them where the task's answers are free text.

        Args:
            texts: the task's field; several fields are separated by tabs.
            task: one of the trial's, where it has several, or another.

        Example:
            trial.predict(["a quiet, moving film"])[0]["label"]
        """
        return list(self._predictor(task).predict(texts))

    def generate(self, texts: Sequence[str], max_new: int = 32) -> list[str]:
        """Continues texts greedily with the delta, without the task's template.

        Args:
            texts: any.
            max_new: largest number of tokens of a continuation.

        Example:
            trial.generate(["Once upon a time"], max_new=16)
        """
        return self._predictor(None).generate(texts, max_new=max_new)

    @functools.cached_property
    def _predictors(self) -> dict[str | None, Predictor]:
        """By task; their models stay in memory as long as the trial."""
        return {}

    def _predictor(self, task: str | None) -> Predictor:
        if task not in self._predictors:
            with Progress() as progress:
                self._predictors[task] = Predictor(self.folder, progress, task=task)
        return self._predictors[task]


def load_trial(folder: epath.PathLike) -> Trial:
    """Returns the trial of a folder, finished or not.

    Raises:
        UserError: there is no trial in it.

    Example:
        sp.load_trial("runs/one").metrics["test"]["accuracy"]
    """
    trial = Trial(epath.Path(folder))
    _ = trial.config
    return trial


def sweep(
    trials: str | Sequence[ConfigDict], workdir: epath.PathLike, subset: str = "full"
) -> pd.DataFrame:
    """Runs the trials that are not done and returns the rows of all.

    Args:
        trials: the name of an experiment, or configs that differ.
        workdir: where the trials' folders are.
        subset: of an experiment.

    Raises:
        UserError: an unknown experiment or subset, or two configs that are the same trial.

    Example:
        configs = [sp.make_config("configs/quickstart.py", method__length=n) for n in (1, 5)]
        frame = sp.sweep(configs, "runs/lengths")
    """
    if isinstance(trials, str):
        made = make_trials(load_experiment(trials), subset)
    else:
        made = [resolve(make_config(one)) for one in trials]
        check_trials_differ(made)
    with Progress() as progress:
        failed = run_trials(made, workdir, Session(progress))
    for row in failed:
        warnings.warn(f"trial {row['name']} failed: {row['error']}", stacklevel=2)
    return rows(workdir)


def rows(folder: epath.PathLike) -> pd.DataFrame:
    """Returns the rows of all trials in or below a folder, with one column per value.

    Raises:
        UserError: the folder does not exist.

    Example:
        sp.rows("runs")[["config.method.length", "metrics.test.accuracy"]]
    """
    return to_frame(read_rows(folder))


def plot_lengths(folder: epath.PathLike, metric: str = "accuracy") -> Figure:
    """Draws test scores against prompt length.

    Trials that differ in more than length and seed are lines of their own.

    Args:
        folder: the trials in and below it are drawn.
        metric: of the test split.

    Raises:
        UserError: none of them has a prompt and the metric.

    Example:
        sp.plot_lengths("runs/lengths").savefig("lengths.png")
    """
    found = [
        row
        for row in read_rows(folder)
        if row["metrics"].get("test", {}).get(metric) is not None and _has_length(row)
    ]
    if not found:
        raise UserError(f"{folder}: no finished trial has a prompt and the metric {metric!r}")
    kinds: dict[str, list[Row]] = {}
    for row in found:
        method = row["config"]["method"]
        kinds.setdefault(f"{method['name']}, {method['init']}", []).append(row)
    lines = {
        f"{kind}, {also}" if also else kind: _points(some, metric)
        for kind, rows in kinds.items()
        for also, some in by_differences(rows, ignored={*IGNORED, "method.length"}).items()
    }
    label = metric.replace("_", " ")
    return length_plot(lines, {}, xlabel="Prompt length", ylabel=f"Test {label}")


def _has_length(row: Row) -> bool:
    return has_effect(flatten(from_dict(row["config"])), "method.length")


def _points(rows: Sequence[Row], metric: str) -> list[Point]:
    """A point for each length of trials that otherwise differ in their seed."""
    lengths: dict[int, list[Row]] = {}
    for row in rows:
        lengths.setdefault(row["config"]["method"]["length"], []).append(row)
    return [_point(length, some, metric) for length, some in sorted(lengths.items())]


def _point(length: int, some: Sequence[Row], metric: str) -> Point:
    """The trials of one length, which differ in their seed."""
    table = summarise(some, {"length": lambda row: length}, metric=metric)
    values = tuple(row["metrics"]["test"][metric] for row in some)
    line = table.iloc[0]
    mean = sum(values) / len(values)
    low, high = (mean if line[end] is None else line[end] for end in ("low", "high"))
    return Point(length, mean, low, high, values)


def plot_learning(*trials: Trial, value: str = "loss") -> Figure:
    """Draws a logged value against the steps, one line per trial.

    Args:
        trials: to compare.
        value: a name in `Trial.log`, such as "loss" or "validation/accuracy".

    Raises:
        UserError: a trial has not logged it.

    Example:
        sp.plot_learning(sp.load_trial("runs/one"), value="validation/accuracy")
    """
    logs = {trial.folder.name: trial.log() for trial in trials}
    for name, log in logs.items():
        if value not in log:
            raise UserError(f"{name} has not logged {value!r}; it has: {', '.join(map(str, log))}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.5))
        axes = figure.subplots()
        for name, log in logs.items():
            line = log.dropna(subset=[value])
            axes.plot(line["step"], line[value], label=name)
        axes.set_xlabel("Step")
        axes.set_ylabel(value)
        axes.legend(frameon=False)
    return figure
