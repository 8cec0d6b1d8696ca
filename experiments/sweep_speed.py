"""How much faster is a sweep than separate commands, and when trials run at the same time?

Question: 12 prompts (3 lengths, 2 initialisers, 2 seeds) on SmolLM2-135M-Instruct and movie-snippet
sentiment: how long do they take as 12 processes of `softprompt train`, as one sweep that trains one
after another, and as one sweep whose trials of equal length run together: on a CPU two side by
side, on an accelerator all four as one program?

Prediction: each process imports modules, loads model and data and compiles, which takes 10 to 15
seconds on two x86 cores; a sweep does so once, and compiles once for each length. So it saves more
where trials are shorter. One trial keeps two cores busy nine tenths of the time, so two side by
side gain a tenth. A GPU has more to spare and gains several times.

Command, from the repository root, on a machine that does nothing else:
    python -m experiments.sweep_speed --workdir runs/sweep_speed
    python -m experiments.sweep_speed --forms warm,together --config.train.steps=30
    softprompt sweep sweep_speed --workdir runs/twelve       (the trials alone)

Cost: 12 trials of 20 steps in each of three forms, about half an hour on two x86 cores. A form that
was measured by the same command lines at this commit is not measured again. Otherwise, and after an
interruption, its trials are deleted and it begins anew.

Expected, two x86 cores, commit b78314e: 639 s as processes, 508 s as one sweep, 452 s two at a
time; 12, 3 and 3 compilations; accuracies equal to the digit.
"""

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from softprompt.analysis.plots import Point, length_plot
from softprompt.analysis.tables import subject, to_markdown
from softprompt.cli import split_overrides
from softprompt.config import ConfigDict, base_config, flatten, trial_name
from softprompt.errors import UserError, unknown
from softprompt.files import write_text
from softprompt.results import Row, read_rows
from softprompt.source import commit

LENGTHS, INITS, SEEDS = (5, 20, 100), ("uniform", "vocabulary"), (0, 1)
FORMS = ("cold", "warm", "together")

CAPTION = "Members: the most trials that ran at a time. Step s: of a step of each of them."


def sweep(subset: str = "full") -> list[ConfigDict]:
    """Returns the 12 configs.

    Raises:
        UserError: a subset other than "full".
    """
    if subset != "full":
        raise unknown("subset", subset, ["full"])
    return [_trial(*point) for point in itertools.product(LENGTHS, INITS, SEEDS)]


def _trial(length: int, init: str, seed: int) -> ConfigDict:
    config = base_config()
    config.method.length, config.method.init, config.seed = length, init, seed
    config.train.steps, config.train.batch, config.eval.every = 20, 16, 0
    config.data.validation_examples = config.data.test_examples = 200
    return config


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns a line a trial."""
    return pd.DataFrame([_line(row) for row in sorted(rows, key=_key)], dtype=object)


def _key(row: Row) -> tuple[int, str, int]:
    return tuple(_line(row)[name] for name in ("P", "init", "seed"))


def _line(row: Row) -> dict[str, Any]:
    method = row["config"]["method"]
    return {
        "P": method["length"],
        "init": method["init"],
        "seed": row["config"]["seed"],
        "members": row.get("members", 1),
        "step s": row.get("step_seconds"),
        "test accuracy": row["metrics"].get("test", {}).get("accuracy"),
    }


def figure(rows: Sequence[Row]) -> Figure:
    """Returns test accuracy by prompt length, a line an initialiser."""
    lines: dict[str, list[Point]] = {}
    tested = [line for line in map(_line, rows) if line["test accuracy"] is not None]
    for init, length in sorted({(line["init"], line["P"]) for line in tested}):
        some = [line for line in tested if (line["init"], line["P"]) == (init, length)]
        values = tuple(100 * line["test accuracy"] for line in some)
        mean = sum(values) / len(values)
        lines.setdefault(init, []).append(Point(length, mean, min(values), max(values), values))
    return length_plot(
        lines, {}, xlabel="Length (vectors)", ylabel="Test accuracy (%)", title=subject(rows)
    )


def commands(form: str, folder: Path, overrides: Sequence[str]) -> list[list[str]]:
    """The command lines of a form, one after another; what the trials have in common comes last."""
    program = [sys.executable, "-m", "softprompt"]
    if form != "cold":
        population = f"--config.compute.population={1 if form == 'warm' else 0}"
        sweeping = [*program, "sweep", "sweep_speed", "--workdir", str(folder), population]
        return [[*sweeping, *overrides]]
    found, plain = [], flatten(base_config())
    for config in sweep():
        own = {key: value for key, value in flatten(config).items() if value != plain[key]}
        words = [f"--config.{key}={value}" for key, value in own.items()]
        workdir = ["--workdir", str(folder / trial_name(config))]
        found.append([*program, "train", *words, *overrides, *workdir])
    return found


def measure(form: str, folder: Path, overrides: Sequence[str]) -> float:
    """Seconds by the clock of a form, all of its processes included.

    Those that the same command lines took before at this commit, if they did; else the folder is
    emptied first.
    """
    note, lines = folder / "measured.json", commands(form, folder, overrides)
    known = json.loads(note.read_text()) if note.exists() else {}
    same = (known.get("commands"), known.get("commit")) == (lines, commit())
    if same and not commit().endswith("-dirty"):  # changes that are in no commit are all alike
        return float(known["seconds"])
    if folder.exists():
        shutil.rmtree(folder)  # trials of other commands, or of an interruption, would be skipped
    seconds = 0.0
    for number, line in enumerate(lines, 1):
        print(f"{form}: process {number} of {len(lines)}", file=sys.stderr, flush=True)
        began = time.perf_counter()
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        seconds += time.perf_counter() - began
    write_text(
        note,
        json.dumps({"commands": lines, "commit": commit(), "seconds": seconds}, indent=1) + "\n",
    )
    return seconds


def summary(seconds: Mapping[str, float], rows: Mapping[str, Sequence[Row]]) -> pd.DataFrame:
    """Returns a line a form.

    Its time; the others' over it; how many of its trials spent time on compiling; the most that
    ran at a time; and the largest difference of a trial's test accuracy from that in the
    first form.
    """
    first = next(iter(seconds))
    found: dict[str, dict[Any, float]] = {
        form: {_key(row): row["metrics"]["test"]["accuracy"] for row in some}
        for form, some in rows.items()
    }
    return pd.DataFrame(
        [
            {
                "form": form,
                "seconds": round(taken, 1),
                **{f"{other} over it": seconds[other] / taken for other in seconds},
                "compiled": sum((row.get("compile_seconds") or 0) > 0 for row in rows[form]),
                "members": _members(rows[form]),
                "accuracy off by": max(abs(found[form][k] - found[first][k]) for k in found[first]),
            }
            for form, taken in seconds.items()
        ],
        dtype=object,
    )


def _members(rows: Sequence[Row]) -> str:
    """How many ran at a time, such as "1, 4" where some trials were alone."""
    return ", ".join(map(str, sorted({_line(row)["members"] for row in rows})))


def main() -> int:
    """Measures the forms one after another and prints how they compare."""
    parser = argparse.ArgumentParser(prog="experiments.sweep_speed", description="12 prompts")
    parser.add_argument("--workdir", type=Path, default=Path("runs/sweep_speed"))
    parser.add_argument("--forms", default=",".join(FORMS), help="of cold, warm, together")
    try:
        words, overrides = split_overrides(sys.argv[1:])
    except UserError as error:
        parser.error(str(error))
    said = parser.parse_args(words)
    forms = said.forms.split(",")
    if unknown_forms := set(forms) - set(FORMS):
        parser.error(str(unknown("form", sorted(unknown_forms)[0], FORMS)))
    given = [f"--config.{key}={value}" for key, value in overrides]
    try:
        seconds = {form: measure(form, said.workdir / form, given) for form in forms}
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    rows = {form: read_rows(said.workdir / form) for form in forms}
    text = to_markdown(summary(seconds, rows))
    write_text(said.workdir / "summary.md", text)
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
