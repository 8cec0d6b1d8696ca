"""`softprompt export` and `softprompt import` on trials: there and back, and mistakes."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from softprompt import cli
from softprompt.config import base_config
from softprompt.errors import UserError
from softprompt.interchange import adapter_files
from softprompt.methods import lora, prompt
from softprompt.methods.delta_file import load_delta
from softprompt.trials import convert
from softprompt.trials.convert import base_model, conventions
from softprompt.trials.run import check_folder, read_config
from tests.interchange.cases import MODELS, sizes
from tests.matrix import matrix
from tests.mistakes import run
from tests.own_task import give, words, write_task
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A task, a decoder and a T5, and a finished trial of each."""
    root = write_task(tmp_path_factory.mktemp("place"))
    write_llama_folder(root / "llama")
    write_llama_folder(root / "other", seed=1)
    write_llama_folder(root / "wide", width=32)
    write_complete_t5(root / "t5")
    short = {"train__steps": 2}
    for name in ("llama", "t5"):
        command = [
            "train",
            *words(root, root / name, **short),
            "--workdir",
            str(root / name / "run"),
        ]
        assert cli.main(command) == 0
    return root


def taking(place, model="llama", **more):
    """What `import` is told: the model, and the task."""
    given = words(place, place / model, **more)
    named = ("--config.task", "--config.data", "--config.method.bos")
    about = [word for word in given if word.startswith(named)]
    return ["--model", place / model, "--config.model.dtype=float32", *about]


def test_half_a_file_is_removed(place, tmp_path, monkeypatch):
    """Mutation: only what is written as a folder is removed after an error."""

    def full(file, content):
        file.write_bytes(content[:8])
        raise OSError("the disk is full")

    monkeypatch.setattr(convert, "write_bytes", full)
    with pytest.raises(OSError, match="the disk is full"):
        convert.export_run([place / "llama" / "run"], kind="npy", to=tmp_path / "p.npy")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model", ["llama", "t5"])
@pytest.mark.parametrize("kind", ["peft", "npy"])
def test_there_and_back(place, tmp_path, capsys, model, kind):
    """The same scores from the same bits. Mutation: another BOS, or a prompt in another place."""
    trial, to = place / model / "run", tmp_path / "theirs"
    report = run(capsys, "export", "--run", trial, "--format", kind, "--to", to)
    assert report["method"] == "prompt"
    assert all(Path(file).is_file() for file in report["wrote"])
    assert any("padding" in note for note in report["notes"]) == (kind == "peft")
    made = run(capsys, "import", to, *taking(place, model), "--workdir", tmp_path / "mine")
    place_of = {"llama": "prompt", "t5": "encoder/prompt"}[model]
    assert made["leaves"] == {place_of: [3, {"llama": 48, "t5": 20}[model]]}
    assert any("fingerprint" in note for note in made["notes"]) == (kind == "npy")
    theirs, mine = (load_delta(f / "delta.safetensors") for f in (trial, tmp_path / "mine"))
    assert np.array_equal(*(_only(delta) for delta, _ in (theirs, mine)))
    assert theirs[1]["fingerprint"] == mine[1]["fingerprint"]
    scores = [run(capsys, "evaluate", "--run", f) for f in (trial, tmp_path / "mine")]
    assert scores[0] == scores[1]


def _only(delta):
    while isinstance(delta, dict):
        (delta,) = delta.values()
    return delta


def mixture(place):
    """The task, as number 1, with another of the same texts."""
    other = {"name": "other", "source": f"jsonl:{place}/{{split}}.jsonl", "template": "{text}:"}
    return json.dumps([other | {"verbalizers": {"good": " yes", "bad": " not at all"}}, "mine"])


TASKS = ("other", "mine")
METHODS = {
    "prefix": {"method__init": "noise", "method__length": 2},
    "lora": {
        "method__rank": 2,
        "method__alpha": 3,
        "method__rslora": True,
        "method__dropout": 0.25,
        "method__targets": "q,up",
    },
    "ia3": {},
    "multitask": {"method__rank": 2},
    "ptuning": {"method__name": "prompt", "method__reparam": "mlp", "method__bottleneck": 5},
}


@pytest.mark.parametrize(
    ("model", "method"),
    matrix(
        [
            *[("llama", method) for method in METHODS],
            *[("t5", method) for method in ("lora", "multitask")],
        ],
        keep=[("llama", "lora")],
    ),
)
def test_every_method_there_and_back(place, tmp_path, capsys, model, method):
    """Mutation: a key of the method's config, such as rslora or dropout, is not set on import."""
    more = {"train__steps": 2, "optimizer__rate": 0.3, "optimizer__warmup": 0, **METHODS[method]}
    more |= {"data__mixture": mixture(place)} if method == "multitask" else {}
    command = words(place, place / model, **{"method__name": method, **more})
    run(capsys, "train", *command, "--workdir", tmp_path / "run")
    report = run(
        capsys, "export", "--run", tmp_path / "run", "--format", "peft", "--to", tmp_path / "a"
    )
    data = {key: value for key, value in more.items() if key.startswith("data")}
    asked = ["import", tmp_path / "a", *taking(place, model, **data), "--workdir", tmp_path / "b"]
    made = run(capsys, *asked)
    assert made["method"] == report["method"] == METHODS[method].get("method__name", method)
    theirs, mine = (load_delta(tmp_path / f / "delta.safetensors")[0] for f in ("run", "b"))
    for one, other in zip(*map(jax.tree.leaves, (theirs, mine)), strict=True):
        np.testing.assert_array_equal(one, other)
    assert jax.tree.structure(theirs) == jax.tree.structure(mine)
    scores = [run(capsys, "evaluate", "--run", tmp_path / f) for f in ("run", "b")]
    assert scores[0] == scores[1]
    configs = [json.loads((tmp_path / f / "config.json").read_text()) for f in ("run", "b")]
    keys = ("name", "rank", "alpha", "rslora", "dropout") if method == "lora" else ("name",)
    assert len({tuple(config["method"][key] for key in keys) for config in configs}) == 1


@pytest.mark.matrix
def test_a_prompt_for_tasks_knows_them_by_number(place, tmp_path, capsys, monkeypatch):
    """Mutations: the report does not name the numbers; another number of tasks is accepted; a
    line is answered with the first task's prompt, or its words.
    """
    more = {"method__name": "multitask", "data__mixture": mixture(place), "train__steps": 2}
    more |= {"optimizer__rate": 0.3, "eval__select": "last"}
    trial, to = tmp_path / "run", tmp_path / "a"
    told = run(capsys, "train", *words(place, place / "llama", **more), "--workdir", trial)
    report = run(capsys, "export", "--run", trial, "--format", "peft", "--to", to)
    assert report["notes"][-1] == "task ids: 0 other, 1 mine"
    line = run(capsys, "import", to, *taking(place), "--workdir", tmp_path / "b", code=2)
    assert line == f"{to} is for 2 tasks, by number; the config has 1, mine; name as many in " + (
        "data.mixture"
    )
    scores = {task: run(capsys, "evaluate", "--run", trial, "--task", task) for task in TASKS}
    for task, found in scores.items():
        assert found["accuracy"] == told["metrics"]["test"][f"{task}/accuracy"]
    line = run(capsys, "evaluate", "--run", trial, "--task", "sms_spam", code=2)
    assert line == "unknown --task 'sms_spam'; known: mine, other"
    give(monkeypatch, "a warm film\n")
    line = run(capsys, "predict", "--run", trial, code=2)
    assert line == "--task is not given; allowed: other, mine, the trial's tasks"
    texts = [json.loads(line)["text"] for line in (place / "test.jsonl").read_text().splitlines()]
    lines = (trial / "predictions.jsonl").read_text().splitlines()
    wanted = [line for line in map(json.loads, lines) if line["task"] == "mine"]
    give(monkeypatch, "\n".join(texts))
    asked = ["predict", "--run", str(trial), "--task", "mine", "--format", "json"]
    assert cli.main(asked) == 0
    for text, line in zip(capsys.readouterr().out.splitlines(), wanted, strict=True):
        raised = np.exp(list(line["scores"].values()))
        shares = list(json.loads(text)["probabilities"].values())
        np.testing.assert_allclose(shares, raised / raised.sum(), atol=1e-4)
    answers = run(capsys, "evaluate", "--run", trial, "--generate")["generated"]
    both = [answers[f"{task}/illegal"] for task in TASKS]
    assert answers["illegal"] == np.mean(both) and answers["examples"] == 40


def test_an_imported_adapter_answers(place, tmp_path, capsys, monkeypatch):
    run(
        capsys,
        "export",
        "--run",
        place / "llama" / "run",
        "--format",
        "peft",
        "--to",
        tmp_path / "a",
    )
    file = tmp_path / "a" / "adapter_config.json"
    run(capsys, "import", file, *taking(place), "--workdir", tmp_path / "b")
    give(monkeypatch, "a warm film\n")
    assert cli.main(["predict", "--run", str(tmp_path / "b"), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["label"] in ("good", "bad")
    with pytest.raises(UserError, match="holds an imported delta, which training would replace"):
        check_folder(Path(tmp_path / "b"), read_config(tmp_path / "b"))


def test_provenance_is_one_key(place, tmp_path, capsys):
    """Mutation: any of it left out."""
    trial, to = place / "llama" / "run", tmp_path / "a"
    run(capsys, "export", "--run", trial, "--format", "peft", "--to", to)
    with safe_open(to / "adapter_model.safetensors", framework="np") as opened:
        metadata = opened.metadata()
    assert metadata.keys() == {"format", "softprompt"}
    said = json.loads(metadata["softprompt"])
    row = json.loads((trial / "result.json").read_text())
    _, known = load_delta(trial / "delta.safetensors")
    assert said["fingerprint"] == known["fingerprint"]
    assert (said["commit"], said["config"]) == (row["commit"], row["config"])
    assert (said["bos"], said["embed_scale"]) == ("after", 1.0)
    assert said["prompt_enters"] == "after the embeddings' scaling"


def test_conventions_are_said():
    """A Gemma's prompt enters after the embeddings' scaling. Mutation: say it of every model's."""
    said = {name: conventions(prompt.Settings(bos="none"), sizes(name)) for name in MODELS}
    assert said["llama"] == ["the text after the prompt has no BOS"]
    assert "after the embeddings' scaling by 2.82843, as in PEFT" in said["gemma2"][1]
    assert conventions(lora.Settings(), sizes("gemma2")) == []


def test_the_base_model_is_one_that_transformers_loads(tmp_path):
    """Breaks when the file names what only we know, such as a quantised model of the catalogue."""
    (tmp_path / "model.gguf").touch()
    for name, base in {
        "smollm2-135m-instruct-q4": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "gemma3-270m-q4": "google/gemma-3-270m",
        "t5_1_1_lm100k_small": "google/t5-small-lm-adapt",
        "google/t5-small-lm-adapt": "google/t5-small-lm-adapt",
        str(tmp_path): str(tmp_path),
        str(tmp_path / "model.gguf"): None,
    }.items():
        config = base_config()
        config.model.name = name
        found, note = base_model(config)
        assert found == base
        assert (name in note and str(base or "null") in note) if found != name else not note


@pytest.mark.parametrize("command", ["export", "import"])
def test_nothing_is_half_written(place, tmp_path, capsys, monkeypatch, command):
    """The disk is full before the second of two files. Breaks when the first stays."""
    trial, to, work = place / "llama" / "run", tmp_path / "a", tmp_path / "b"
    asked = ["export", "--run", trial, "--format", "peft", "--to", to]
    if command == "import":
        run(capsys, *asked)
        asked = ["import", to, *taking(place), "--workdir", work]

    def full(file, text):
        raise UserError(f"cannot write {file}: No space left on device")

    module = {"export": adapter_files, "import": convert}[command]
    monkeypatch.setattr(module, "write_text", full)
    assert "No space left" in run(capsys, *asked, code=2)
    assert not (to if command == "export" else work).exists()


def test_only_onto_the_weights_that_it_was_trained_on(place, tmp_path, capsys):
    """Mutation: the check of fingerprints, or of shapes under --any-weights, left out."""
    to, work = tmp_path / "a", tmp_path / "b"
    run(capsys, "export", "--run", place / "llama" / "run", "--format", "peft", "--to", to)
    other = ["import", to, *taking(place, "other"), "--workdir", work]
    line = run(capsys, *other, code=2)
    assert line.startswith(f"{to} was trained on weights ")
    assert line.endswith("; --any-weights accepts it")
    assert not work.exists()
    run(capsys, *other, "--any-weights")
    trained = load_delta(work / "delta.safetensors")[1]["imported"]["trained_on"]
    assert trained == load_delta(place / "llama/run/delta.safetensors")[1]["fingerprint"]
    assert run(capsys, "evaluate", "--run", work)["examples"] == 20
    line = run(capsys, "import", to, *taking(place, "wide"), "--workdir", tmp_path / "c", code=2)
    assert "misshapen: prompt_embeddings [3, 48] (expected [3, 32])" in line


def test_a_trial_on_other_weights(place, tmp_path, capsys):
    moved = Path(shutil.copytree(place / "llama" / "run", tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    config["model"]["name"] = str(place / "other")
    (moved / "config.json").write_text(json.dumps(config))
    line = run(capsys, "evaluate", "--run", moved, code=2)
    assert "--any-weights accepts it" in line
    assert run(capsys, "evaluate", "--run", moved, "--any-weights")["examples"] == 20
    config["model"]["name"] = str(place / "wide")
    (moved / "config.json").write_text(json.dumps(config))
    line = run(capsys, "evaluate", "--run", moved, "--any-weights", code=2)
    assert "prompt [3, 48] does not fit this model; allowed: [3, 32]" in line


def test_bos_stands_where_the_file_says(place, tmp_path, capsys):
    """Mutation: the provenance's convention is passed over."""
    trial = Path(shutil.copytree(place / "llama" / "run", tmp_path / "run"))
    config = json.loads((trial / "config.json").read_text())
    config["method"]["bos"] = "none"
    (trial / "config.json").write_text(json.dumps(config))
    report = run(capsys, "export", "--run", trial, "--format", "peft", "--to", tmp_path / "a")
    assert report["notes"][0] == "the text after the prompt has no BOS"
    run(capsys, "import", tmp_path / "a", *taking(place), "--workdir", tmp_path / "b")
    assert json.loads((tmp_path / "b" / "config.json").read_text())["method"]["bos"] == "none"
    asked = ["import", tmp_path / "a", *taking(place), "--config.method.bos=before"]
    line = run(capsys, *asked, "--workdir", tmp_path / "c", code=2)
    assert line == f"config key 'method.bos' is 'before'; {tmp_path / 'a'} has 'none'"


def test_mistakes(place, tmp_path, capsys):
    """Must show 7: nothing is left behind."""
    trial, there = place / "llama" / "run", tmp_path / "there"
    there.mkdir()
    (there / "x").write_text("x")
    line = run(capsys, "export", "--run", trial, "--format", "peft", "--to", there, code=2)
    assert line == f"--to {there}: it exists; give a new path"
    line = run(capsys, "export", "--run", tmp_path, "--format", "npy", "--to", "x", code=2)
    assert line.startswith(f"{tmp_path}: not a trial's folder")
    array, work = tmp_path / "p.npy", tmp_path / "w"
    np.save(array, np.ones((2, 48), np.float32))
    asked = ["import", array, *taking(place)]
    line = run(capsys, *asked, "--workdir", there, code=2)
    assert line == f"--workdir {there}: not empty; give a new folder"
    for source, message in {
        tmp_path / "none": "no such file or folder",
        there: "no PEFT adapter there (it has no adapter_config.json)",
        there / "x": "neither a .npy file nor part of a PEFT adapter",
    }.items():
        line = run(capsys, "import", source, *taking(place), "--workdir", work, code=2)
        assert line.startswith(f"{source}: {message}")
    line = run(capsys, *asked, "--config.method.length=5", "--workdir", work, code=2)
    assert line == (
        "--config.method.length: import takes the method from the file; allowed: "
        "--config.method.bos"
    )
    line = run(capsys, *asked, "--config.method.bos=before", "--workdir", work, code=2)
    assert line.startswith("config key 'method.bos' is 'before'; in ")
    line = run(capsys, *asked, "--config.task.nam=5", "--workdir", work, code=2)
    assert line.startswith("unknown config key 'task.nam'")
    assert not work.exists()
