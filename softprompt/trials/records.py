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

from softprompt.analysis.comparisons import Scores
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.results import Row, read_trials
from softprompt.training.logs import FILE, read_log
from softprompt.trials.measure import PREDICTIONS, read_predictions

ANSWERS, CURVE = "answers", "curve"


def collect(folder: epath.PathLike) -> list[Row]:
    """Returns the rows of all trials in and below a folder; finished ones with their answers.

    `row["answers"]` has for each task: "examples", their number; "majority", the share of the most
    frequent label; "ids", a digest of the examples' ids in order; "right", a bit an example, 1 for
    a right label, in hex; "predicted", a letter an example, "a" for the first of the examples'
    sorted labels, "?" for one that no example has.
    `row["curve"]` has [step, seconds of training until then, value] for each validation of the
    metric that selects.

    Raises:
        UserError: the folder does not exist, or a row is unreadable.
    """
    return [row | _answers(place, row) | _curve(place, row) for place, row in read_trials(folder)]


def write_records(file: epath.PathLike, records: Sequence[Row]) -> None:
    """Writes records, one a line, in the order of their trials' ids."""
    ordered = sorted(records, key=lambda row: row["trial"])
    write_text(file, "".join(f"{json.dumps(row, sort_keys=True)}\n" for row in ordered))


def read_records(file: epath.PathLike) -> list[Row]:
    """Reads them.

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
        UserError: a trial has no answers to the task, or to other examples than the first.
    """
    found = []
    for record in records:
        answers = record.get(ANSWERS, {}).get(task)
        if answers is None:
            raise UserError(f"trial {record['name']} ({record['trial']}): no answers to {task!r}")
        found.append(answers)
    if len({(one["ids"], one["examples"]) for one in found}) > 1:
        raise UserError(f"task {task!r}: trials were tested on different examples")
    bits = [np.frombuffer(bytes.fromhex(one["right"]), np.uint8) for one in found]
    rows = [np.unpackbits(b, count=one["examples"]) for b, one in zip(bits, found, strict=True)]
    majority = found[0]["majority"]
    return (np.array(rows, float) - majority) / (1 - majority)


def vote(records: Sequence[Row], task: str) -> Scores:
    """The score of each test example by majority vote of trials, [1, examples].

    Of labels with equally many votes, the one wins that the earliest trial voted for: sort the
    trials by validation, the best first.

    Raises:
        UserError: see `example_scores`.
    """
    scores_ME = example_scores(records, task)
    chosen = []
    for votes in zip(*(one[ANSWERS][task]["predicted"] for one in records), strict=True):
        counts = Counter(votes)  # in the order of their first appearance, which `max` keeps
        chosen.append(votes.index(max(counts, key=lambda label: counts[label])))
    return scores_ME[chosen, np.arange(len(chosen))][None]


def _answers(folder: epath.Path, row: Row) -> dict[str, Any]:
    """The entry "answers" of a finished trial; {} without labels."""
    if row["status"] != "done" or not (folder / PREDICTIONS).exists():
        return {}
    by_task: dict[str, list[dict[str, Any]]] = {}
    for line in read_predictions(folder):
        if "label" in line and "predicted" in line:
            by_task.setdefault(line.get("task", row["config"]["task"]["name"]), []).append(line)
    return {ANSWERS: {task: _packed(lines) for task, lines in by_task.items()}}


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
    ids = "\n".join(str(line["id"]) for line in lines)
    right = np.array([line["label"] == line["predicted"] for line in lines])
    return {
        "examples": len(lines),
        "majority": max(Counter(line["label"] for line in lines).values()) / len(lines),
        "ids": hashlib.sha256(ids.encode()).hexdigest()[:16],
        "right": np.packbits(right).tobytes().hex(),
        "predicted": "".join(letters.get(line["predicted"], "?") for line in lines),
    }
