"""A trial's metrics log, metrics.jsonl, and optional sinks (TensorBoard, Weights & Biases)."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
from etils import epath

from softprompt.errors import UserError
from softprompt.files import write_text

Line = dict[str, Any]
Sink = Callable[[Line], None]

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends lines {"step": ..., name: number, ...} to metrics.jsonl, and passes them to sinks.

    Only process 0 writes.

    Args:
        folder: the trial's, local or gs://. A gs:// file cannot be appended to, so each line
            rewrites it.
        step: the step that the trial resumes from, whose later lines are removed; None for a new
            log.
        sinks: called with each new line.
    """

    def __init__(self, folder: epath.PathLike, *, step: int | None, sinks: list[Sink]):
        self._file = epath.Path(folder) / FILE
        self._local = "://" not in str(folder)
        self._sinks = sinks
        self._writes = jax.process_index() == 0
        lines = []
        if step is not None and self._file.exists():
            for text in self._file.read_text().splitlines():
                line = read_line(text)
                if line is not None and line["step"] <= step:
                    lines.append(text + "\n")
        self._lines = lines
        if self._writes:
            write_text(self._file, "".join(lines))

    def write(self, line: Line) -> None:
        """Appends a line; NaN and infinite numbers become null."""
        if not self._writes:
            return
        text = json.dumps({k: _finite(v) for k, v in line.items()}) + "\n"
        if self._local:
            with self._file.open("a") as file:
                file.write(text)
        else:
            self._lines.append(text)
            write_text(self._file, "".join(self._lines))
        for sink in self._sinks:
            sink(line)


def read_line(text: str) -> Line | None:
    """Parses a line of metrics.jsonl; None for one that a killed process left incomplete."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def read_log(folder: epath.PathLike) -> list[Line]:
    """All complete lines of a trial's metrics.jsonl."""
    lines = (read_line(text) for text in (epath.Path(folder) / FILE).read_text().splitlines())
    return [line for line in lines if line is not None]


@contextmanager
def open_sinks(
    folder: epath.PathLike, name: str, config: Mapping[str, Any], *, tensorboard: bool, wandb: bool
) -> Iterator[list[Sink]]:
    """Opens a trial's sinks for the duration of the block; only process 0 has any.

    TensorBoard's events are written into `folder`; Weights & Biases shows `name` and `config`.

    Raises:
        UserError: a sink's package is not installed.
    """
    writes = jax.process_index() == 0
    with ExitStack() as stack:
        sinks: list[Sink] = []
        if writes and tensorboard:
            sinks.append(_tensorboard(folder, stack))
        if writes and wandb:
            sinks.append(_wandb(config, name, stack))
        yield sinks


def _tensorboard(folder: epath.PathLike, stack: ExitStack) -> Sink:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            "config key 'log.tensorboard' is True; allowed: False without tensorboardX (pip "
            "install 'softprompt[sweep]')"
        ) from error
    writer = stack.enter_context(SummaryWriter(str(epath.Path(folder) / "tensorboard")))

    def sink(line: Line) -> None:
        for key, value in line.items():
            if key != "step":
                writer.add_scalar(key, value, line["step"])
        writer.flush()

    return sink


def _wandb(config: Mapping[str, Any], name: str, stack: ExitStack) -> Sink:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "config key 'log.wandb' is True; allowed: False without wandb (pip install "
            "'softprompt[sweep]')"
        ) from error
    run = wandb.init(project="softprompt", name=name, config=config, reinit="create_new")
    stack.enter_context(run)  # concurrent trials have separate runs

    def sink(line: Line) -> None:
        run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    return sink


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
