"""Prompts that start from another trial's: the order of a sweep, and what is read."""

import json

import numpy as np
import pytest

from softprompt.config import set_key, trial_id
from softprompt.errors import UserError
from softprompt.methods.delta_file import DELTA, load_delta
from softprompt.results import folders_by_id
from softprompt.trials.estimate import estimate
from softprompt.trials.lock import Locked
from softprompt.trials.run import CONFIG, run_trial
from softprompt.trials.session import Session
from softprompt.trials.shards import take_shard
from softprompt.trials.starts import stages
from softprompt.trials.sweep import run_trials, trial_folder
from tests.own_task import Lines, make_config, write_task
from tests.trials.rows import Runner, config, run


def started(first, *, length):
    """A trial that starts from another one's prompt."""
    made = config(length)
    for key, value in {"init": "file", "init_file": f"trial:{trial_id(first)}"}.items():
        set_key(made, f"method.{key}", value)
    return made


def test_a_trial_comes_after_the_one_that_it_starts_from(tmp_path):
    """Mutations: the order is that of the list; a trial shares a stage with its start; a start that
    is no part of the sweep moves a trial."""
    first, other = config(20), config(7)
    second = started(first, length=5)
    third = started(second, length=1)
    trials = [third, other, second, first, started(config(9), length=3)]
    assert stages(trials) == [[3], [2], [0, 1, 4]]
    assert stages([config(1), config(5)]) == [[0, 1]]
    runner = Runner()
    run(trials, tmp_path, runner)
    assert runner.ran == [20, 5, 1, 7, 3]


def test_a_trial_is_in_the_shard_of_the_one_that_it_starts_from():
    """Mutation: a shard is every n-th trial, whatever it starts from."""
    first, other = config(20), config(7)
    second = started(first, length=5)
    third = started(second, length=1)
    shards = [take_shard([third, other, second, first], (part, 2)) for part in (1, 2)]
    assert shards == [[], [third, other, second, first]]


def test_a_trial_is_left_to_the_process_that_trains_its_start(tmp_path):
    """Mutation: it is run here, and fails since its start is not done."""
    first, other = config(20), config(7)
    second = started(first, length=5)
    runner = Runner({20: Locked("another process runs it")})
    assert run([second, first, other], tmp_path, runner) == []
    assert runner.ran == [20, 7]


def test_a_sweep_starts_a_prompt_from_another_trials(tmp_path, tiny_folder):
    """Mutations: another trial's prompt is read; the path becomes a part of the config; a trial
    that has not run, or an id that is none's, is no error; an estimate needs the other trial."""
    place = write_task(tmp_path)
    keys = {"method__length": 3, "train__steps": 0}
    first, same = (make_config(place, tiny_folder, seed=seed, **keys) for seed in (0, 1))
    start = {"method__init": "file", "method__init_file": f"trial:{trial_id(first)}"}
    second = make_config(place, tiny_folder, seed=2, **keys, **start)
    workdir, session = tmp_path / "runs", Session(Lines())
    assert estimate(second, session)["trainable"] > 0
    with pytest.raises(UserError, match=f"'trial:{trial_id(first)}'; allowed: .* finished"):
        run_trial(second, trial_folder(workdir, second), session=session)
    assert trial_id(second) not in folders_by_id(workdir)
    assert run_trials([second, same, first], workdir, session) == []
    prompts = [
        load_delta(trial_folder(workdir, one) / DELTA)[0]["prompt"] for one in (first, same, second)
    ]
    np.testing.assert_array_equal(prompts[2], prompts[0])
    assert not np.array_equal(prompts[2], prompts[1])
    kept = json.loads((trial_folder(workdir, second) / CONFIG).read_text())
    assert kept["method"]["init_file"] == start["method__init_file"]
