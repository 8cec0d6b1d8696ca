"""Two commands on one trial: the second one says who trains it, and changes nothing."""

import json
import os

import pytest

from softprompt import cli
from softprompt.config import trial_id
from softprompt.trials.engine.claims import QUEUE, View
from softprompt.trials.engine.sharing import sweep_claims
from softprompt.trials.engine.store import open_store
from softprompt.trials.lock import locked_folder
from softprompt.trials.outputs import SWEEP_FILE
from tests.own_task import make_config, words, write_task


@pytest.fixture
def task(tmp_path):
    """The folder of the task's files."""
    (tmp_path / "task").mkdir()
    return write_task(tmp_path / "task")


def refused(task, model, folder, capsys):
    """What `softprompt train` says of a trial that is trained already."""
    before = sorted(folder.rglob("*"))
    assert cli.main(["train", "--workdir", str(folder), *words(task, model)]) == 2
    assert sorted(folder.rglob("*")) == before
    return capsys.readouterr().err


def test_a_folder_is_trained_by_one_process(task, tiny_folder, tmp_path, capsys):
    """Mutation: the lock is not taken, and the second one truncates the first one's log."""
    with locked_folder(tmp_path / "w"):
        said = refused(task, tiny_folder, tmp_path / "w", capsys)
    assert f"{tmp_path / 'w'} is being trained by process {os.getpid()} on " in said


def test_a_trial_of_a_sweep_is_trained_by_one_process(task, tiny_folder, tmp_path, capsys):
    """Of a sweep that workers on other hosts share, whose locks this host may not see. Mutation:
    `train` takes no claim."""
    (tmp_path / "sweep" / "w").mkdir(parents=True)
    (tmp_path / "sweep" / SWEEP_FILE).write_text(json.dumps({"experiment": "some"}))
    trial = trial_id(make_config(task, tiny_folder))
    with (
        sweep_claims(tmp_path / "sweep") as claims,
        claims.claimed(trial, tmp_path / "sweep" / "w"),
    ):
        said = refused(task, tiny_folder, tmp_path / "sweep" / "w", capsys)
    assert f"trial {trial} is run by another process" in said


def test_a_trial_that_ended_meanwhile_stays_done(tmp_path):
    """Of two terminals the slower one comes to a trial that the other has ended. Mutation: the mark
    of its end is deleted, as if its row were not there."""
    folder = tmp_path / "w"
    for _ in range(2):
        with sweep_claims(tmp_path) as claims, claims.claimed("some", folder):
            folder.mkdir(exist_ok=True)
            row = {"trial": "some", "status": "done", "config": {}}
            (folder / "result.json").write_text(json.dumps(row))
        view = View(open_store(tmp_path).list(QUEUE))
        assert (set(view.done), view.attempts["some"]) == ({"some"}, 1)
