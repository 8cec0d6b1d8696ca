"""The Python API: what a notebook does, on a tiny model."""

import gc
import json
import subprocess
import sys
import weakref

import numpy as np
import pytest

import softprompt as sp
from softprompt.config import resolve, to_dict
from softprompt.errors import UserError
from softprompt.results import read_result
from tests.own_task import Lines, settings, write_task


@pytest.fixture(scope="module")
def keys(tiny_folder, tmp_path_factory):
    return settings(write_task(tmp_path_factory.mktemp("task")), tiny_folder, eval__every=4)


@pytest.fixture(scope="module")
def trial(keys, tmp_path_factory):
    return sp.train(keys, tmp_path_factory.mktemp("api") / "one", method__length=4)


def test_the_import_brings_no_jax():
    """Breaks when a name is imported with the package. Every name is there, and no other."""
    code = (
        "import softprompt, sys\n"
        "print('jax' in sys.modules, {*softprompt.__all__} <= {*dir(softprompt)})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]
    assert all(callable(getattr(sp, name)) for name in sp.__all__)
    with pytest.raises(AttributeError, match="no attribute 'trains'"):
        _ = sp.trains


def test_a_config_from_keys_a_file_and_overrides(keys):
    """Breaks when overrides change the config that they are given, or are not checked."""
    first = sp.make_config(keys, method__length=7)
    second = sp.make_config(first, train__steps=3)
    assert (second.method.length, second.train.steps, first.train.steps) == (7, 3, 8)
    assert sp.make_config("configs/base.py", seed=2).seed == 2
    with pytest.raises(UserError, match="unknown config key 'method.lenght'"):
        sp.make_config(method__lenght=3)


def test_a_trial_is_looked_at_and_used(trial):
    """Breaks when a part of the folder is not what the row says of it."""
    assert trial.config.method.length == 4
    assert trial.metrics["test"] == trial.row["metrics"]["test"]
    assert trial.delta["prompt"].shape[0] == 4
    log = trial.log()
    assert set(log["step"]) == set(range(9))
    assert log["validation/accuracy"].notna().sum() == 3
    told = trial.predictions()
    assert np.mean(told["label"] == told["predicted"]) == trial.metrics["test"]["accuracy"]
    assert trial.evaluate()["accuracy"] == trial.metrics["test"]["accuracy"]
    answers = trial.predict(["a warm film", "a thin plot"])
    assert [answer["text"] for answer in answers] == ["a warm film", "a thin plot"]
    assert len(trial.generate(["Review: a warm"], max_new=3)) == 1
    again = sp.train(trial.config, trial.folder)
    assert again.row == trial.row == read_result(trial.folder)
    with pytest.raises(UserError, match="not a trial's folder"):
        sp.load_trial(trial.folder / "none")


@pytest.mark.matrix
def test_a_sweep_and_its_plots(keys, trial, tmp_path):
    """Breaks when rows of unequal lengths are one point, or a trial is trained twice."""
    configs = [sp.make_config(keys, method__length=n, seed=s) for n in (1, 4) for s in (0, 1)]
    frame = sp.sweep(configs, tmp_path)
    assert sorted(frame["config.method.length"]) == [1, 1, 4, 4]
    stamps = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    assert sp.sweep(configs, tmp_path).equals(sp.rows(tmp_path))
    assert stamps == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("result.json")}
    (tmp_path / "older").mkdir()
    older = {"trial": "1", "status": "done", "config": {}}  # without metrics: is left out
    (tmp_path / "older" / "result.json").write_text(json.dumps(older))
    axes = sp.plot_lengths(tmp_path).axes[0]
    assert axes.get_xlabel() == "Prompt length"
    with pytest.raises(UserError, match="the metric 'f1'"):
        sp.plot_lengths(tmp_path, metric="f1")
    lines = sp.plot_learning(trial, value="loss").axes[0].lines
    assert len(lines[0].get_xdata()) == 8
    with pytest.raises(UserError, match="are the same"):
        sp.sweep([configs[0], configs[0]], tmp_path)


def test_lines_of_lengths(tmp_path):
    """Breaks when a method without a length is drawn, or trials of two models are one point."""

    def write(name, accuracy, **changes):
        config = to_dict(resolve(sp.make_config(changes)))
        metrics = {"test": {"accuracy": accuracy, "examples": 100}}
        row = {"trial": name, "name": name, "status": "done", "config": config, "metrics": metrics}
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(row))

    write("none", 0.5, **{"method.name": "none"})
    write("lora", 0.5, **{"method.name": "lora"})
    for length in (1, 5):
        write(f"prompt{length}", 0.6, **{"method.length": length})
    (line,) = labels(sp.plot_lengths(tmp_path))
    assert line == "prompt, vocabulary"
    for length in (1, 5):
        other = {"model.name": "EleutherAI/pythia-14m", "method.length": length}
        write(f"other{length}", 0.9, **other)
    assert [line.split(", ")[2:] for line in labels(sp.plot_lengths(tmp_path))] == [
        [f"model.name={name}"] for name in ("smollm2-135m-instruct-q4", "EleutherAI/pythia-14m")
    ]


def labels(figure):
    """The names of a figure's lines."""
    return [text.get_text() for text in figure.axes[0].texts]


def test_a_trial_that_fails_leaves_a_row(keys, tmp_path, monkeypatch):
    """Breaks when a notebook's failed trial is not in the folder's rows, as a command's is."""
    with pytest.raises(UserError, match="not finite"):
        sp.train(keys, tmp_path / "nan", optimizer__rate=1e30, optimizer__name="sgd")
    assert read_result(tmp_path / "nan")["status"] == "failed"


def test_a_model_is_freed_with_its_trial(trial):
    """Breaks when a cache outside of the trial keeps its model."""
    other = sp.load_trial(trial.folder)
    other.predict(["a warm film"])
    left = weakref.ref(other)
    del other
    gc.collect()
    assert left() is None


def test_trials_share_a_session(keys, tmp_path):
    """Breaks when a session that is given is not used."""
    from softprompt.trials.session import Session

    shared = Session(Lines())
    for seed in range(2):
        sp.train(keys, tmp_path / str(seed), session=shared, seed=seed, train__steps=2)
    assert len(shared.compiled) == 1
