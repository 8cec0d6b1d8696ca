"""Records: result rows with what each test example scored, small enough to keep in a repository.

A study reads its trials' folders once and keeps the records. Tables, figures and verdicts follow
from them, on any machine and without a model.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from scipy import special

from softprompt.analysis.comparisons import Scores
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.results import Row, read_trials
from softprompt.training.logs import FILE, read_log
from softprompt.trials.measure import PREDICTIONS, read_predictions

ANSWERS, TARGETS, CURVE = "answers", "targets", "curve"


def collect(folder: epath.PathLike) -> list[Row]:
    """Returns the rows of all trials in and below a folder; finished ones with their answers.

    `row["answers"]` has for each task: "examples", their number; "majority", the share of the most
    frequent label; "ids", a digest of the examples' ids in order; "right", one bit per example, 1
    for a right label, in hex; "predicted", one letter per example, "a" for the first of the
    examples' sorted labels, "?" for one that no example has; and where candidates were scored
    "label_centinats", the cross-entropy of each right label among the candidates, in 1/100 nats.
    `row["targets"]` has for each task whose targets' probabilities were measured: "ids" as above;
    "nats" and "tokens", of each example's target.
    `row["curve"]` has [step, seconds of training until then, value] for each validation of the
    metric that selects.

    Raises:
        UserError: the folder does not exist, or a row is unreadable.
    """
    return [row | _predictions(path, row) | _curve(path, row) for path, row in read_trials(folder)]


def write_records(file: epath.PathLike, records: Sequence[Row]) -> None:
    """Writes records, one per line, in the order of their trials' ids."""
    ordered = sorted(records, key=lambda row: row["trial"])
    write_text(file, "".join(f"{json.dumps(row, sort_keys=True)}\n" for row in ordered))


def read_records(file: epath.PathLike) -> list[Row]:
    """Reads the records of a file that `write_records` wrote.

    Raises:
        UserError: no such file, or a line is not a record.
    """
    path = epath.Path(file)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            assert {"trial", "status", "config", "metrics"} <= record.keys()
        except (ValueError, AttributeError, AssertionError) as error:
            raise UserError(f"{path}: line {number} is not a record of a trial") from error
        records.append(record)
    return records


def example_scores(records: Sequence[Row], task: str) -> Scores:
    """The score of each test example of a task in each trial, [trials, examples].

    A score's mean is 0 for a trial that always answers the most frequent label, and 1 for one that
    is always right: (accuracy - majority) / (1 - majority).

    Raises:
        UserError: a trial has no answers to the task, or other examples than the first trial.
    """
    found = _of_task(records, ANSWERS, task)
    bits = [np.frombuffer(bytes.fromhex(one["right"]), np.uint8) for one in found]
    rows = [np.unpackbits(b, count=one["examples"]) for b, one in zip(bits, found, strict=True)]
    majority = found[0]["majority"]
    return (np.array(rows, float) - majority) / (1 - majority)


def label_nats(records: Sequence[Row], task: str) -> Scores:
    """The cross-entropy of each test example's right label, in nats, [trials, examples].

    Raises:
        UserError: see `example_scores`; or a trial scored no candidates.
    """
    found = _of_task(records, ANSWERS, task)
    for record, one in zip(records, found, strict=True):
        if "label_centinats" not in one:
            raise UserError(f"trial {record['name']} ({record['trial']}): no scores of {task!r}")
    return np.array([one["label_centinats"] for one in found]) / 100


def target_nats(records: Sequence[Row], task: str) -> Scores:
    """The nats that each test example's target costs in each trial, [trials, examples].

    Each is divided by the mean length of the targets, so a trial's mean is its nats per token.

    Raises:
        UserError: a trial has no targets of the task, or other examples than the first trial.
    """
    found = _of_task(records, TARGETS, task)
    lengths = np.array([one["tokens"] for one in found], float)
    return np.array([one["nats"] for one in found]) / lengths.mean(1, keepdims=True)


def vote(records: Sequence[Row], task: str) -> Scores:
    """The score of each test example by majority vote of trials, [1, examples].

    A tie goes to the label that the earliest trial voted for, so sort the trials by validation
    score, best first.

    Raises:
        UserError: see `example_scores`.
    """
    scores_ME = example_scores(records, task)
    chosen = []
    for votes in zip(*(one[ANSWERS][task]["predicted"] for one in records), strict=True):
        counts = Counter(votes)  # in the order of their first appearance, which `max` keeps
        chosen.append(votes.index(max(counts, key=lambda label: counts[label])))
    return scores_ME[chosen, np.arange(len(chosen))][None]


def _of_task(records: Sequence[Row], part: str, task: str) -> list[dict[str, Any]]:
    """The entry of a task in each record's `part`; all are about the same examples.

    Raises:
        UserError: a trial has none, or other examples than the first trial.
    """
    found = []
    for record in records:
        one = record.get(part, {}).get(task)
        if one is None:
            raise UserError(f"trial {record['name']} ({record['trial']}): no {part} to {task!r}")
        found.append(one)
    if len({(one["ids"], one.get("examples")) for one in found}) > 1:
        raise UserError(f"task {task!r}: trials were tested on different examples")
    return found


def _predictions(folder: epath.Path, row: Row) -> dict[str, Any]:
    """The entries "answers" and "targets" of a finished trial, where it has some."""
    if row["status"] != "done" or not (folder / PREDICTIONS).exists():
        return {}
    labelled: dict[str, list[dict[str, Any]]] = {}
    measured: dict[str, list[dict[str, Any]]] = {}
    for line in read_predictions(folder):
        task = line.get("task", row["config"]["task"]["name"])
        if "label" in line and "predicted" in line:
            labelled.setdefault(task, []).append(line)
        if "nats" in line:
            measured.setdefault(task, []).append(line)
    targets = {task: _target_costs(lines) for task, lines in measured.items()}
    found = {ANSWERS: {task: _packed(lines) for task, lines in labelled.items()}}
    return found | ({TARGETS: targets} if targets else {})


def _curve(folder: epath.Path, row: Row) -> dict[str, Any]:
    """The entry "curve" of a finished trial that was trained."""
    if row["status"] != "done" or not (folder / FILE).exists():
        return {}
    seconds, curve = 0.0, []
    metric = f"validation/{row['config']['eval']['metric']}"
    for line in read_log(folder):
        seconds += line.get("seconds", 0.0)
        if metric in line:
            curve.append([line["step"], round(seconds, 2), line[metric]])
    return {CURVE: curve}


def _packed(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    labels = sorted({line["label"] for line in lines})
    letters = {label: chr(ord("a") + n) for n, label in enumerate(labels)}
    right = np.array([line["label"] == line["predicted"] for line in lines])
    packed = {
        "examples": len(lines),
        "majority": max(Counter(line["label"] for line in lines).values()) / len(lines),
        "ids": _ids_digest(lines),
        "right": np.packbits(right).tobytes().hex(),
        "predicted": "".join(letters.get(line["predicted"], "?") for line in lines),
    }
    if all(line["label"] in line.get("scores", {}) for line in lines):
        costs = [
            special.logsumexp(list(line["scores"].values())) - line["scores"][line["label"]]
            for line in lines
        ]
        packed["label_centinats"] = [round(100 * float(cost)) for cost in costs]
    return packed


def _target_costs(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    numbers = {name: [line[name] for line in lines] for name in ("nats", "tokens")}
    return {"ids": _ids_digest(lines)} | numbers


def _ids_digest(lines: Sequence[dict[str, Any]]) -> str:
    """16 hex digits of the examples' ids, in order."""
    ids = "\n".join(str(line["id"]) for line in lines)
    return hashlib.sha256(ids.encode()).hexdigest()[:16]
