"""What a sweep saves: that its three forms are the same trials, and how their times are told."""

import json

import pytest

from experiments import sweep_speed
from softprompt.cli import split_overrides
from softprompt.config import resolve, trial_id
from softprompt.config.files import load_config
from softprompt.trials.experiment import make_trials


def test_the_forms_are_the_same_trials(tmp_path):
    """Mutation: a process is told another length of training, or not its initialiser."""
    more = ["--config.train.steps=7"]
    trials = make_trials(sweep_speed, "full", [("train.steps", "7")])
    cold = []
    for line in sweep_speed.commands("cold", tmp_path, more):
        words, overrides = split_overrides(line[3:])
        assert words[:2] == ["train", "--workdir"]
        cold.append(resolve(load_config(None, overrides)))
    assert [trial_id(config) for config in cold] == [trial_id(config) for config in trials]
    assert len({trial_id(config) for config in trials}) == 12
    for form, places in (("warm", 1), ("together", 0)):
        ((*_, population, last),) = sweep_speed.commands(form, tmp_path, more)
        assert (population, last) == (f"--config.compute.population={places}", *more)


def row(config, accuracy, **facts):
    plain = json.loads(config.to_json())
    metrics = {"test": {"accuracy": accuracy}}
    return {"config": plain, "metrics": metrics, "status": "done", **facts}


def test_the_summary(tmp_path):
    """Mutations: a ratio upside down; accuracies are compared by place instead of by trial; all
    trials compiled."""
    trials = sweep_speed.sweep()
    rows = [row(config, 0.5 + 0.01 * n) for n, config in enumerate(trials)]
    off = []
    for n, config in enumerate(trials):
        facts = {"compile_seconds": 2.0 if n % 4 == 0 else 0.0, "members": 4 if n < 8 else 1}
        off.append(row(config, 0.5 + 0.01 * n + (0.02 if n == 3 else 0), **facts))
    told = sweep_speed.summary({"cold": 30.0, "warm": 20.0}, {"cold": rows, "warm": off[::-1]})
    assert list(told["cold over it"]) == [1.0, 1.5]
    assert list(told["warm over it"]) == [pytest.approx(2 / 3), 1.0]
    assert list(told["accuracy off by"]) == [0.0, pytest.approx(0.02)]
    assert list(told["compiled"]) == [0, 3]
    assert list(told["members"]) == ["1", "1, 4"]
    table = sweep_speed.table(rows[::-1])
    assert list(table["P"]) == [5] * 4 + [20] * 4 + [100] * 4
    assert sweep_speed.figure(rows)


def test_what_was_measured_is_kept(tmp_path, monkeypatch):
    """Mutation: it is measured again; what an interruption left is counted as done; so is what
    other overrides left, or its time, or another commit; changed files are told from none."""
    ran, code = [], ["a"]
    monkeypatch.setattr(sweep_speed, "commit", lambda: code[-1])
    monkeypatch.setattr(sweep_speed.subprocess, "run", lambda line, **_: ran.append(line))
    folder = tmp_path / "warm"
    folder.mkdir()
    (folder / "left").touch()
    first = sweep_speed.measure("warm", folder, [])
    assert sweep_speed.measure("warm", folder, []) == first
    assert len(ran) == 1 and not (folder / "left").exists()
    (folder / "left").touch()
    more = ["--config.train.steps=60"]
    sweep_speed.measure("warm", folder, more)
    assert ran[1][-1] == more[0] and not (folder / "left").exists()
    sweep_speed.measure("warm", folder, more)
    assert len(ran) == 2
    for there, runs in (("b", 3), ("b", 3), ("b-dirty", 4), ("b-dirty", 5)):
        code.append(there)
        sweep_speed.measure("warm", folder, more)
        assert len(ran) == runs
