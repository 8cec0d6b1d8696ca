"""Writes the table and the figure of an experiment to the folder of its trials."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from etils import epath

from softprompt.errors import UserError
from softprompt.files import check_writable, write_bytes, write_text
from softprompt.results import Row
from softprompt.trials.experiment import call_experiment
from softprompt.trials.records import collect

SWEEP_FILE = "sweep.json"
MOST_FAILURES = 5  # listed in a caption


def write_outputs(
    experiment: ModuleType,
    rows: Sequence[Row],
    folder: epath.PathLike,
    *,
    prefix: str = "",
    notes: str = "",
) -> list[str]:
    """Writes table.md, .csv and .tex and figure.png and .pdf, each atomically.

    The files' names begin with `prefix`; `notes` are sentences added to the experiment's caption.

    Returns:
        The files' names.

    Raises:
        UserError: the experiment has an error, or the folder is not writable.
    """
    import pandas as pd  # slow to import
    from matplotlib.figure import Figure

    from softprompt.analysis import tables

    caption = f"{experiment.CAPTION} {notes}".strip()
    table = call_experiment(experiment, "table", rows, returns=pd.DataFrame)
    figure = call_experiment(experiment, "figure", rows, returns=Figure)
    files = {
        "table.md": tables.to_markdown(table, caption).encode(),
        "table.csv": tables.to_csv(table).encode(),
        "table.tex": tables.to_latex(table, caption).encode(),
    }
    for suffix in ("png", "pdf"):
        buffer = io.BytesIO()
        figure.savefig(buffer, format=suffix, dpi=160, bbox_inches="tight")
        files[f"figure.{suffix}"] = buffer.getvalue()
    for name, content in files.items():
        write_bytes(epath.Path(folder) / f"{prefix}{name}", content)
    return [f"{prefix}{name}" for name in files]


def write_trial_outputs(experiment: ModuleType, folder: epath.PathLike) -> list[str]:
    """Writes the table and the figure of all finished trials below a folder.

    The rows have their answers (see `records.collect`). The caption names models, tasks and failed
    trials. The first experiment that was swept into the folder has table.md and so on; others have
    NAME-table.md and so on.

    Returns:
        The files' names, the Markdown table's first.

    Raises:
        UserError: there is no finished trial, or the experiment has an error.
    """
    from softprompt.analysis import tables  # pandas is slow to import

    rows = collect(folder)
    done = [row for row in rows if row["status"] == "done"]
    failed = [row for row in rows if row["status"] != "done"]
    failures = _failures(failed, len(rows)) if failed else ""
    if not done:
        raise UserError(f"no finished trial below {str(folder)!r}{failures and ': '}{failures}")
    name = experiment_name(experiment)
    return write_outputs(
        experiment,
        done,
        folder,
        prefix="" if first_experiment(folder) == name else f"{name}-",
        notes=f"{len(done)} trials of {tables.subject(done)}. {failures}",
    )


def _failures(failed: Sequence[Row], trials: int) -> str:
    """The number of failed trials, and the errors of the first few."""
    named = [f"{row['name']} ({row['error']})" for row in failed[:MOST_FAILURES]]
    more = [f"and {len(failed) - len(named)} more"] if len(failed) > len(named) else []
    return f"{len(failed)} of {trials} trials failed: {'; '.join([*named, *more])}."


def experiment_name(experiment: ModuleType) -> str:
    """The name of an experiment's file, without its suffix."""
    return Path(str(experiment.__file__)).stem


def record_experiment(experiment: ModuleType, folder: epath.PathLike) -> None:
    """Records the experiment of a folder, unless one is recorded already.

    Raises:
        UserError: the folder is not writable.
    """
    check_writable(folder)
    if first_experiment(folder) is None:
        text = json.dumps({"experiment": experiment_name(experiment)})
        write_text(epath.Path(folder) / SWEEP_FILE, f"{text}\n")


def first_experiment(folder: epath.PathLike) -> str | None:
    """Returns the name of the experiment that was first swept into a folder; None without one.

    Raises:
        UserError: the folder's sweep.json is not readable.
    """
    file = epath.Path(folder) / SWEEP_FILE
    if not file.exists():
        return None
    try:
        return str(json.loads(file.read_text())["experiment"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'{file}: not readable ({error}); allowed: {{"experiment": NAME}}'
        ) from error
