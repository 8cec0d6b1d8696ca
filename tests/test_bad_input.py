"""What a user can get wrong: one clear line on standard error, exit code 2, nothing left behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softprompt import cache
from softprompt.cli import main
from softprompt.errors import UserError
from softprompt.results import read_result
from softprompt.training.delta_file import save_delta
from tests.own_task import REPOSITORY, words, write_task
from tests.tiny import write_llama_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_llama_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(tmp_path):
    return write_task(tmp_path)


def refusal(argv, capsys):
    """The one line that a command ends with."""
    assert main(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("softprompt: error: ")]
    assert len(errors) == 1 and lines[-1] == errors[0], lines
    assert "Traceback" not in "\n".join(lines)
    return errors[0]


def train(place, model, capsys, **more):
    """What `softprompt train` says of a config that it refuses; it leaves no trial behind."""
    workdir = place / "run"
    line = refusal(["train", "--workdir", str(workdir), *words(place, model, **more)], capsys)
    assert not (workdir / "config.json").exists()
    assert not list(place.glob("**/*.tmp"))
    return line


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"method__lenght": 5}, ["method.lenght", "did you mean method.length"]),
        ({"train__steps": "many"}, ["train.steps", "'many'", "a whole number"]),
        ({"train__steps": 2.5}, ["train.steps", "2.5", "a whole number"]),
        ({"method__init": "labls"}, ["method.init", "labls", "labels", "vocabulary"]),
        ({"method__length": -1}, ["method.length", "-1", "at least 0"]),
        ({"optimizer__name": "adam"}, ["optimizer.name", "'adam'", "adamw", "adafactor"]),
        ({"optimizer__schedule": "step"}, ["optimizer.schedule", "'step'", "cosine"]),
        ({"train__microbatches": 3}, ["train.microbatches", "3", "divide train.batch, 4"]),
        ({"method__length": 600}, ["method.length", "600", "at most", "context of 512"]),
        ({"method__name": "fewshot", "method__shots": 99}, ["method.shots", "99", "at most 48"]),
        ({"model__name": "smollm3"}, ["model 'smollm3'", "smollm2-135m-instruct-q4"]),
        ({"model__name": "/no/such/folder"}, ["/no/such/folder", "no such file or folder"]),
        ({"method__init": "file", "method__init_file": "no.safetensors"}, ["no.safetensors", "No"]),
        ({"mesh__model": 3}, ["mesh.model", "3", "8 devices"]),
        ({"task__template": "Review: {words}"}, ["words", "train.jsonl"]),
        ({"task__max_input": 4}, ["task.max_input", "4", "train-"]),
    ],
)
def test_a_config_that_cannot_be_run(place, model, capsys, more, said):
    line = train(place, model, capsys, **more)
    for part in said:
        assert part in line


def test_an_unknown_task_lists_the_tasks(place, model, capsys):
    argv = ["train", "--workdir", str(place / "run"), f"--config.model.name={model}"]
    line = refusal([*argv, "--config.task.name=movie_sentimnt"], capsys)
    assert "did you mean 'movie_sentiment'" in line and "question_type" in line


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ('{"text": "a warm film", "label": "goo', ["train.jsonl:7", "JSON"]),
        ('{"text": "a warm film", "label": "great"}', ["train.jsonl:7", "'great'", "good"]),
        ('{"label": "good"}', ["train.jsonl:7", "'text'"]),
        ('["a warm film", "good"]', ["train.jsonl:7"]),
    ],
)
def test_a_broken_line_7_is_named(place, model, capsys, broken, said):
    file = place / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[6] = broken
    file.write_text("\n".join(lines) + "\n")
    line = train(place, model, capsys)
    for part in said:
        assert part in line


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_named(place, model, capsys, split):
    (place / f"{split}.jsonl").write_text("")
    line = train(place, model, capsys)
    assert f"{split} split" in line and "empty" in line and f"{split}.jsonl" in line


def test_a_prompt_file_of_another_width(place, model, capsys):
    file = place / "other.safetensors"
    save_delta(file, {"prompt": np.zeros((3, 17), np.float32)}, {})
    line = train(place, model, capsys, method__init="file", method__init_file=str(file))
    assert str(file) in line and "[3, 17]" in line and "48]" in line


def test_a_truncated_prompt_file(place, model, capsys):
    file = place / "other.safetensors"
    save_delta(file, {"prompt": np.zeros((3, 48), np.float32)}, {})
    file.write_bytes(file.read_bytes()[:-40])
    line = train(place, model, capsys, method__init="file", method__init_file=str(file))
    assert str(file) in line and "not a readable safetensors file" in line


def test_unreadable_weights(place, capsys):
    folder = write_llama_folder(place / "model")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors" in train(place, folder, capsys)
    gguf = place / "broken.gguf"
    gguf.write_bytes(b"GGUF" + bytes(20))
    assert "broken.gguf" in train(place, gguf, capsys)


def test_missing_and_extra_tensors_are_listed_together(place, capsys):
    folder = write_llama_folder(place / "model")
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.norm.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = np.zeros((2, 2), np.float32)
    tensors["model.surprise"] = np.zeros(2, np.float32)
    save_file(tensors, weights)
    line = train(place, folder, capsys)
    for part in ("model.norm.weight", "layers.1.self_attn.q_proj.weight", "model.surprise"):
        assert part in line


def test_a_checksum_mismatch_names_file_and_both_sums(tmp_path):
    file = tmp_path / "member"
    file.write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        cache._verify(file, "0" * 64, "delete it")
    assert str(file) in str(caught.value) and "0" * 64 in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_workdir_of_another_config(place, model, capsys):
    argv = ["train", "--workdir", str(place / "run")]
    assert main([*argv, *words(place, model, train__steps=1, optimizer__warmup=0)]) == 0
    before = {p: p.stat().st_mtime_ns for p in (place / "run").rglob("*")}
    capsys.readouterr()
    other = words(place, model, train__steps=1, optimizer__warmup=0, method__length=5)
    line = refusal([*argv, *other], capsys)
    assert "method.length: 5, 3" in line and "--workdir" in line
    assert before == {p: p.stat().st_mtime_ns for p in (place / "run").rglob("*")}


def test_a_loss_that_is_not_finite_names_step_and_last_metrics(place, model, capsys):
    workdir = place / "run"
    more = {"optimizer__rate": 8e18, "optimizer__warmup": 8}  # squares overflow at step 2
    line = refusal(["train", "--workdir", str(workdir), *words(place, model, **more)], capsys)
    assert "step 2" in line and "last finite metrics: " in line
    assert "loss" in line.split("last finite metrics: ")[1]
    row = read_result(workdir)
    assert row is not None and row["status"] == "failed" and "step 2" in row["error"]


def test_as_a_process_too(tmp_path):
    """The exit code and the line survive a real process; nothing is printed on standard output."""
    command = [sys.executable, "-m", "softprompt", "train", "--workdir", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, "--config.trian.steps=3"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("softprompt: error: ") and "train.steps" in done.stderr
    assert done.stderr.count("\n") == 1


def test_predict_refuses_what_is_no_trial(tmp_path, capsys):
    line = refusal(["predict", "--run", str(tmp_path)], capsys)
    assert str(tmp_path) in line and "config.json" in line
    (tmp_path / "config.json").write_text(json.dumps({"seeds": 1}))
    assert "seeds" in refusal(["evaluate", "--run", str(Path(tmp_path))], capsys)
