"""The report: it follows from records alone, and says what was not run."""

import json
import re

import pytest

from experiments.paper import coverage, everything, figure1, report, study
from softprompt.config import trial_id
from softprompt.trials.outputs import experiment_name
from softprompt.trials.records import read_records
from tests.own_task import REPOSITORY
from tests.paper.test_artefacts import LONGER, lengths
from tests.paper.test_figure1 import simulated


def test_the_report_is_a_function_of_the_records(tmp_path):
    """Breaks when a date, a random id or an outside asset is in it, or a part is left out."""
    records = [*simulated(), *lengths(LONGER)]
    for name in ("a", "b"):
        report.write(records if name == "a" else records[::-1], tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.*"))
    drawn = (
        "figure1",
        "figure3_length",
        "figure3_start",
        "parameters",
        "table1",
        "table5",
        "table7",
    )
    assert [str(file) for file in files] == [
        *(f"figures/{name}.svg" for name in drawn),
        "report.html",
        "report.md",
    ]
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    page = (tmp_path / "a" / "report.html").read_text()
    assert page.count("<svg") == len(drawn)
    assert not re.search(r'(src|href)="?(https?:|//)', page.replace('xlink:href="#', ""))
    text = (tmp_path / "a" / "report.md").read_text()
    assert re.search(r"6 hold, 0 refuted, 1 undecided, \d+ not run", text)
    for artefact in report.ARTEFACTS:
        assert f"## {report.title(artefact)}" in text
        assert report.section(artefact, "Question"), artefact
    assert "How should a prompt start?\n\n**Question.**" in text.replace("Figure 3b: h", "H")


def test_the_docs_have_the_committed_numbers(tmp_path):
    """Breaks when records are replaced and the page of the report is not, or they are large."""
    assert sum(file.stat().st_size for file in report.RESULTS.rglob("*.*")) < 3e6
    report.write(read_records(report.RECORDS), tmp_path, report.read_rungs(), page=False)
    assert (tmp_path / "report.md").read_text() == (report.DOCS / "report.md").read_text()
    figures = [sorted(p.name for p in one.glob("figures/*")) for one in (tmp_path, report.DOCS)]
    assert figures[0] == figures[1]


def test_the_readme_has_the_committed_verdicts():
    """Breaks when records are replaced and the README keeps the numbers of others."""
    readme = " ".join((REPOSITORY / "README.md").read_text().split())
    table = everything.table(read_records(report.RECORDS))
    held = table[table["verdict"] == "holds"]
    counts = table["verdict"].value_counts().to_dict()
    assert counts.keys() == {"holds", "refuted", "undecided"}  # else more has to be said
    some = f"Of {len(table)} predictions {len(held)} hold, {counts['refuted']} are refuted"
    assert f"{some} and {counts['undecided']} are undecided." in readme
    numbers = readme.replace(" %", "")
    assert [number for number in held["here (95 %)"] if number not in numbers] == []


def test_what_is_said_of_the_gap_is_what_was_found():
    """Breaks when the slope of all models stands without that of the ladder alone."""
    gap = figure1.gaps(read_records(report.RECORDS))
    largest = gap.pop(study.SMOLLM2)
    slope = figure1.size_slope(gap)
    for page in ("README.md", "docs/study.md"):
        text = " ".join((REPOSITORY / page).read_text().split())
        for found in (largest, slope):
            assert f"{found.value:.1f}" in text
            assert f"{found.low:.1f} to {found.high:.1f}" in text


def test_without_trials(tmp_path, capsys):
    """Breaks when a study that has not begun is an error, or a missing folder none."""
    report.write([], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert f"0 of {coverage.whole_study([])[1]} trials" in text
    assert text.count("\n\nNot run.") == len(everything.ARTEFACTS)
    assert report.main(["--workdir", str(tmp_path / "none"), "--to", str(tmp_path)]) == 2
    assert "no folder" in capsys.readouterr().err


@pytest.mark.parametrize("artefact", report.ARTEFACTS, ids=experiment_name)
def test_an_artefact_says_what_it_asks(artefact):
    """Breaks when its docstring lacks a part that the report and the reader look for."""
    for word in ("Question", "Prediction"):
        assert report.section(artefact, word).endswith((".", "?"))


def test_every_trial_of_an_artefact_is_swept_once():
    """Breaks when an artefact's trials are left out, or a shared trial runs twice."""
    found = []
    for config in everything.sweep():
        config.model.dtype = "float32"
        found.append(trial_id(config))
    assert len(set(found)) == len(found)
    for artefact in everything.SWEPT:
        for config in artefact.sweep():
            config.model.dtype = "float32"
            assert trial_id(config) in found
    table = everything.table([*simulated(), *lengths(LONGER)])
    verdicts = table.groupby("artefact", sort=False)["verdict"].agg(list)
    assert list(verdicts.index) == [experiment_name(one) for one in everything.ARTEFACTS]
    assert verdicts["figure1"] == ["holds"] * 3 + ["not run"] * 3
    assert verdicts["figure3_length"] == ["holds"] * 2
    assert verdicts["steps"] == ["not run"]


def test_equal_trials_count_once():
    """Breaks when a trial in two dtypes, or with and without other tests, is two seeds."""
    rows = simulated()
    again = [json.loads(json.dumps(row)) for row in rows]
    for row in again:
        row["config"]["model"]["dtype"] = "bfloat16"
        row["config"]["eval"]["transfer"] = ""
        row["answers"] = {}
    assert study.own([*rows, *again], figure1.sweep()) == study.own(rows, figure1.sweep())
    for row in again:
        row["trial"] = f"0{row['trial']}"
        row["answers"] = {study.TASK: {}}
    both = [*rows, *again]
    assert study.own(both, figure1.sweep()) == study.own(both[::-1], figure1.sweep())
