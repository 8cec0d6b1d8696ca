"""The commands sweep and table, on a tiny random model and an experiment of two trials."""

from pathlib import Path

import pytest

from softprompt import cli, results
from tests.own_task import words, write_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("sweep"))


EXPERIMENT = '''
"""A prompt against none."""
from softprompt.analysis.plots import length_plot
from softprompt.analysis.tables import summarise
from softprompt.config import base_config

CAPTION = "A prompt against none."


def sweep(subset="full"):
    zero, prompt = base_config(), base_config()
    zero.method.name = "none"
    return [zero, prompt]


def table(rows):
    return summarise(rows, {"trial": lambda row: row["name"]})


def figure(rows):
    return length_plot({}, {}, xlabel="", ylabel="")
'''


def test_sweep_then_table(place, tiny_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/two.py").write_text(EXPERIMENT)
    sweep = ["sweep", "two", "--workdir", "out", *words(place, tiny_folder)]
    assert cli.main([*sweep, "--dry-run"]) == 0
    assert "2 to run" in capsys.readouterr().out
    assert not Path("out").exists()
    assert cli.main([*sweep, "--shard", "1/2"]) == 0
    assert len(results.read_rows("out")) == 1
    assert cli.main(sweep) == 0
    written = capsys.readouterr()
    assert "1 of 2 trials are done already" in written.err
    assert "prompt-3-vocabulary-mine-s0" in written.out
    assert "prompt-3-vocabulary-mine-s0: test accuracy 0." in written.err
    names = {file.name for file in Path("out").iterdir() if file.is_file()}
    outputs = {"table.md", "table.csv", "table.tex", "figure.png", "figure.pdf"}
    assert names == outputs | {"sweep.json"}
    first = Path("out/table.csv").read_text()
    Path("out/table.csv").unlink()
    assert cli.main(["table", "out", "--experiment", "two"]) == 0
    assert Path("out/table.csv").read_text() == first
    capsys.readouterr()
    assert cli.main(["table", "out"]) == 0
    assert "method.name" in capsys.readouterr().out.splitlines()[0]


def test_a_sweep_with_a_failed_trial_ends_with_one(
    place, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("two.py").write_text(EXPERIMENT)
    given = words(place, tiny_folder, task__source="jsonl:nowhere/{split}.jsonl")
    assert cli.main(["sweep", "two.py", "--workdir", "out", *given]) == 1
    written = capsys.readouterr().err
    assert "2 of 2 trials failed; the same command tries them again" in written
    assert "prompt-3-vocabulary-mine-s0 failed: " in written
    assert all(row["status"] == "failed" for row in results.read_rows("out"))
    assert not Path("out/table.md").exists()
    assert cli.main(["sweep", "two.py", "--workdir", "out", *given, "--dry-run"]) == 1
    assert capsys.readouterr().out.count("fails: cannot read nowhere/") == 2
    assert cli.main(["table", "out", "--experiment", "two.py"]) == 2
    assert "error: no finished trial below 'out': 2 of 2 trials failed: " in capsys.readouterr().err
