"""The report of the study: every artefact with its question, figure, table and verdicts.

Command:
    python -m experiments.paper.report                             (the committed records)
    python -m experiments.paper.report --workdir runs/paper        (the trials below a folder)
    python -m experiments.paper.report --workdir runs/paper --keep (the same, and commit them)

Writes report.md with figures beside it, and report.html, one file without outside assets. Both
follow from the records alone; with --workdir, prompts are measured for them, which loads the model.
"""

import argparse
import io
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pandas as pd

from experiments.paper import (
    coverage,
    deviations,
    errata,
    everything,
    figure2,
    parameters,
    parts,
    scale_t5,
    section7,
    study,
    style,
    table7,
)
from softprompt.analysis.comparisons import VERDICTS
from softprompt.console import Progress, duration
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.pretraining import ladder
from softprompt.results import Row, read_trials
from softprompt.trials.outputs import experiment_name
from softprompt.trials.records import collect, read_records, write_records
from softprompt.trials.run import DELTA
from softprompt.trials.session import Session

ARTEFACTS: tuple[ModuleType, ...] = (*everything.ARTEFACTS, parameters, table7)
RESULTS = Path(__file__).parent / "results"
RECORDS, PROMPTS, LADDER = RESULTS / "records.jsonl", RESULTS / "prompts", RESULTS / "ladder.json"
DOCS = Path(__file__).parents[2] / "docs" / "study"

TITLE = "Prompt tuning at the scale of a laptop"
# Commits that the history has under another name since it was rewritten; see experiments/LOG.md.
REWRITTEN = {"5b2311d": "1754a60", "171fac9": "21d8e37"}
# The plural of a verdict, where it is another word.
PLURAL = {"holds": "hold"}

Findings = Mapping[ModuleType, Sequence[study.Finding]]


def section(artefact: ModuleType, name: str) -> str:
    """A paragraph of an artefact's docstring, such as its "Question", on one line; "" for none."""
    found = re.search(rf"^{name}[^:\n]*: (.*?)(?:\n\n|\Z)", artefact.__doc__ or "", re.M | re.S)
    text = " ".join(found[1].split()) if found else ""
    return text[:1].upper() + text[1:]


def command(artefact: ModuleType) -> str:
    """The commands of an artefact's docstring, a line each."""
    found = re.search(r"^Command:\n((?: {4}.+\n)+)", artefact.__doc__ or "", re.M)
    return textwrap.dedent(found[1]).rstrip() if found else ""


def title(artefact: ModuleType) -> str:
    """The first line of its docstring."""
    return (artefact.__doc__ or "").splitlines()[0]


def findings(artefact: ModuleType, records: Sequence[Row]) -> list[study.Finding]:
    """Its findings; [] for one that makes no prediction about trials."""
    return artefact.findings(records) if hasattr(artefact, "findings") else []


def summary(records: Sequence[Row], found: Findings) -> str:
    """How many trials there are, what they took, and what the verdicts are."""
    done = study.select(records)
    ran, whole = coverage.whole_study(records)
    return (
        f"{ran} of {whole} trials of the whole study; {len(done)} records, "
        f"{duration(spent(done))} in all. Predictions: {verdict_counts(found)}."
    )


def verdict_counts(found: Findings) -> str:
    """How many predictions have each verdict, as text."""
    each = [one.verdict for some in found.values() for one in some]
    counts = {word: each.count(word) for word in VERDICTS}
    told = (f"{n} {word if n == 1 else PLURAL.get(word, word)}" for word, n in counts.items())
    return ", ".join(told)


def spent(trials: Sequence[Row]) -> float:
    """The seconds that trials took."""
    return float(sum(row.get("seconds") or 0 for row in trials))


def trials_of(covered: coverage.Coverage) -> str:
    """How many of an artefact's trials have run, what they took, and what they were tested on."""
    if not covered.count:
        return "None."
    examples = coverage.example_counts(covered).items()
    tested = ", ".join(f"{n:,} of {task}" for task, n in examples)
    took = duration(spent(covered.done))
    said = f"{len(covered.done)} of {covered.count} have run, {took} in all"
    return f"{said}; test examples: {tested}." if tested else f"{said}."


def svg(artefact: ModuleType, records: Sequence[Row]) -> str:
    """Its figure; equal records give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": experiment_name(artefact), "svg.fonttype": "path"}):
        figure = artefact.figure(records)
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def part(
    covered: coverage.Coverage,
    found: Sequence[study.Finding],
    records: Sequence[Row],
    folder: Path,
) -> list[parts.Part]:
    """An artefact's part of the report; its figure is also a file in the folder."""
    artefact = covered.artefact
    table = artefact.table(records)
    made = [parts.heading(title(artefact))]
    for word in ("Question", "Prediction"):
        made += [parts.paragraph(text, word)] if (text := section(artefact, word)) else []
    made.append(parts.paragraph(deviations.BY_ARTEFACT[artefact], "Deviations from the paper"))
    made.append(parts.paragraph(trials_of(covered), "Trials"))
    made.append(parts.commands(command(artefact).splitlines()))
    made += [parts.table(one) for one in (study.finding_table(found), table) if len(one)]
    if not len(table):
        return [*made, parts.paragraph("Not run.")]
    file, drawn = f"figures/{experiment_name(artefact)}.svg", svg(artefact, records)
    write_text(folder / file, drawn)
    return [*made, parts.picture(title(artefact), file, drawn), parts.paragraph(artefact.CAPTION)]


def verdicts(found: Findings) -> list[parts.Part]:
    """All predictions with their verdicts; a phone shows the first three columns."""
    columns = ["verdict", "prediction", "here (95 %)", "artefact"]
    table = everything.verdict_table({one: some for one, some in found.items() if some})[columns]
    return [parts.heading("Verdicts"), parts.table(table), parts.paragraph(study.VERDICT_CAPTION)]


def not_run(covered: Sequence[coverage.Coverage]) -> list[parts.Part]:
    """What has not been run."""
    made = [parts.heading("What has not been run")]
    if len(table := coverage.not_run(covered)):
        made.append(parts.table(table))
    note = (
        "A trial that several artefacts read counts in each. `scale_t5` is the paper's own "
        "setting, beside the study. Models with 6 or 12 of SmolLM2's layers were not made."
    )
    return [*made, parts.paragraph(note)]


def models(rungs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A line for each pretrained model: its provenance."""
    lines = [
        {
            "model": one["name"],
            "parameters of the layers": f"{one['parameters']:,}",
            "tokens": f"{one['tokens']:,}",
            "held-out loss (nats)": f"{one['loss']:.3f}",
            "minutes": f"{one['minutes']:.1f}",
            "commit": short(one["commit"]),
            "recipe": one["recipe"],
            "corpus": one["corpus"],
        }
        for one in rungs
        if one["parameters"]
    ]
    return pd.DataFrame(lines)


def short(commit: str | None) -> str:
    """The beginning of a commit's id."""
    return (commit or "unknown")[:7]


def versions(done: Sequence[Row]) -> str:
    """The versions and devices of trials, as text."""
    numbers: dict[str, set[str]] = {}
    for row in done:
        for name, one in row.get("versions", {}).items():
            numbers.setdefault("Python" if name == "python" else name, set()).add(str(one))
    told = [f"{name} {' and '.join(sorted(numbers[name]))}" for name in sorted(numbers)]
    found = [one for row in done if (one := row.get("devices"))]
    kinds = {f"{one['count']} {one['kind']} of {one['host_cores']} cores" for one in found}
    return f"{', '.join(told)}. Devices: {', '.join(sorted(kinds))}."


def provenance(records: Sequence[Row]) -> list[parts.Part]:
    """The versions, devices and commits of the records; [] for records that have none."""
    done = [row for row in study.select(records) if "commit" in row]
    if not done:
        return []
    commits = Counter(short(row["commit"]) for row in done)
    lines = [
        {"commit": one, "records": count, "now": REWRITTEN.get(one, "")}
        for one, count in sorted(commits.items(), key=lambda item: (-item[1], item[0]))
    ]
    note = (
        "Now: a commit that is not in the history was made before the history was rewritten, and "
        "has this name since (`experiments/LOG.md`)."
    )
    return [
        parts.heading("Versions"),
        parts.paragraph(versions(done)),
        parts.table(pd.DataFrame(lines)),
        parts.paragraph(note),
    ]


def ending(
    covered: Sequence[coverage.Coverage], records: Sequence[Row], rungs: Sequence[dict[str, Any]]
) -> list[parts.Part]:
    """What was not run, what differs from the paper, its errata, and where the numbers are from."""
    made = not_run([*covered, coverage.cover(scale_t5, records)])
    made += [parts.heading("What differs from the paper"), parts.items(deviations.DEVIATIONS)]
    made += [parts.heading("Errata of the paper"), parts.table(errata.table())]
    made += provenance(records)
    if len(table := models(rungs)):
        note = (
            "Minutes: of the whole run, of which d0@1of2 is the state after half of its tokens, "
            "and t0@lm10 that after 10 % of the adaptation."
        )
        made += [parts.heading("Pretrained models"), parts.table(table), parts.paragraph(note)]
    return made


def write(
    records: Sequence[Row],
    folder: Path,
    rungs: Sequence[dict[str, Any]] = (),
    *,
    page: bool = True,
) -> None:
    """Writes report.md, its figures and, as a `page`, report.html."""
    found = {artefact: findings(artefact, records) for artefact in ARTEFACTS}
    made = [parts.heading(TITLE, 1), parts.paragraph(summary(records, found)), *verdicts(found)]
    covered = [coverage.cover(artefact, records) for artefact in ARTEFACTS]
    for one in covered:
        made += part(one, found[one.artefact], records, folder)
    made += ending(covered, records, rungs)
    write_text(folder / "report.md", parts.to_markdown(made))
    if page:
        write_text(folder / "report.html", parts.to_page(f"softprompt: {TITLE}", made))


def measured(workdir: str) -> list[Row]:
    """The records of a folder's trials, with what artefacts measure beside.

    Those of Section 7 have their prompts' geometry, those of `style` their continuations' styles,
    that of `figure2` its comparison.
    """
    records = collect(workdir)
    wanted = {row["trial"] for row in section7.prompts(records)}
    found = {
        row["trial"]: style.measure(path) | figure2.measure(path)
        for path, row in read_trials(workdir)
    }
    with Progress() as progress:
        session = Session(progress)
        for path, row in read_trials(workdir):
            if row["trial"] in wanted:
                found[row["trial"]] |= {"geometry": section7.measure(path, session)}
    return [row | found[row["trial"]] for row in records]


def read_rungs() -> list[dict[str, Any]]:
    """The committed facts of the pretrained models."""
    found: list[dict[str, Any]] = json.loads(LADDER.read_text()) if LADDER.exists() else []
    return found


def keep(records: Sequence[Row], rungs: Sequence[dict[str, Any]], workdir: str) -> None:
    """Keeps records, models' facts, the prompts of Section 7 and report.md in the repository."""
    write_records(RECORDS, records)
    write_text(LADDER, json.dumps(list(rungs), indent=1) + "\n")
    for folder, kind in ((PROMPTS, "*.safetensors"), (DOCS / "figures", "*.svg")):
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(kind):
            old.unlink()
    write(records, DOCS, rungs, page=False)
    wanted = {row["trial"] for row in section7.trials(records)}
    for path, row in read_trials(workdir):
        if row["trial"] in wanted:
            (PROMPTS / f"{row['name']}.safetensors").write_bytes((path / DELTA).read_bytes())


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the report."""
    parser = argparse.ArgumentParser(prog="experiments.paper.report")
    parser.add_argument("--workdir", help="the trials' folder; without it the committed records")
    parser.add_argument("--keep", action="store_true", help="keep the records in the repository")
    parser.add_argument("--to", type=Path, default=Path("runs/report"))
    given = parser.parse_args(arguments)
    if given.keep and not given.workdir:
        parser.error("--keep needs --workdir, whose trials it keeps")
    try:
        records = measured(given.workdir) if given.workdir else read_records(RECORDS)
        rungs = (
            [ladder.summary(name) for name in ladder.made_models()]
            if given.workdir
            else read_rungs()
        )
        if given.keep:
            done = [row for row in records if row["status"] == "done"]
            keep(done, rungs, given.workdir)
        write(records, given.to, rungs)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {given.to}/report.md and {given.to}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
