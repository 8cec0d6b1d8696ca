"""Records: what is kept of a study's trials, and read without their folders."""

import json

import numpy as np
import pytest

from softprompt.config import resolve, to_dict
from softprompt.errors import UserError
from softprompt.trials.records import (
    collect,
    example_scores,
    label_nats,
    read_records,
    target_nats,
    vote,
    write_records,
)
from tests.own_task import make_config

LABELS = ["good", "bad", "good", "good", "bad", "good", "good", "good", "bad"]


def write_trial(folder, predicted, ids=None, status="done", labels=LABELS):
    """A finished trial's folder, as far as records read it."""
    folder.mkdir(parents=True)
    config = to_dict(resolve(make_config(folder, "model", task__name="own")))
    row = {"trial": folder.name, "status": status, "config": config, "metrics": {}}
    (folder / "result.json").write_text(json.dumps(row))
    lines = [
        {"id": name, "label": label, "predicted": answer}
        for name, label, answer in zip(ids or range(len(labels)), labels, predicted, strict=True)
    ]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_there_and_back(tmp_path):
    """Breaks when an example's bit is another's, padding bits are read as examples, or the majority
    is not that of the labels."""
    write_trial(tmp_path / "w" / "a", ["good"] * 9)
    write_trial(tmp_path / "w" / "b", LABELS)
    write_trial(tmp_path / "w" / "c", LABELS, status="failed")
    found = collect(tmp_path / "w")
    write_records(tmp_path / "records.jsonl", found[::-1])
    records = read_records(tmp_path / "records.jsonl")
    assert [row["trial"] for row in records] == ["a", "b", "c"]
    assert records == json.loads(json.dumps(found))
    assert "answers" not in records[2]
    scores = example_scores(records[:2], "own")
    assert scores.mean(axis=1) == pytest.approx([0, 1])
    right = [label == "good" for label in LABELS]
    np.testing.assert_allclose(scores[0], (np.array(right) - 6 / 9) / (1 - 6 / 9))


def test_only_equal_examples_are_compared(tmp_path):
    """Breaks when the order or the choice of the test examples is not looked at."""
    write_trial(tmp_path / "w" / "a", LABELS)
    write_trial(tmp_path / "w" / "b", LABELS, ids=[*range(1, len(LABELS)), 0])
    records = collect(tmp_path / "w")
    with pytest.raises(UserError, match="task 'own': trials were tested on different examples"):
        example_scores(records, "own")
    with pytest.raises(UserError, match=r"no answers to 'other'"):
        example_scores(records, "other")


def test_what_targets_cost(tmp_path):
    """Breaks when a trial's mean is over examples and not over tokens, or nats of other examples
    are compared."""
    costs = {"a": [(2.0, 1), (3.0, 4)], "b": [(1.0, 1), (1.0, 4)]}
    for name, pairs in costs.items():
        write_trial(tmp_path / "w" / name, ["good"] * 9)
        lines = [{"id": n, "nats": nats, "tokens": t} for n, (nats, t) in enumerate(pairs)]
        text = "".join(f"{json.dumps(line)}\n" for line in lines)
        (tmp_path / "w" / name / "predictions.jsonl").write_text(text)
    records = collect(tmp_path / "w")
    assert records[0]["answers"] == {}
    np.testing.assert_allclose(target_nats(records, "own").mean(1), [5 / 5, 2 / 5])
    (tmp_path / "w" / "b" / "predictions.jsonl").write_text(text.replace('"id": 0', '"id": 9'))
    records = collect(tmp_path / "w")
    with pytest.raises(UserError, match="'own': trials were tested on different examples"):
        target_nats(records, "own")


def test_what_the_right_label_costs(tmp_path):
    """Breaks when it is not normalised over the candidates, or is the predicted label's."""
    scores = [{"good": -1.0, "bad": -1.0}, {"good": -3.0, "bad": -1.0}]
    lines = [
        {"id": n, "label": "good", "predicted": "bad", "scores": one}
        for n, one in enumerate(scores)
    ]
    write_trial(tmp_path / "a", ["good"] * 9)
    file = tmp_path / "a" / "predictions.jsonl"
    with pytest.raises(UserError, match="no scores of 'own'"):
        label_nats(collect(tmp_path), "own")
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = label_nats(collect(tmp_path), "own")
    np.testing.assert_allclose(found, [[np.log(2), np.log(1 + np.exp(2))]], atol=0.005)


@pytest.mark.parametrize("text", ["{", "[]", '{"trial": "a"}'])
def test_a_line_that_is_no_record(tmp_path, text):
    (tmp_path / "r.jsonl").write_text(f"{text}\n")
    with pytest.raises(UserError, match=r"r\.jsonl: line 1 is not a record of a trial"):
        read_records(tmp_path / "r.jsonl")
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        read_records(tmp_path / "none.jsonl")


def test_a_vote_with_ties(tmp_path):
    """Breaks when a tie goes to the first label, to the last trial, or counts as wrong."""
    answers = {"a": "bbbb", "b": "bbgg", "c": "gggg", "d": "ggxg"}
    labels = ["good", "bad", "good", "bad"]
    names = {"b": "bad", "g": "good", "x": "extra"}
    for folder, letters in answers.items():
        write_trial(tmp_path / "w" / folder, [names[one] for one in letters], labels=labels)
    records = collect(tmp_path / "w")
    assert records[3]["answers"]["own"]["predicted"] == "bb?b"  # no example has the label "extra"
    # 2:2 goes to the first trial's "bad"; then 2 of 4 for "good", and 3 of 4 for it.
    np.testing.assert_allclose(vote(records, "own"), [[-1, 1, 1, -1]])


def test_a_curve(tmp_path):
    """Breaks when seconds are those of the last line alone, or another metric is taken."""
    write_trial(tmp_path / "a", LABELS)
    lines = [
        {"step": 0, "validation/accuracy": 0.5},
        {"step": 2, "seconds": 1.5},
        {"step": 4, "seconds": 2.0},
        {"step": 4, "validation/macro_f1": 0.1, "validation/accuracy": 0.75},
    ]
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (record,) = collect(tmp_path)
    assert record["curve"] == [[0, 0.0, 0.5], [4, 3.5, 0.75]]
