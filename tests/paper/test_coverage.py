"""What the report says of trials that have not run, of deviations and of the paper's errata."""

import pytest

from experiments.paper import (
    continual,
    coverage,
    deviations,
    errata,
    everything,
    figure1,
    figure3_length,
    report,
    section7,
    study,
    style,
    table1,
    table5,
)
from softprompt.trials.outputs import experiment_name
from softprompt.trials.records import read_records
from tests.paper.simulated import record
from tests.paper.test_artefacts import LARGE, LONGER, lengths
from tests.paper.test_figure1 import simulated
from tests.paper.test_language import style_trials


def later_tasks():
    """Trials of `continual` on later tasks, of which one ran twice and one is of another study."""
    folders = [f"runs/continual/s{n}/{task}/start" for n in (0, 1) for task in continual.LATER]
    folders += [folders[0], "runs/other/s0/sarcasm/start"]
    return [record(one, "full", int(one.split("/s")[1][0]), 0.9) for one in folders]


def test_what_has_run():
    """Breaks when a trial counts twice, one that was not measured counts, or a command's do not."""
    rows = [*simulated(), *lengths(LONGER), *later_tasks()]
    ran = {figure1: 18, table1: 6, section7: 0, figure3_length: 9, table5: 9, continual: 4}
    covered = {one: coverage.cover(one, rows) for one in ran}
    assert {one: len(found.done) for one, found in covered.items()} == ran
    counts = [6, len(section7.configs()), 9]
    assert [covered[one].count for one in (table1, section7, continual)] == counts
    whole = len(everything.sweep()) + 6
    assert report.summary(rows, {}).startswith(f"28 of {whole} trials of the whole study")
    (line,) = coverage.not_run([covered[figure1], covered[table1]]).to_dict("records")
    assert (line["artefact"], line["not run"]) == ("figure1", len(figure1.sweep()) - 18)
    assert "60 question_type" in line["tasks"] and "26 d1" in line["models"]


def test_continuations_that_were_not_judged():
    """Breaks when the prompts alone count for `style`, whose command comes after its sweep."""
    rows = style_trials(dict.fromkeys(style.KINDS, {"verses": 60}))
    assert coverage.not_run([coverage.cover(style, rows)]).empty
    without = [{key: row[key] for key in row if key != "style"} for row in rows]
    (line,) = coverage.not_run([coverage.cover(style, without)]).to_dict("records")
    assert line["not run"] == line["trials"] == 7


def test_test_examples_are_those_of_an_artefact():
    """Breaks when Figure 1 counts other domains, or Table 1 does not."""
    found = [coverage.example_counts(coverage.cover(one, simulated())) for one in (figure1, table1)]
    assert found == [{study.TASK: 1000}, dict.fromkeys(table1.TASKS, 1000)]


def test_verdicts_have_a_plural():
    """Breaks when one prediction "hold" or several "holds"."""
    found = figure1.findings(simulated())
    for count, told in ((3, "3 hold, 0 refuted"), (1, "1 holds, 0 refuted")):
        assert report.verdict_counts({figure1: found[:count]}).startswith(told)


@pytest.mark.parametrize("artefact", report.ARTEFACTS, ids=experiment_name)
def test_an_artefact_says_what_differs(artefact):
    """Breaks when its deviations from the paper are missing."""
    assert deviations.BY_ARTEFACT[artefact].endswith(".")
    if LARGE in {config.model.name for config in coverage.cover(artefact, []).planned}:
        assert any(word in deviations.BY_ARTEFACT[artefact] for word in ("SmolLM2", "decoder"))


def test_what_is_said_of_dropout_and_optimizers_is_so():
    """Breaks when trials that are committed differ from what the report says of all of them."""
    for row in read_records(report.RECORDS):
        config = row["config"]
        assert config["train"]["dropout"] == config["method"]["dropout"] == 0, row["name"]
        assert config["optimizer"]["name"] == "adamw"


def test_errata():
    """Breaks when a number of Table 4 is not that of the definition, or an erratum is left out."""
    table = errata.table()
    assert table["printed"].tolist()[:3] == ["10,420", "0.01907 %", "11,137,380,352"]
    assert table["instead"].tolist()[:3] == ["10,240", "0.01307 %", "11,135,537,152"]
    assert len(table) == 6


def test_a_finding_says_how_many_examples_it_has():
    """Breaks when a finding without test examples shows some, or one with them none."""
    geometry = dict.fromkeys(section7.NUMBERS, 0.975) | {"labels": 2, "nearest": []}
    rows = [row | {"geometry": geometry} for row in simulated()]
    (line,) = study.finding_table(section7.findings(rows)).to_dict("records")
    assert line["here (95 %)"].startswith("97.5 (") and line["test examples"] is None
    (line, _) = study.finding_table(figure3_length.findings(lengths(LONGER))).to_dict("records")
    assert line["test examples"] == 1000 and line["verdict"] == "holds"


def test_the_report_says_where_numbers_are_from():
    """Breaks when versions, devices, commits or a model's run are left out."""
    row = simulated()[0] | {
        "commit": "171fac96b6f0",
        "versions": {"jax": "0.12", "python": "3.13"},
        "devices": {"count": 1, "kind": "cpu", "host_cores": 2},
    }
    text = "\n".join(markdown for markdown, _ in report.provenance([row, *simulated()[1:]]))
    assert "Python 3.13, jax 0.12. Devices: 1 cpu of 2 cores." in text
    assert "| 171fac9 |       1 | 21d8e37 |" in text
    (first, *_) = report.models(report.read_rungs()).to_dict("records")
    assert first["commit"] == "96ab5a5" and float(first["minutes"]) > 1
