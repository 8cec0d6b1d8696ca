"""A trial's metrics.jsonl, cut back to the restored step on resume, and optional sinks."""

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
TIMING = (
    *("seconds", "tokens_per_second", "examples_per_second"),
    *("peak_share", "input_wait_share"),
)


class MetricsLog:
    """Appends lines {"step": ..., name: number, ...}; the file is the truth, sinks are copies.

    Args:
        folder: the trial's, local or gs:// (which cannot append, and is rewritten by each line).
        step: the step that the trial goes on from; later lines of a killed run are cut off.
        sinks: called with each new line.

    Of several processes the first writes.
    """

    def __init__(self, folder: epath.PathLike, *, step: int | None, sinks: list[Sink]):
        self._file = epath.Path(folder) / FILE
        self._local = "://" not in str(folder)
        self._sinks = sinks
        self._writes = jax.process_index() == 0
        kept = []
        if step is not None and self._file.exists():
            for text in self._file.read_text().splitlines():
                line = read_line(text)
                if line is not None and line["step"] <= step:
                    kept.append(text + "\n")
        self._lines = kept
        if self._writes:
            write_text(self._file, "".join(kept))

    def write(self, line: Line) -> None:
        """Adds a line; numbers that are not finite become null."""
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
    """A line of metrics.jsonl, None for one that a kill cut short."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def read_log(folder: epath.PathLike) -> list[Line]:
    """All whole lines of a trial's metrics.jsonl."""
    lines = (read_line(text) for text in (epath.Path(folder) / FILE).read_text().splitlines())
    return [line for line in lines if line is not None]


@contextmanager
def open_sinks(
    folder: epath.PathLike,
    name: str,
    config: Mapping[str, Any],
    *,
    tensorboard: bool,
    wandb: bool,
) -> Iterator[list[Sink]]:
    """Within the block, a trial's own sinks, those that are switched on.

    Of several processes the first has them.

    Args:
        folder: the trial's; TensorBoard's events go there.
        name: the run's, in Weights & Biases.
        config: what Weights & Biases shows beside it.
        tensorboard: whether to write TensorBoard events.
        wandb: whether to send lines to Weights & Biases.

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
            "config.log.tensorboard is True; it needs tensorboardX: pip install 'softprompt[sweep]'"
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
            "config.log.wandb is True; it needs wandb: pip install 'softprompt[sweep]'"
        ) from error
    run = wandb.init(project="softprompt", name=name, config=config, reinit="create_new")
    stack.enter_context(run)  # trials beside this one have runs of their own

    def sink(line: Line) -> None:
        run.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    return sink


def _finite(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
