"""A task whose answers are free text: trained, selected, tested and used by generation."""

import functools
import json
import math
from dataclasses import replace

import pytest

from softprompt import cli
from softprompt.config import base_config
from softprompt.console import Progress
from softprompt.data.builtin_tasks import TASKS
from softprompt.errors import UserError
from softprompt.evaluation.metrics import free_text
from softprompt.inference.sampling import sampling
from softprompt.results import read_result
from softprompt.training.logs import read_log
from softprompt.trials.data import evaluators_of
from softprompt.trials.evaluate import Predictor
from tests.own_task import give

ANSWERS = {"paris": ["the city", "a city"], "rome": ["the story"], "film": ["it is old", "old"]}


@pytest.fixture(scope="module")
def keys(tiny_folder, tmp_path_factory):
    """Config words of a trial on a JSONL file of questions, some with several right answers."""
    file = tmp_path_factory.mktemp("qa") / "qa.jsonl"
    lines = [
        {"question": f"{n} {word} ?", "answer": right if len(right) > 1 else right[0]}
        for n in range(20)
        for word, right in ANSWERS.items()
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {
        "model.name": tiny_folder,
        "model.dtype": "float32",
        "task.name": "qa",
        "task.source": f"jsonl:{file}",
        "task.template": "Q: {question}\nA:",
        "task.label_field": "answer",
        "task.max_target": 8,
        "task.eos": True,
        "method.length": 4,
        "train.steps": 30,
        "train.batch": 8,
        "optimizer.rate": 0.3,
        "eval.every": 15,
        "eval.metric": "f1",
    }
    return [f"--config.{key}={value}" for key, value in found.items()]


@pytest.fixture(scope="module")
def trained(keys, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trial") / "w"
    assert cli.main(["train", *keys, "--workdir", str(folder)]) == 0
    return folder


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_trained_selected_and_tested_by_generation(trained):
    """Breaks when an answer is compared with the first right one alone, or selection goes by
    another metric."""
    row, lines = read_result(trained), predictions(trained)
    found = free_text([line["predicted"] for line in lines], [line["answers"] for line in lines])
    assert row["metrics"]["test"] == pytest.approx(found)
    assert {"exact_match", "f1", "examples"} == row["metrics"]["test"].keys()
    assert any(len(line["answers"]) > 1 for line in lines)
    looks = {
        line["step"]: line["validation/f1"] for line in read_log(trained) if "loss" not in line
    }
    assert row["metrics"]["selected_step"] == max(looks, key=lambda step: looks[step])
    assert row["metrics"]["validation"]["f1"] == max(looks.values())


def test_evaluated_and_answered(trained, capsys, monkeypatch):
    """Breaks when `evaluate` ranks a task without candidates, or `predict` wants labels in either
    format."""
    assert cli.main(["evaluate", "--run", str(trained)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["f1"] == pytest.approx(read_result(trained)["metrics"]["test"]["f1"])
    give(monkeypatch, "3 rome ?\n7 film ?\n")
    assert cli.main(["predict", "--run", str(trained), "--format", "json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["text"] for one in answers] == ["3 rome ?", "7 film ?"]
    assert all(isinstance(one["answer"], str) for one in answers)
    give(monkeypatch, "3 rome ?\n7 film ?\n")
    assert cli.main(["predict", "--run", str(trained)]) == 0
    assert capsys.readouterr().out.splitlines() == [one["answer"] for one in answers]


def test_beams_have_a_caller(keys, trained, tmp_path, capsys):
    """Breaks when `eval.beams` is not handed on: the search of one beam is greedy decoding. Without
    `eval.metric` it breaks when the default is refused, or is not the task's first metric.
    """
    left_out = ("train.steps", "eval.every", "eval.metric")
    some = [key for key in keys if not any(name in key for name in left_out)]
    scores = {}
    for beams in (1, 3):
        words = [*some, "--config.train.steps=0", f"--config.eval.beams={beams}"]
        assert cli.main(["train", *words, "--workdir", str(tmp_path / str(beams))]) == 0
        scores[beams] = [line["predicted"] for line in predictions(tmp_path / str(beams))]
    assert read_result(tmp_path / "3")["config"]["eval"]["metric"] == "exact_match"
    assert len(scores[1]) == len(scores[3])
    assert scores[1] != scores[3]


def test_which_evaluators_a_config_asks_for():
    """Breaks when a metric that a task lacks selects, or what selects is not measured."""
    labels = TASKS["sms_spam"]
    free = replace(labels, name="qa", verbalizers={})
    config = base_config()
    assert evaluators_of(labels, config) == ["ranking"]
    with pytest.raises(UserError, match=r"'eval.metric' is 'accuracy'.*'qa': exact_match, f1"):
        evaluators_of(free, config)
    config.eval.metric = "f1"
    assert evaluators_of(free, config) == ["generation"]
    with pytest.raises(UserError, match=r"'eval.metric' is 'f1'.*'sms_spam': accuracy, macro_f1"):
        evaluators_of(labels, config)
    config.eval.metric = "generated_accuracy"
    assert evaluators_of(labels, config) == ["ranking", "generation"]
    config.eval.metrics = "illegal, generated_macro_f1"
    assert evaluators_of(labels, config) == ["generation"]
    config.eval.metrics = "illegible"
    with pytest.raises(UserError, match=r"'eval.metrics' is 'illegible'; allowed"):
        evaluators_of(labels, config)
    config.eval.metrics, config.method.name = "", "none"
    assert evaluators_of(free, config) == ["generation"], "nothing is selected"


LINES = ("the story is old", "the city is old", "a film in the city", "it is a film")


@pytest.fixture(scope="module")
def language(keys, tmp_path_factory):
    """Config words of a trial that models lines of text, one of which stands in all splits."""
    folder = tmp_path_factory.mktemp("language")
    for split in ("train", "validation", "test"):
        lines = [{"line": f"{LINES[n % 4]} {n} {split * (n > 0)}"} for n in range(12)]
        lines += [{"line": None}] if split == "test" else []
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    changed = {
        "task.name": "lines",
        "task.source": f"jsonl:{folder}/{{split}}.jsonl",
        "task.template": "Text:",
        "task.label_field": "line",
        "task.max_target": 32,
        "eval.metric": "log_likelihood",
        "eval.metrics": "perplexity",
    }
    kept = [key for key in keys if key.partition("=")[0].removeprefix("--config.") not in changed]
    return [*kept, *(f"--config.{key}={value}" for key, value in changed.items())]


def test_a_language_is_modelled(language, tmp_path, capsys, monkeypatch):
    """Breaks when a template must name a field, selection wants the least likely answers, tokens of
    different answers do not count alike, an example without an answer is scored, texts that stand
    in two splits are not counted, or continuations that are sampled ignore the seed."""
    folder = tmp_path / "w"
    assert cli.main(["train", *language, "--workdir", str(folder)]) == 0
    row, lines = read_result(folder), predictions(folder)
    measured = row["metrics"]["test"]
    assert measured.keys() == {"log_likelihood", "perplexity", "examples"}
    costs = [line for line in lines if "nats" in line]
    assert measured["examples"] == len(costs) == len(lines) - 1 == 12
    assert len({line["tokens"] for line in costs}) > 1
    nats = sum(line["nats"] for line in costs) / sum(line["tokens"] for line in costs)
    assert measured["log_likelihood"] == pytest.approx(-nats, abs=1e-4)
    assert measured["perplexity"] == pytest.approx(math.exp(nats), rel=1e-4)
    looks = {one["step"]: one.get("validation/log_likelihood") for one in read_log(folder)}
    looks = {step: value for step, value in looks.items() if value is not None}
    assert row["metrics"]["validation"]["log_likelihood"] == max(looks.values()) > looks[0] + 0.1
    assert row["shared_texts"] == 3, "the first line, in each pair of splits"
    capsys.readouterr()
    give(monkeypatch, "\n\n")
    assert cli.main(["predict", "--run", str(folder)]) == 0
    assert len(set(capsys.readouterr().out.splitlines())) == 1
    give(monkeypatch, "a film\n")
    assert cli.main(["predict", "--run", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "line 1 has 1 tab-separated fields; the task takes 0: an empty line" in said
    write = functools.partial(Predictor(folder, Progress()).generate, ["Text:"] * 4, max_new=8)
    assert len(set(write())) == 1
    drawn = [write(sampling=sampling(1.0), seed=seed) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) > 1


OPTIONS = ("the city", "the story", "it is old", "a film")


@pytest.fixture(scope="module")
def choices(keys, tmp_path_factory):
    """Config words of a trial whose examples have candidates of their own, in groups of three."""
    file = tmp_path_factory.mktemp("mc") / "mc.jsonl"
    lines = []
    for number in range(60):
        options = list(OPTIONS[: 2 + number % 3])
        answer = options[number // 3 % len(options)]
        right = [answer, options[0]] if number % 2 else answer
        row = {"q": {"text": f"{number} rome ?"}, "topic": number // 3}
        lines.append(json.dumps({**row, "options": options, "answer": right}) + "\n")
    file.write_text("".join(lines))
    changed = {
        "task.source": f"jsonl:{file}",
        "task.template": "Q: {topic} {options}\nA:",
        "task.group_field": "topic",
        "task.candidates_field": "options",
        "train.steps": 2,
        "eval.every": 0,
        "eval.metric": "accuracy",
        "eval.metrics": "accuracy,f1",
    }
    kept = [key for key in keys if key.partition("=")[0].removeprefix("--config.") not in changed]
    return [*kept, *(f"--config.{key}={value}" for key, value in changed.items())]


@pytest.mark.matrix
def test_own_candidates_are_ranked_and_generated_answers_compared(
    choices, tmp_path, capsys, monkeypatch
):
    """Breaks when examples with two candidates are given a third, one right answer of several is
    wrong, a group is divided, or the evaluators' predictions overwrite each other."""
    assert cli.main(["data", "show", *choices]) == 0
    assert "Q: 0 the city, the story" in capsys.readouterr().out.replace("\\n", " ")
    assert cli.main(["train", *choices, "--workdir", str(tmp_path / "w")]) == 0
    lines, found = predictions(tmp_path / "w"), read_result(tmp_path / "w")["metrics"]["test"]
    for line in lines:
        assert set(line["scores"]) == set(OPTIONS[: len(line["scores"])])
        assert line["predicted"] == max(line["scores"], key=line["scores"].get)
    right = [line["predicted"] in line["answers"] for line in lines]
    assert found["accuracy"] == pytest.approx(sum(right) / len(lines))
    generated = free_text([line["generated"] for line in lines], [one["answers"] for one in lines])
    assert found["f1"] == pytest.approx(generated["f1"])
    assert {"group_match", "generated_group_match", "illegal"} <= found.keys()
    assert len({len(line["scores"]) for line in lines}) == 3 and len(lines) % 3 == 0
    capsys.readouterr()
    assert cli.main(["evaluate", "--run", str(tmp_path / "w")]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == pytest.approx(found["accuracy"])
    give(monkeypatch, "3\tthe city, a film\n")
    assert cli.main(["predict", "--run", str(tmp_path / "w"), "--format", "json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["answer"], str)


def test_candidates_that_cannot_be_ranked_are_one_line(choices, tmp_path, capsys):
    """Breaks when an answer that can never win, or one candidate, is trained on."""
    rows = {
        "options": {"topic": "1", "options": ["a", "b"], "answer": "c"},
        "one": {"topic": "1", "options": ["a"], "answer": "a"},
        "text": {"topic": "1", "options": [["a"], "b"], "answer": "b"},
    }
    for name, row in rows.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        words = [*choices, f"--config.task.source=jsonl:{file}", "--config.task.template={topic}"]
        assert cli.main(["train", *words, "--workdir", str(tmp_path / "x")]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{file}:1: field 'options' is" in said, name
    words = [*choices, '--config.task.verbalizers={"a": " a", "b": " b"}']
    assert cli.main(["train", *words, "--workdir", str(tmp_path / "x")]) == 2
    assert "'task.candidates_field' is 'options'; allowed: ''" in capsys.readouterr().err
