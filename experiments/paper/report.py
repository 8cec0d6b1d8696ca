"""The report of the study: every artefact with its question, figure, table and verdicts.

Command:
    python -m experiments.paper.report                             (the committed records)
    python -m experiments.paper.report --workdir runs/paper        (the trials below a folder)
    python -m experiments.paper.report --workdir runs/paper --keep (the same, and commit them)

Writes report.md with figures beside it, and report.html, one file without outside assets. Both
follow from the records alone; with --workdir, prompts are measured for them, which loads the model.
"""

import argparse
import html
import io
import json
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import matplotlib
import pandas as pd

from experiments.paper import everything, parameters, section7, study, style
from softprompt.analysis.comparisons import VERDICTS
from softprompt.analysis.tables import to_html, to_markdown
from softprompt.console import Progress, duration
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.pretraining import ladder
from softprompt.results import Row, read_trials
from softprompt.trials.outputs import experiment_name
from softprompt.trials.records import collect, read_records, write_records
from softprompt.trials.run import DELTA
from softprompt.trials.session import Session

ARTEFACTS: tuple[ModuleType, ...] = (*everything.ARTEFACTS, parameters)
RESULTS = Path(__file__).parent / "results"
RECORDS, PROMPTS, LADDER = RESULTS / "records.jsonl", RESULTS / "prompts", RESULTS / "ladder.json"
DOCS = Path(__file__).parents[2] / "docs" / "study"

DEVIATIONS = (
    "Models: decoders that are pretrained here and SmolLM2-135M, and a small T5 for Figures 3c and "
    "3d; in the paper T5 1.1 from 77M to 11,135M parameters, LM-adapted.",
    "Tasks: question types, and the sentiment of movie snippets and of other domains; in the paper "
    "SuperGLUE.",
    "Prompts: 20 vectors, 400 steps of 32 examples on the ladder and 50 of 16 on SmolLM2, AdamW; "
    "in the paper 100 vectors, 30,000 steps of 32, Adafactor.",
    "Learning rates: three for each method, on one model of the ladder and on SmolLM2. Full "
    "fine-tuning on SmolLM2 has the largest of its three; a larger one was not tried.",
    "Selection: on a validation split, tested on another; in the paper both on one.",
    "Answers: the candidate with the largest probability; in the paper generated.",
)

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #181818; --line: #444; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: auto; padding: 1rem; }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left; }
th, td { min-width: 3.5rem; }
th { cursor: pointer; }
td:not(.number) { min-width: 6.5rem; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { overflow-x: auto; background: color-mix(in srgb, var(--line) 30%, transparent);
  padding: 0.5rem; border-radius: 6px; }
pre, code { font-size: 0.9em; }
"""
SORT = """
for (const th of document.querySelectorAll("th")) th.onclick = () => {
  const rows = [...th.closest("table").tBodies[0].rows], n = th.cellIndex;
  const key = row => row.cells[n].textContent.replaceAll(",", "");
  const up = th.dataset.up !== "1"; th.dataset.up = up ? "1" : "";
  rows.sort((a, b) => key(a).localeCompare(key(b), "en", {numeric: true}) * (up ? 1 : -1));
  th.closest("table").tBodies[0].append(...rows);
};
"""


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
    done = [row for row in records if row["status"] == "done"]
    spent = sum(row.get("seconds") or 0 for row in done)
    each = [one.verdict for some in found.values() for one in some]
    counts = ", ".join(f"{each.count(word)} {word}" for word in VERDICTS)
    versions = sorted({f"jax {row['versions']['jax']}" for row in done if "versions" in row})
    kinds = sorted({f"{d['count']} {d['kind']}" for row in done if (d := row.get("devices"))})
    return (
        f"{len(done)} trials, {duration(spent)} in all; {', '.join((*versions, *kinds))}. "
        f"Predictions: {counts}."
    )


def svg(artefact: ModuleType, records: Sequence[Row]) -> str:
    """Its figure; equal records give equal text."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": experiment_name(artefact), "svg.fonttype": "path"}):
        figure = artefact.figure(records)
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def part(
    artefact: ModuleType, found: Sequence[study.Finding], records: Sequence[Row], folder: Path
) -> tuple[str, str]:
    """An artefact's part of the report as Markdown, with its figure in a file, and as HTML."""
    table = artefact.table(records)
    drawn = svg(artefact, records) if len(table) else ""
    told = [(word, section(artefact, word)) for word in ("Question", "Prediction")]
    lines = [f"## {title(artefact)}", *(f"**{word}.** {text}" for word, text in told if text)]
    lines.append(f"**Command.** {'; '.join(f'`{one}`' for one in command(artefact).splitlines())}")
    page = [f"<h2>{html.escape(title(artefact))}</h2>"]
    page += [f"<p><b>{word}.</b> {html.escape(text)}</p>" for word, text in told if text]
    page.append(f"<pre>{html.escape(command(artefact))}</pre>")
    for frame in (study.finding_table(found), table):
        if len(frame):
            lines.append(to_markdown(frame).rstrip())
            page.append(f'<div class="wide">{to_html(frame)}</div>')
    caption = artefact.CAPTION if drawn else "Not run."
    if drawn:
        file = f"figures/{experiment_name(artefact)}.svg"
        write_text(folder / file, drawn)
        lines.append(f"![{title(artefact)}]({file})")
        page.append(drawn)
    lines.append(caption)
    page.append(f"<p>{html.escape(caption)}</p>")
    return "\n\n".join(lines), "\n".join(page)


def verdicts(found: Findings) -> tuple[str, str]:
    """All predictions with their verdicts, as Markdown and as HTML."""
    columns = ["artefact", "prediction", "here (95 %)", "verdict"]
    table, note = everything.verdict_table(found)[columns], study.VERDICT_CAPTION
    page = f'<h2>Verdicts</h2><div class="wide">{to_html(table)}</div><p>{note}</p>'
    return f"## Verdicts\n\n{to_markdown(table)}\n{note}", page


def models(rungs: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """A line for each pretrained model: its provenance."""
    lines = [
        {
            "model": one["name"],
            "parameters of the layers": f"{one['parameters']:,}",
            "tokens": f"{one['tokens']:,}",
            "held-out loss (nats)": f"{one['loss']:.3f}",
            "recipe": one["recipe"],
            "corpus": one["corpus"],
        }
        for one in rungs
        if one["parameters"]
    ]
    return pd.DataFrame(lines)


def ending(rungs: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """What differs from the paper, and the models, as Markdown and as HTML."""
    table = models(rungs)
    lines = ["## What differs from the paper", "\n".join(f"* {one}" for one in DEVIATIONS)]
    items = "".join(f"<li>{html.escape(one)}</li>" for one in DEVIATIONS)
    page = [f"<h2>What differs from the paper</h2><ul>{items}</ul>"]
    if len(table):
        lines += ["## Pretrained models", to_markdown(table).rstrip()]
        page.append(f'<h2>Pretrained models</h2><div class="wide">{to_html(table)}</div>')
    return "\n\n".join(lines), "\n".join(page)


def write(
    records: Sequence[Row], folder: Path, rungs: Sequence[dict[str, Any]] = (), *, page: bool = True
) -> None:
    """Writes report.md, its figures and, as a `page`, report.html."""
    heading = "Prompt tuning at the scale of a laptop"
    found = {artefact: findings(artefact, records) for artefact in ARTEFACTS}
    told = summary(records, found)
    parts = (part(artefact, some, records, folder) for artefact, some in found.items())
    made = [verdicts({one: some for one, some in found.items() if some}), *parts, ending(rungs)]
    markdown = [f"# {heading}", told, *(text for text, _ in made)]
    write_text(folder / "report.md", "\n\n".join(markdown) + "\n")
    if not page:
        return
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    pages = [f"<h1>{heading}</h1><p>{html.escape(told)}</p>", *(p for _, p in made)]
    write_text(
        folder / "report.html",
        f"<!doctype html><html lang=en><head>{head}<title>softprompt: report</title>"
        f"<style>{STYLE}</style></head><body>{chr(10).join(pages)}"
        f"<script>{SORT}</script></body></html>\n",
    )


def measured(workdir: str) -> list[Row]:
    """The records of a folder's trials, with what artefacts measure beside.

    Those of Section 7 have their prompts' geometry, those of `style` their continuations' styles.
    """
    records = collect(workdir)
    wanted = {row["trial"] for row in section7.prompts(records)}
    found = {row["trial"]: style.measure(path) for path, row in read_trials(workdir)}
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
