"""Result rows and the files that they are in."""

import json
import resource
import sys

import pytest

from softprompt import files, results
from softprompt.analysis import tables
from softprompt.config import to_dict, trial_name
from softprompt.errors import UserError
from softprompt.trials.experiment import load_experiment
from tests.trials.rows import Runner, config, done_row, run


def test_rows_go_in_and_come_out(tmp_path):
    row = done_row(config(5), accuracy=float("nan"))
    results.write_result(tmp_path / "a" / "b", row)
    (found,) = results.read_rows(tmp_path)
    assert found["metrics"]["test"]["accuracy"] is None
    found["metrics"] = row["metrics"] = {}
    assert found == row
    assert found["name"] == trial_name(config(5)) == "prompt-5-vocabulary-s0"
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["devices"]["platform"] == "cpu"
    assert [file.name for file in (tmp_path / "a" / "b").iterdir()] == ["result.json"]
    frame = results.to_frame([row])
    assert frame["config.method.length"].tolist() == [5]


def test_unreadable_rows_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        results.read_rows(tmp_path / "nowhere")
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="result.json: not JSON"):
        results.read_rows(tmp_path)
    (tmp_path / "result.json").write_text("[]")
    with pytest.raises(UserError, match="result.json: not a result row"):
        results.read_rows(tmp_path)


def test_trials_below_a_trial_are_found(tmp_path):
    """Breaks when the search stops at a folder that holds a row, or looks into checkpoints."""
    lengths = {"": 1, "a": 5, "a/checkpoints/1": 2, "b": 20}
    for place, length in lengths.items():
        results.write_result(tmp_path / place, done_row(config(length)))
    found = [row["config"]["method"]["length"] for row in results.read_rows(tmp_path)]
    assert found == [1, 5, 20]


def test_a_row_without_metrics_is_read(tmp_path):
    """Breaks when what an older version's row lacks is left out, or null metrics stay None."""
    for name, more in (("a", {}), ("b", {"metrics": None})):
        (tmp_path / name).mkdir()
        row = {"trial": name, "status": "done", "config": to_dict(config(5)), **more}
        (tmp_path / name / "result.json").write_text(json.dumps(row))
    rows = results.read_rows(tmp_path)
    assert [(row["name"], row["metrics"], row["steps"]) for row in rows] == [
        ("a", {}, None),
        ("b", {}, None),
    ]
    overview = tables.overview(rows)
    assert list(overview["id"]) == ["a", "b"]
    (line,) = tables.summarise(rows, {"method": lambda row: "prompt"}).to_dict("records")
    assert (line["seeds"], line["test accuracy"], line["low"]) == (2, None, None)
    experiment = load_experiment("prompt_length")
    assert experiment.table(rows)["test accuracy"].tolist() == [None]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"config": 3}, "config is 3"),
        ({"metrics": [1]}, r"metrics is \[1\]"),
        ({"metrics": {"test": 0.8}}, "metrics.test is 0.8"),
    ],
)
def test_a_part_of_a_row_that_is_no_object_is_named(tmp_path, broken, message):
    """Breaks when read_result looks at the keys alone."""
    row = {"trial": "a", "status": "done", "config": {}, **broken}
    (tmp_path / "result.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match=f"result.json: {message}; allowed: a JSON object"):
        results.read_rows(tmp_path)


def test_a_write_that_stops_half_way_leaves_the_old_file(tmp_path):
    """Breaks when write_bytes writes the file itself rather than a temporary one."""
    file = tmp_path / "result.json"
    files.write_text(file, "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match=f"cannot write {file}: File too large"):
            files.write_text(file, "new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_where_nothing_can_be_written(tmp_path, monkeypatch):
    """Before anything is loaded. Mutations: a file is a folder; the parent is not looked at; the
    folder is made."""
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        message = f"{place}: {tmp_path / 'file'} is not a folder; give another --workdir"
        with pytest.raises(UserError, match=message):
            run([config(1)], place, Runner())
        with pytest.raises(UserError, match=f"cannot write {place}/x: "):
            files.write_text(place / "x", "")
    files.check_writable(tmp_path / "new" / "folder")
    assert [child.name for child in tmp_path.iterdir()] == ["file"]
    monkeypatch.setattr(results.os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"{tmp_path} may not be written to; give another --work"):
        files.check_writable(tmp_path / "new")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    files.check_writable("gs://bucket/folder")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="gs://bucket/folder needs gcsfs"):
        files.check_writable("gs://bucket/folder")
