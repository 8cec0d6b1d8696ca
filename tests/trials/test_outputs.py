"""What an experiment returns, and the files that are written from it."""

import json
from pathlib import Path

import matplotlib
import pytest

from softprompt import results
from softprompt.errors import UserError
from softprompt.trials import outputs
from softprompt.trials.experiment import load_experiment, make_trials
from tests.trials.rows import config, done_row, experiment_rows

MINE = """
import pandas
from softprompt.analysis.plots import named_points
from softprompt.config import base_config

CAPTION = "mine"
sweep = lambda subset: [base_config()]
table = lambda rows: pandas.DataFrame({"n": [len(rows)]})
figure = lambda rows: named_points({}, xlabel="", ylabel="")
"""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("CAPTION = None", "CAPTION is None; allowed: a string"),
        ("table = 3", "table is 3; allowed: a function"),
        ("sweep = lambda subset: None", r"sweep\(\) returned None \(NoneType\); allowed: a list"),
        ("sweep = lambda subset: []", r"sweep\('full'\) returned no config; allowed: a list of"),
        (
            "sweep = lambda subset: [1]",
            r"sweep\('full'\) returned a list with 1 \(int\); allowed: a list of con",
        ),
        (
            "table = lambda rows: None",
            r"table\(\) returned None \(NoneType\); allowed: a DataFrame",
        ),
        ("figure = lambda rows: []", r"figure\(\) returned \[\] \(list\); allowed: a Figure"),
    ],
)
def test_what_an_experiment_returns_is_checked(tmp_path, monkeypatch, wrong, message):
    """Breaks when what it returns is taken as it is; when a wrong figure leaves a table behind."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"{MINE}\n{wrong}\n")
    with pytest.raises(UserError, match=f"{tmp_path}/mine.py: {message}"):
        mine = load_experiment("mine.py")
        make_trials(mine)
        outputs.write_outputs(mine, [], "out")
    assert not Path("out").exists()


def test_another_experiments_files_stand_beside_the_sweeps_own(tmp_path, monkeypatch):
    """Breaks when `table --experiment OTHER` overwrites the table of the sweep; when the caption
    says nothing of the rows, or of those that failed, or these reach the experiment's table."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        Path(f"{name}.py").write_text(MINE)
    mine, other = (load_experiment(f"{name}.py") for name in ("mine", "other"))
    with pytest.raises(UserError, match="no folder 'out'"):
        outputs.write_trial_outputs(mine, "out")
    failed = results.make_row(config(5), status="failed", error="no memory", seconds=1.0)
    results.write_result(Path("out/failed"), failed)
    with pytest.raises(UserError, match="no finished trial below 'out': 1 of 1 trials failed"):
        outputs.write_trial_outputs(mine, "out")
    results.write_result(Path("out/done"), done_row(config(20)))
    outputs.record_experiment(mine, "out")
    outputs.record_experiment(other, "out")
    assert outputs.write_trial_outputs(mine, "out")[0] == "table.md"
    before = Path("out/table.md").read_text()
    assert "|   1 |" in before
    assert "mine 1 trials of movie_sentiment, smollm2-135m-instruct-q4. 1 of 2 trials" in before
    assert "failed: prompt-5-vocabulary-s0 (no memory)." in before
    Path("out/table.md").write_text("")
    assert outputs.write_trial_outputs(other, "out")[-1] == "other-figure.pdf"
    assert Path("out/table.md").read_text() == ""
    assert Path("out/other-table.md").read_text() == before
    Path("out/sweep.json").write_text("[]")
    with pytest.raises(UserError, match="out/sweep.json: not readable"):
        outputs.write_trial_outputs(mine, "out")


@pytest.mark.parametrize("subset", ["full", "quickstart"])
def test_outputs_are_written_and_pure_functions_of_the_rows(tmp_path, subset):
    experiment, rows = load_experiment("prompt_length"), experiment_rows(subset)
    before = json.dumps(rows)
    table = experiment.table(rows)
    assert json.dumps(rows) == before
    assert table.equals(experiment.table(rows[::-1]))
    assert (table["chosen"] == "yes").sum() == 1
    assert table["method"].tolist()[:3] == ["zero-shot", "few-shot", "soft prompt"]
    outputs.write_outputs(experiment, rows, tmp_path)
    names = {"table.md", "table.csv", "table.tex", "figure.png", "figure.pdf"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert experiment.CAPTION in (tmp_path / "table.md").read_text()
    assert matplotlib.rcParams["axes.grid"] is False
