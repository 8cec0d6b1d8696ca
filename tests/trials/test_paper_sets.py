"""A trial on sets of the paper in T5's form, selected and reported by generated answers."""

import json
from collections import defaultdict

import numpy as np
import pytest

from softprompt import cli
from softprompt.data.builtin_tasks import TASKS
from softprompt.evaluation.metrics import free_text, names_referent
from softprompt.methods.initializers import prompt_rows
from softprompt.results import read_result
from tests.data.released import jsonl, mock
from tests.own_task import give
from tests.tiny_t5 import write_complete_t5

__all__ = ["mock"]  # a fixture

NAMES = ["Ann", "Bo", "Tom"]


def multirc(number):
    answers = [
        {"text": f"{name} <b>!</b>", "idx": n, "label": (n + number) % 2}
        for n, name in enumerate(NAMES)
    ]
    question = {"question": f"Who {number}?", "idx": number, "answers": answers}
    return {"idx": number, "passage": {"text": "It is<br>old.", "questions": [question]}}


def record(number):
    text = "Ann met Bo and Tom.\n@highlight\nIt is old"
    spans = {"Ann": 0, "Bo": 8, "Tom": 15}
    entities = [{"start": at, "end": at + len(name) - 1} for name, at in spans.items()]
    right = [{"start": 0, "end": 0, "text": NAMES[(number + n) % 3]} for n in range(1 + number % 2)]
    query = {"idx": number, "query": f"@placeholder {number}", "answers": right}
    return {"idx": number, "passage": {"text": text, "entities": entities}, "qas": [query]}


def wsc(number):
    spans = {"span1_index": 0, "span1_text": "Ann", "span2_index": 2, "span2_text": "she"}
    row = {"idx": number, "text": f"Ann said she {number}", "target": spans}
    return row | {"label": number % 3 > 0}


@pytest.mark.matrix
def test_three_sets_are_trained_and_reported_as_the_paper_does(mock, tmp_path, capsys, monkeypatch):
    """Breaks when a set's words do not start the prompt, a metric is of ranked candidates, or
    another mean than SuperGLUE's selects."""
    made = {"multirc": multirc, "record": record, "wsc.fixed": wsc}
    mock({name: jsonl(*map(row, range(9))) for name, row in made.items()})
    write_complete_t5(tmp_path / "model")
    keys = {
        "model.name": tmp_path / "model",
        "model.dtype": "float32",
        "data.mixture": "multirc_dev,record_dev,wsc_dev",
        "task.form": "t5",
        "task.max_target": 8,
        "task.eos": True,
        "method.length": 12,
        "method.init": "labels",
        "method.common_text": "vocabulary",
        "optimizer.rate": 0.3,
        "train.steps": 2,
        "train.batch": 8,
        "eval.metric": "generated_task_score",
    }
    words = [f"--config.{key}={value}" for key, value in keys.items()]
    assert cli.main(["train", *words, "--workdir", str(tmp_path / "w")]) == 0
    metrics = read_result(tmp_path / "w")["metrics"]["test"]
    lines = (tmp_path / "w" / "predictions.jsonl").read_text().splitlines()
    by_task = defaultdict(list)
    for line in map(json.loads, lines):
        by_task[line["task"]].append(line)
    assert {name: len(found) for name, found in by_task.items()} == {
        "multirc_dev": 27,
        "record_dev": 9,
        "wsc_dev": 9,
    }
    found = by_task["record_dev"]
    scores = free_text([one["generated"] for one in found], [one["answers"] for one in found])
    assert metrics["record_dev/f1"] == pytest.approx(scores["f1"])
    right = [
        names_referent(one["predicted"], "Ann") == (number % 3 > 0)
        for number, one in enumerate(by_task["wsc_dev"])
    ]
    assert metrics["wsc_dev/generated_accuracy"] == pytest.approx(np.mean(right))
    assert metrics["multirc_dev/illegal"] == pytest.approx(
        np.mean([one["generated_label"] is None for one in by_task["multirc_dev"]])
    )
    each = [metrics[f"{name}/generated_task_score"] for name in by_task]
    assert metrics["generated_task_score"] == pytest.approx(np.mean(each))
    assert "accuracy" not in metrics and "multirc_dev/generated_group_match" in metrics
    words = len(TASKS["record"].words) + len(TASKS["wsc"].words)
    assert prompt_rows(str(tmp_path / "w" / "delta.safetensors"))[0].shape[0] == 12 > 2 + words
    capsys.readouterr()
    give(monkeypatch, "@placeholder 3\tAnn, Bo\tIt is old\n")
    run = ["predict", "--run", str(tmp_path / "w"), "--task", "record_dev", "--format", "json"]
    assert cli.main(run) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["answer"], str)
