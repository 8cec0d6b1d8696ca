"""The command line on a tiny random model and a task of a few lines: commands and mistakes."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softprompt import cli, results
from softprompt.config.schema import KEYS
from softprompt.errors import UserError
from softprompt.trials.evaluate import Predictor
from tests.own_task import give
from tests.tiny import write_llama_folder

REPOSITORY = Path(__file__).parents[1]
LINES = [
    ("a warm and funny film", "good"),
    ("the plot is thin", "bad"),
    ("moving and warm", "good"),
    ("the ending is a mess", "bad"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, and three splits of a task."""
    root = tmp_path_factory.mktemp("place")
    write_llama_folder(root / "model")
    for split, copies in (("train", 6), ("validation", 2), ("test", 3)):
        write_lines(root / f"{split}.jsonl", [dict(text=t, label=y) for t, y in LINES] * copies)
    return root


def write_lines(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def keys(place, **more):
    """The config keys of the tiny task, as command-line words."""
    found = {
        "model.name": place / "model",
        "model.dtype": "float32",
        "task.name": "mine",
        "task.source": f"jsonl:{place}/{{split}}.jsonl",
        "task.template": "Review: {text}\nSentiment:",
        "task.verbalizers": '{"good": " positive", "bad": " negative"}',
        "train.steps": 4,
        "train.batch": 4,
        "method.length": 3,
    }
    found |= {key.replace("__", "."): value for key, value in more.items()}
    return [f"--config.{key}={value}" for key, value in found.items()]


def mistake(capsys, *argv):
    """The one line that a wrong command writes."""
    assert cli.main([str(word) for word in argv]) == 2
    written = capsys.readouterr()
    assert written.out == ""
    last = written.err.splitlines()[-1]
    assert last.startswith("softprompt: error: ")
    assert "Traceback" not in written.err
    return last.removeprefix("softprompt: error: ")


@pytest.fixture(scope="module")
def trained(place):
    """The folder of a finished trial."""
    assert cli.main(["train", *keys(place), "--workdir", str(place / "run")]) == 0
    return place / "run"


def test_help_is_quick_and_shows_an_example():
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "softprompt", "train", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
    )
    assert time.monotonic() - began < 1.5  # 0.1 s on an idle machine
    assert "example:\n  softprompt train --config" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as done:
        cli.main([command, "--help"])
    assert done.value.code == 0
    example = cli.COMMANDS[command].example
    assert example in capsys.readouterr().out
    words = example.rsplit("softprompt ", 1)[1].split()
    assert cli.parse(words)[0].command == command


def test_help_imports_no_jax():
    code = (
        "import sys; from softprompt import cli\n"
        "try: cli.main(['sweep', '--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(bool({'jax', 'pandas', 'numpy'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True)


def test_overrides_are_taken_out_of_the_words():
    words = ["--config", "x.py", "--config.a.b=1", "--config.c", "d e", "--workdir", "w"]
    rest, overrides = cli.split_overrides(words)
    assert rest == ["--config", "x.py", "--workdir", "w"]
    assert overrides == [("a.b", "1"), ("c", "d e")]
    for words in (["--config.a"], ["--config.a", "--workdir"]):
        with pytest.raises(UserError, match="--config.a has no value"):
            cli.split_overrides(words)


def test_train_writes_a_row_and_a_rerun_does_nothing(place, trained, capsys):
    row = results.read_result(trained)
    assert (row["status"], row["steps"], row["trainable"]) == ("done", 4, 3 * 48)
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*")}
    capsys.readouterr()
    assert cli.main(["train", *keys(place), "--workdir", str(trained)]) == 0
    written = capsys.readouterr()
    assert "done already" in written.err
    assert json.loads(written.out)["trial"] == row["trial"]
    assert {file: file.stat().st_mtime_ns for file in trained.rglob("*")} == before


def test_evaluate(trained, capsys):
    row = results.read_result(trained)
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(trained)]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["examples"] == 12
    assert scores["accuracy"] == row["metrics"]["test"]["accuracy"]
    assert cli.main(["evaluate", "--run", str(trained), "--split", "train", "--generate"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 <= scores["generated"]["illegal"] <= 1


@pytest.mark.parametrize(("form", "terminal"), [("text", True), ("json", False)])
def test_predict_answers_each_line(trained, capsys, monkeypatch, form, terminal):
    """Breaks when a line that is typed on a terminal waits for the next one."""
    give(monkeypatch, "a warm film\nthe jokes are old\r\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: terminal)
    batches, predict = [], Predictor.predict

    def watched(self, texts, **options):
        batches.append(len(texts))
        return predict(self, texts, **options)

    monkeypatch.setattr(Predictor, "predict", watched)
    assert cli.main(["predict", "--run", str(trained), "--format", form]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert len(answers) == 2 and batches == ([1, 1] if terminal else [2])
    for text, answer in zip(("a warm film", "the jokes are old"), answers, strict=True):
        if form == "json":
            found = json.loads(answer)
            assert found["text"] == text
            assert sum(found["probabilities"].values()) == pytest.approx(1, abs=1e-5)
            assert found["label"] == max(found["probabilities"], key=found["probabilities"].get)
        else:
            label, *shares = answer.split("\t")
            assert label in ("good", "bad")
            assert sorted(share.split("=")[0] for share in shares) == ["bad", "good"]


def test_predict_needs_no_data(place, trained, capsys, monkeypatch, tmp_path):
    """Nor what it started from. Mutation: the splits are read."""
    config = json.loads((trained / "config.json").read_text())
    config["task"]["source"] = "jsonl:gone/{split}.jsonl"
    config["method"]["common_text"] = config["eval"]["text"] = "gone.txt"
    shutil.copytree(trained, tmp_path / "moved")
    (tmp_path / "moved" / "config.json").write_text(json.dumps(config))
    answers = []
    for folder in (trained, tmp_path / "moved"):
        give(monkeypatch, "a warm film\n")
        assert cli.main(["predict", "--run", str(folder)]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != ""


def test_input_that_is_no_text(trained, capsys, monkeypatch):
    """Mutation: the stream is decoded as it comes."""
    give(monkeypatch, b"a warm film\n\xff\xfe\n")
    assert cli.main(["predict", "--run", str(trained)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("softprompt: error: line 2 of the input is not UTF-8: ")


def test_a_bucket_without_its_file_system(capsys, monkeypatch):
    """Breaks when a missing package ends in a traceback, or is only looked for after training."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["train", "--workdir", "gs://bucket/one"]) == 2
    assert "error: gs://bucket/one needs gcsfs; install" in capsys.readouterr().err


def test_a_workdir_that_is_a_file(capsys, place, tmp_path):
    """Mutation: it is found out when the first file is written."""
    (tmp_path / "w").write_text("")
    found = mistake(capsys, "train", *keys(place), "--workdir", tmp_path / "w")
    assert found == f"{tmp_path}/w: {tmp_path}/w is not a folder; give another --workdir"


def test_models_and_data(place, capsys):
    assert cli.main(["models", "*-135m-*q4", "google/t5-xxl-lm-adapt"]) == 0
    header, small, large, hint = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "FAMILY", "PARAMETERS", "CONTEXT", "LICENCE", "SOURCE"]
    assert small.split()[:5] == [
        *("smollm2-135m-instruct-q4", "llama", "134,515,008", "8192", "Apache-2.0")
    ]
    assert large.split()[2:4] == ["11,135,332,352", "512"]
    assert cli.main(["data"]) == 0
    assert "movie_sentiment" in capsys.readouterr().out
    assert cli.main(["data", "show", *keys(place)]) == 0
    shown = capsys.readouterr().out
    assert "mine train: 24 examples (bad 12, good 12)" in shown
    assert '"Review: a warm and funny film\\nSentiment:"' in shown
    assert '" positive"' in shown


def test_config_lists_keys(capsys):
    """Breaks when a key is left out, or its default, range, choices or reader is."""
    assert cli.main(["config"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:1].strip()]
    assert [line.split(" = ")[0] for line in lines] == list(KEYS)
    assert cli.main(["config", "method.rank", "optimizer"]) == 0
    first, meaning, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("method.rank = 8  (at least 1; with method.name=")
    assert "lora" in first and meaning.startswith("    ")
    named = next(line for line in rest if line.startswith("optimizer.name"))
    assert 'optimizer.name = "adamw"  (adamw, ' in named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required"),
        (["tarin"], "invalid choice: 'tarin'"),
        (["train"], "required: --workdir (see softprompt train --help)"),
        (["train", "--workdir", ""], "argument --workdir: is ''; allowed: a path"),
        (["table", ""], "argument DIR: is ''; allowed: a path"),
        (["train", "--workdir", "w", "--confg.x=1"], "unrecognized arguments: --confg.x=1"),
        (["train", "--workdir", "w", "--config", "no.py"], "no config file 'no.py'"),
        (["evaluate", "--run", "nowhere"], "nowhere: not a trial's folder"),
        (["evaluate", "--run", "x", "--config.seed=1"], "evaluate takes no config keys"),
        (["predict", "--run", "nowhere"], "nowhere: not a trial's folder"),
        (["sweep", "promt_length", "--workdir", "w"], "(did you mean 'prompt_length'?)"),
        (["sweep", "prompt_length", "--workdir", "w", "--shard", "3/2"], "--shard is '3/2'"),
        (["sweep", "prompt_length", "--workdir", "w", "--subset", "x"], "unknown subset 'x'"),
        (["table", "nowhere"], "no folder 'nowhere'"),
        (["models", "pythia-71m"], "unknown model 'pythia-71m' (did you mean "),
        (["config", "methd"], "unknown config key 'methd' (did you mean 'method'?)"),
        (["data", "show"], "data show needs a task; known: "),
        (["data", "show", "movie"], "unknown task 'movie'"),
    ],
)
def test_wrong_commands(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in mistake(capsys, *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"method__lenght": 3}, "unknown config key 'method.lenght' (did you mean method.length"),
        (
            {"method__length": "long"},
            "config key 'method.length' is 'long'; it takes a whole number",
        ),
        ({"task__name": "sms", "task__source": ""}, "unknown task 'sms'"),
        ({"model__name": "smollm"}, "unknown model 'smollm'"),
        ({"method__length": 600}, "config key 'method.length' is 600; allowed: at most"),
        ({"task__verbalizers": '{"good": " positive", "poor": " bad"}'}, "train.jsonl:2: label"),
        ({"method__init": "file", "method__init_file": "no.safetensors"}, "no.safetensors"),
        ({"data__train_examples": 1000}, "'data.train_examples' is 1000; allowed: at most 24, the"),
    ],
)
def test_wrong_values(capsys, place, tmp_path, more, message):
    found = mistake(capsys, "train", *keys(place, **more), "--workdir", tmp_path / "w")
    assert message in found
    assert not (tmp_path / "w" / "result.json").exists()


def test_a_broken_line_is_named(capsys, place, tmp_path):
    rows = (place / "train.jsonl").read_text().splitlines()
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([*rows[:6], '{"text": ', *rows[7:]]))
    words = keys(place, task__source=f"jsonl:{tmp_path}/{{split}}.jsonl")
    assert "train.jsonl:7: not valid JSON" in mistake(
        capsys, "train", *words, "--workdir", tmp_path / "w"
    )


def test_an_empty_split_is_named(capsys, place, tmp_path):
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_bytes((place / f"{split}.jsonl").read_bytes())
    (tmp_path / "test.jsonl").write_text("")
    words = keys(place, task__source=f"jsonl:{tmp_path}/{{split}}.jsonl")
    found = mistake(capsys, "train", *words, "--workdir", tmp_path / "w")
    assert "test split of task 'mine' is empty" in found


def test_a_prompt_file_of_another_width(capsys, place, trained, tmp_path):
    write_llama_folder(tmp_path / "model", width=32)
    more = {
        "model__name": tmp_path / "model",
        "method__init": "file",
        "method__init_file": trained / "delta.safetensors",
    }
    found = mistake(capsys, "train", *keys(place, **more), "--workdir", tmp_path / "w")
    assert "delta.safetensors" in found
    assert "48" in found
    assert "32" in found


def test_the_workdir_of_another_config(capsys, place, trained):
    before = (trained / "result.json").read_bytes()
    found = mistake(capsys, "train", *keys(place, method__length=5), "--workdir", trained)
    assert "holds another trial (method.length: 5, 3" in found
    assert (trained / "result.json").read_bytes() == before


def test_a_gguf_file_that_is_none(capsys, place, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(range(30)))
    words = keys(place, model__name=tmp_path / "model.gguf")
    found = mistake(capsys, "train", *words, "--workdir", tmp_path / "w")
    assert str(tmp_path / "model.gguf") in found


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_damaged_weights(capsys, place, tmp_path, damage):
    write_llama_folder(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        file.unlink()
    words = keys(place, model__name=tmp_path / "model")
    found = mistake(capsys, "train", *words, "--workdir", tmp_path / "w")
    assert str(tmp_path / "model") in found


def test_an_interruption_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(arguments, overrides):
        raise KeyboardInterrupt

    command = dataclasses.replace(cli.COMMANDS["models"], run=interrupted)
    monkeypatch.setitem(cli.COMMANDS, "models", command)
    assert cli.main(["models"]) == 130
    assert capsys.readouterr().err == "softprompt: interrupted; the same command resumes\n"


def test_a_reader_that_leaves_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m softprompt models | true",
        shell=True,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert done.stderr == ""


def test_a_trial_that_fails_is_a_row_and_exits_with_one(place, tmp_path, monkeypatch, capsys):
    """Injected at run_trial: nothing a user can do makes it raise this on purpose."""

    def broken(config, folder, *, session):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr("softprompt.trials.sweep.run_trial", broken)
    assert cli.main(["train", *keys(place), "--workdir", str(tmp_path / "w")]) == 1
    assert "trial failed: RuntimeError: RESOURCE_EXHAUSTED" in capsys.readouterr().err
    row = results.read_result(tmp_path / "w")
    assert (row["status"], row["error"][:13]) == ("failed", "RuntimeError:")


def test_sigterm_passes_through(place, tmp_path, monkeypatch):
    def stopped(config, folder, *, session):
        raise SystemExit(75)

    monkeypatch.setattr("softprompt.trials.sweep.run_trial", stopped)
    with pytest.raises(SystemExit) as done:
        cli.main(["train", *keys(place), "--workdir", str(tmp_path / "w")])
    assert done.value.code == 75
