"""Whole trials of unusual forms: no vectors, networks around a prompt, rows that are padded, and
weights that were replaced between two processes."""

import shutil

import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.methods.delta_file import load_delta
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session
from tests.own_task import Lines, make_config, write_task
from tests.tiny import write_llama_folder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_a_prompt_of_no_vectors_is_the_plain_model(place, tiny_folder, tmp_path, method):
    """Mutation: what has no entries goes to orbax, which fails after the training."""
    keys = {"method__name": method, "log__checkpoint_every": 2}
    keys |= {"method__init": "noise"} if method == "prefix" else {}
    config = make_config(place, tiny_folder, method__length=0, **keys)
    session = Session(Lines())
    row = run_trial(config, tmp_path / "w", session=session)
    assert (row["status"], row["trainable"]) == ("done", 0)
    plain = make_config(place, tiny_folder, method__name="none")
    wanted = run_trial(plain, tmp_path / "plain", session=session)
    assert row["metrics"]["test"] == wanted["metrics"]["test"]
    shutil.rmtree(tmp_path / "w" / "checkpoints" / str(row["steps"]))
    (tmp_path / "w" / "result.json").unlink()
    again = run_trial(config, tmp_path / "w", session=session)  # from the checkpoint before
    assert any("resumes from step" in line for line in session.progress.said)
    assert again["metrics"] == row["metrics"]


@pytest.mark.matrix
def test_a_snapshot_is_what_the_delta_of_that_step_would_be(place, tiny_folder, tmp_path):
    """Mutation: its rows are saved without the network that they run through."""
    keys = {"method__reparam": "mlp", "eval__select": "last", "log__snapshots": 4}
    config = make_config(place, tiny_folder, train__steps=4, optimizer__rate=0.05, **keys)
    run_trial(config, tmp_path, session=Session(Lines()))
    saved, _ = load_delta(tmp_path / "delta.safetensors")
    found, _ = load_delta(tmp_path / "snapshots" / "4.safetensors")
    assert found.keys() == saved.keys() == {"prompt"}
    np.testing.assert_array_equal(found["prompt"], saved["prompt"])


def test_empty_rows_are_said(place, tiny_folder, tmp_path):
    """Mutation: four microbatches of one row take four times as long, and nobody says why."""
    keys = {"train__batch": 4, "train__steps": 2}  # one row
    lines = {}
    for parts in (1, 4):
        session = Session(Lines())
        config = make_config(place, tiny_folder, train__microbatches=parts, **keys)
        run_trial(config, tmp_path / str(parts), session=session)
        lines[parts] = [line for line in session.progress.said if "empty rows" in line]
    assert lines[1] == ["a step computes 7 empty rows, for a multiple of 8"]  # as many devices
    assert lines[4] == ["a step computes 31 empty rows, for a multiple of 32"]


def test_a_model_that_was_replaced_by_another_width(place, tmp_path):
    """Mutation: the arrays of a checkpoint are read before it is asked what they are of."""
    folder = write_llama_folder(tmp_path / "model")
    config = make_config(place, folder)
    row = run_trial(config, tmp_path / "w", session=Session(Lines()))
    (tmp_path / "w" / "result.json").unlink()
    shutil.rmtree(folder)
    write_llama_folder(folder, width=40)
    message = rf"step {row['steps']} was trained on weights .* now; give another --workdir$"
    with pytest.raises(UserError, match=message):
        run_trial(config, tmp_path / "w", session=Session(Lines()))
