"""How fast is it, against PEFT on PyTorch, and what is each saving worth?

Question: the same model on the same examples, in the same dtype and on the same machine: how many
examples a second does a training step make here and in PEFT, and in how much memory? What does a
step take when the context is computed for every example, when examples are not packed, and when
logits are computed at all positions?

Prediction (targets, printed beside what is measured): at 16 movie snippets a step on SmolLM2-135M,
2.3, 6 and 11 times PEFT's speed in its quicker dtype at P = 20, 100 and 500, half its memory, and
0.65 of the rate that the machine reaches in products of the step's shapes; 7 times on Gemma 3 270M.

Command, from the repository root, on a machine that does nothing else:
    make bench          the claimed cells
    make bench-full     two models, two texts, four methods, four lengths, every saving
    make bench ARGS="--subset t5"    the claimed cells of T5 alone
    python -m experiments.bench --subset claimed --workdir runs/bench --peft-python PATH

Cost: the claimed cells about 38 minutes on two x86 cores, the grid 14 hours by its own estimate. A
process begins no further step after 115 seconds of them: where PEFT is slow it has fewer batches.

Expected (two x86 cores, jax 0.12 and PyTorch, commit c7c06eb): 3.3, 6.4 and 14 times PEFT's speed
at P = 20, 100 and 500, 9 to 12 times its float32, 0.27 of its memory, 0.76 of the products' rate,
and 11 times its speed on Gemma 3 270M; without the context, packing and targets a step takes 3.5,
1.5 and 1.15 times as long.

Every cell is measured in processes of ours and PEFT's in turns, two of each (--processes; ours at
P = 100 has twice as many, beside each of PEFT's dtypes), each on other examples. Of the claimed
cells PEFT in float32 has few steps or none where no claim is made against it. Rows are appended to
WORKDIR/rows.jsonl as they are made; the same command continues where it stopped, tries again what
failed, and does nothing once all is done. Rows of either side that were made at another commit, or
with changes that are in none, are measured anew: a table is of one code. The exit code is 1 where a
process failed; running out of memory, or a model whose terms are not accepted, is no failure.

T5 is 1.1 of the small size with random weights; PEFT's prompt stands before the encoder's input, as
ours does, or apart from it (`method.prompt_to_input=False`, which PEFT lacks; other examples of the
same text, since such a prompt leaves more room in a row). Targets: 1.5 and 3 times PEFT's speed.

Both sides load the same folders, read the same examples, update with AdamW, and end a step when all
of it is computed. PEFT's threads: one or all cores, whichever takes less time for SmolLM2 at
P = 20, by dtype. Where there is a GPU both use the first.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import experiments.bench.report as report
from experiments.bench.cells import (
    MODELS,
    Task,
    cell_config,
    examples_file,
    folders,
    identity,
    job,
    plan,
)
from softprompt.analysis.tables import to_markdown
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.files import write_text
from softprompt.source import commit_now
from softprompt.trials.outputs import write_outputs

Row = dict[str, Any]
ANSWERS = ("done", "out of memory", "terms not accepted")  # statuses that are no fault of the run
ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Measures what is missing, then prints and writes the table, the claims and the figure."""
    parser = argparse.ArgumentParser(prog="experiments.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--subset", default="claimed", help="claimed (default), t5 or full")
    parser.add_argument("--workdir", type=Path, default=Path("runs/bench"))
    parser.add_argument("--peft-python", default=sys.executable, help="has torch and peft")
    parser.add_argument("--steps", type=int, default=10, help="timed in a process")
    parser.add_argument("--processes", type=int, default=2, help="of each system and cell")
    said = parser.parse_args()
    if shutil.which(said.peft_python) is None:
        parser.error(f"--peft-python is {said.peft_python!r}: no such program")
    try:
        tasks = plan(said.subset, processes=said.processes, steps=said.steps)
    except UserError as error:
        parser.error(str(error))
    workdir = said.workdir.absolute()
    try:
        with Progress() as progress:
            rows = run(tasks, workdir, said.peft_python, progress=progress)
    except KeyboardInterrupt:
        print("experiments.bench: interrupted; the same command continues", file=sys.stderr)
        return 130
    write_outputs(report, rows, workdir)
    told = to_markdown(report.claims(rows))
    write_text(workdir / "claims.md", told)
    print(to_markdown(report.table(rows), report.CAPTION))
    print(told, end="")
    return report_failures(tasks, rows)


def report_failures(tasks: Sequence[Task], rows: Sequence[Row]) -> int:
    """Says which tasks failed, on standard error; returns the exit code."""
    pairs = zip(tasks, rows, strict=True)
    failed = [(task, row) for task, row in pairs if row["status"] not in ANSWERS]
    for task, row in failed:
        print(f"experiments.bench: {task.name}: {row['status']} ({row['error']})", file=sys.stderr)
    return 1 if failed else 0


def run(tasks: Sequence[Task], workdir: Path, peft_python: str, *, progress: Progress) -> list[Row]:
    """Runs the processes that have no finished row yet, one after another.

    Args:
        tasks: in order.
        workdir: absolute.
        peft_python: an interpreter that has torch, transformers and peft.
        progress: where it says how far it is.

    Returns:
        A row a task: what a child printed, or the status with which it ended. Those that are not
        done are not kept from being tried again.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    finished = finished_rows(tasks, workdir / "rows.jsonl", progress)
    rows: list[Row] = []
    ready: dict[str, Row] = {}
    spent = paid = 0.0
    for number, task in enumerate(tasks):
        if (known := finished.get(task.identity)) is not None:
            rows.append(known)
            continue
        rest = sum(t.guess() for t in tasks[number:] if t.identity not in finished)
        left = rest * spent / paid if paid else rest
        progress.trial(task.name, number, len(tasks), left)
        began = time.monotonic()
        model = task.cell.model
        if model not in ready:
            ready[model] = make_inputs(tasks, workdir, model, progress)
        row = ready[model]
        if row["status"] == "done":
            row = run_task(task, rows, workdir, peft_python)
            spent, paid = spent + time.monotonic() - began, paid + task.guess()
        row = task.key | {"commit": commit_now()} | row  # the code may change on the way
        rows.append(row)
        append(workdir / "rows.jsonl", row)
        progress.say(f"{task.name}: {summary(row)}")
    progress.trial("", len(tasks), len(tasks), 0.0)
    return rows


def append(file: Path, row: Row) -> None:
    """Adds a row to a file, on a line of its own also where the last one was not written whole."""
    with file.open("a+b") as opened:
        if opened.tell():
            opened.seek(-1, os.SEEK_END)
            opened.write(b"" if opened.read() == b"\n" else b"\n")
        opened.write(json.dumps(row).encode() + b"\n")


def finished_rows(tasks: Sequence[Task], file: Path, progress: Progress) -> dict[str, Row]:
    """The rows that are done and of the code that runs now; says how many others are done anew.

    Changes that are in no commit cannot be told from others: rows of such a tree are never kept.
    """
    now, known = commit_now(), read_rows(file)
    changed = now.endswith("-dirty")
    if changed:
        progress.say("files differ from the commit: rows made now will not be used again")
    kept = {
        name: row
        for name, row in known.items()
        if not changed and (row.get("commit") or "unknown") == now
    }
    anew = sum(task.identity in known.keys() - kept.keys() for task in tasks)
    if anew:
        progress.say(f"{anew} of {len(tasks)} processes were of other code; they are measured anew")
    return kept


def read_rows(file: Path) -> dict[str, Row]:
    """The rows that are done, by what they are of; a half-written last line is none."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["status"] == "done":
            found[identity(row)] = row
    return found


def make_inputs(tasks: Sequence[Task], workdir: Path, model: str, progress: Progress) -> Row:
    """Writes a model's folders and examples, in a process of its own; returns its row."""
    found = {examples_file(workdir, t.cell): t.cell for t in tasks if t.cell.model == model}
    texts = [
        {
            "examples": file,
            "config": cell_config(workdir, cell) | {"method.name": "prompt"},
            "length": cell.length if cell.model.startswith("t5") else 1,
        }
        for file, cell in found.items()
    ]
    made = folders(workdir, model)
    wanted = {
        "model": MODELS.get(model, model),
        "folders": made,
        "texts": texts,
        "passages": str(workdir / "passages.jsonl"),
    }
    there = [*made.values(), *found]
    if all(Path(path).exists() for path in there):
        return {"status": "done", "error": ""}
    progress.stage("write the model and the examples for both sides")
    return child([sys.executable, "-m", "experiments.bench.inputs"], wanted, workdir, "inputs")


def run_task(task: Task, rows: Sequence[Row], workdir: Path, peft_python: str) -> Row:
    """Runs one process; `rows` say which number of threads is PEFT's best."""
    best = {
        row["dtype"]: row["threads"]
        for row in rows
        if row["purpose"] == "threads" and row["status"] == "done"
    }
    ours = task.system.side == "ours"
    command = [sys.executable if ours else peft_python, "-m"]
    command.append("experiments.bench.ours" if ours else "experiments.bench.theirs")
    told = job(task, workdir, best_threads=best)
    return child(command, told, workdir, f"{task.name} {task.process}".replace(" ", "-"))


def child(command: Sequence[str], told: dict[str, Any], workdir: Path, name: str) -> Row:
    """Runs a child on a job; returns the row that it printed last.

    A child that printed none has the status "killed" where the system ended it by signal 9, as it
    does when memory runs out, and "failed" otherwise.
    """
    (workdir / "logs").mkdir(parents=True, exist_ok=True)
    file, log = workdir / "job.json", workdir / "logs" / f"{name}.txt"
    file.write_text(json.dumps(told, indent=2) + "\n")
    environment = {"CUDA_VISIBLE_DEVICES": "0", **os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("w") as errors:
        done = subprocess.run(
            [*command, str(file)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        row = json.loads(done.stdout.strip().splitlines()[-1])
        assert isinstance(row, dict)
        return row
    except (ValueError, IndexError, AssertionError):
        if done.returncode == -signal.SIGKILL:
            return {"status": "killed", "error": "signal 9, as when memory runs out"}
        return {"status": "failed", "error": f"exit code {done.returncode}, see {log}"}


def summary(row: Row) -> str:
    """A row in a few words."""
    if row["status"] != "done":
        return f"{row['status']} ({row['error']})"
    middle = statistics.median(row["seconds"])
    return f"{middle:.3f} s a step, {row['memory'] / 1e9:.2f} GB, first loss {row['losses'][0]:.6f}"


if __name__ == "__main__":
    sys.exit(main())
