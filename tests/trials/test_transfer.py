"""Domain shift: a trial's delta on the test splits of other tasks."""

import dataclasses

import numpy as np
import pytest

from softprompt.config import from_dict, resolve, to_dict, trial_id
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.errors import UserError
from softprompt.methods.delta_file import load_delta
from softprompt.trials.estimate import estimate
from softprompt.trials.evaluate import evaluate_trials
from softprompt.trials.measure import read_predictions
from softprompt.trials.records import collect, example_scores
from softprompt.trials.run import DELTA, run_trial
from softprompt.trials.session import Session
from tests.matrix import matrix
from tests.own_task import Lines, make_config, write_task


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a task; "elsewhere" and "longer" are built-in tasks with other texts."""
    folders = {name: tmp_path / name for name in ("mine", "elsewhere", "longer")}
    for n, (name, folder) in enumerate(folders.items()):
        folder.mkdir()
        write_task(folder, {"train": 20, "validation": 8, "test": 6 + 4 * n})
        if n:
            task = get_task(make_config(folder, "model").task)
            monkeypatch.setitem(TASKS, name, dataclasses.replace(task, name=name))
    return folders["mine"]


@pytest.mark.parametrize("method", matrix(["prompt", "full", "fewshot"], keep=["full"]))
def test_it_is_what_evaluation_finds(place, tiny_folder, tmp_path, method):
    """Breaks when the base model is tested, or on another split, or a task is trained on."""
    changes = {"method__name": method, "eval__transfer": "elsewhere, longer"}
    if method == "fewshot":
        changes["method__shots"] = 2
    config = resolve(make_config(place, tiny_folder, **changes))
    session = Session(Lines())
    row = run_trial(config, tmp_path / "run", session=session)
    found = row["metrics"]["transfer"]
    assert [found[name]["examples"] for name in ("elsewhere", "longer")] == [10, 14]
    for name, metrics in found.items():
        (again,) = evaluate_trials([tmp_path / "run"], task=name, progress=Lines())
        assert metrics["accuracy"] == again["accuracy"]
        assert metrics["macro_f1"] == again["macro_f1"]
    tasks = [line.get("task") for line in read_predictions(tmp_path / "run")]
    assert tasks == [None] * 6 + ["elsewhere"] * 10 + ["longer"] * 14
    (record,) = collect(tmp_path / "run")
    majority, accuracy = record["answers"]["longer"]["majority"], found["longer"]["accuracy"]
    score = (accuracy - majority) / (1 - majority)
    assert example_scores([record], "longer").mean() == pytest.approx(score)


def test_it_changes_no_training(place, tiny_folder, tmp_path):
    """Breaks when the other task's data moves the order, or its work is not estimated."""
    plain, other = (
        resolve(make_config(place, tiny_folder, eval__transfer=names)) for names in ("", "longer")
    )
    assert trial_id(plain) != trial_id(other)
    session = Session(Lines())
    for name, config in (("plain", plain), ("other", other)):
        run_trial(config, tmp_path / name, session=session)
    one, again = (load_delta(tmp_path / name / DELTA)[0] for name in ("plain", "other"))
    np.testing.assert_array_equal(one["prompt"], again["prompt"])
    costs = [estimate(config, session)["flops"] for config in (plain, other)]
    assert costs[1] > 1.05 * costs[0]


@pytest.mark.parametrize(
    ("task", "names", "message"),
    [
        ("mine", "longest", "names 'longest' (did you mean 'longer'"),
        ("mine", "longer,longer", "names 'longer'"),
        ("longer", "longer", "names 'longer'"),
    ],
)
def test_mistakes(place, tiny_folder, task, names, message):
    """Breaks when a task is tested twice, or a name is only looked up after training."""
    tree = to_dict(make_config(place, tiny_folder))
    tree["task"] = {"name": task} if task in TASKS else tree["task"]
    tree["eval"]["transfer"] = names
    with pytest.raises(UserError) as error:
        from_dict(tree)
    assert f"config key 'eval.transfer' {message}" in str(error.value)
