"""Every artefact says what was found, and that is what the committed records say."""

import re
import textwrap

import pytest

from experiments.paper import everything, report, study
from softprompt.analysis.comparisons import VERDICTS
from softprompt.trials.outputs import experiment_name
from softprompt.trials.records import read_records

COUNTS = re.compile(rf"\d+ (?:{'|'.join(VERDICTS)})(?:, \d+ (?:{'|'.join(VERDICTS)}))*")


@pytest.fixture(scope="module")
def records():
    return read_records(report.RECORDS)


def counts(found):
    """How many predictions have each verdict, such as "1 holds, 2 undecided"."""
    verdicts = [one.verdict for one in found]
    return ", ".join(f"{verdicts.count(one)} {one}" for one in VERDICTS if one in verdicts)


def paragraph(found):
    """What a docstring could say of an artefact's findings."""
    parts = [counts(found)]
    for verdict in VERDICTS:
        claims = [
            f"{one.claim}: {study.shown(one.found)}" if one.found else one.claim
            for one in found
            if one.verdict == verdict
        ]
        parts += [f"{verdict.capitalize()}: {'; '.join(claims)}"] if claims else []
    text = "".join(f"{part}. " for part in parts).strip()
    return textwrap.fill(f"Found: {text}", 100, break_on_hyphens=False)


@pytest.mark.parametrize("artefact", everything.ARTEFACTS, ids=experiment_name)
def test_a_docstring_says_what_the_records_say(artefact, records):
    """Breaks when records are replaced and a docstring keeps the verdicts or numbers of others.

    The message has a paragraph that would do; sentences that explain it are kept by hand.
    """
    found = artefact.findings(records)
    told = report.section(artefact, "Found")
    stated = COUNTS.match(told)
    missing = [one for f in found if (one := study.shown(f.found)) not in told]
    if not stated or stated[0] != counts(found) or missing:
        name = experiment_name(artefact)
        lines = f"{name}.py: its docstring lacks {missing or counts(found)}; paste and explain:"
        pytest.fail(f"{lines}\n\n{paragraph(found)}\n", pytrace=False)


def test_what_is_missing_is_told(records, monkeypatch):
    """Breaks when a docstring with another count passes, or the message has not the text."""
    artefact = everything.ARTEFACTS[0]
    found = artefact.findings(records)
    text = artefact.__doc__.replace(f"Found: {counts(found)}", "Found: 99 holds")
    monkeypatch.setattr(artefact, "__doc__", text)
    with pytest.raises(pytest.fail.Exception) as failed:
        test_a_docstring_says_what_the_records_say(artefact, records)
    assert paragraph(found) in str(failed.value)
