"""Progress on standard error: bars with the time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn
from rich.progress import Progress as Bars

LINE_SECONDS = 10.0  # between two plain lines of the same stage


class Progress:
    """Shows the progress of a command. It is a context manager.

    Example:
        with Progress() as progress:
            progress.stage("train", 30, 100, "loss 0.41")
            progress.say("validation accuracy 0.84 at step 100")
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bars: Bars | None = None
        self._sweep: TaskID | None = None
        self._current: TaskID | None = None
        self._stage = ""
        self._trial = self._name = ""
        self._began = self._printed = time.monotonic()

    def __enter__(self) -> Self:
        if self._stream.isatty():
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(file=self._stream),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # only if standard output is a terminal
            )
            self._bars.start()
        return self

    @contextmanager
    def for_trial(self, name: str) -> "Iterator[Progress]":
        """The progress of one of several concurrent trials, with its own lines and bar."""
        made = Progress(self._stream)
        made._bars, made._trial, made._name = self._bars, name, f"{name}: "
        try:
            yield made
        finally:
            made._drop_bar()

    def __exit__(self, *exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def say(self, line: str) -> None:
        """Writes a line, above the bars if there are any."""
        if self._bars is not None:
            self._bars.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self._stream, flush=True)

    def stage(self, what: str, done: int = 0, total: int = 0, note: str = "") -> None:
        """Shows the progress of the current stage of the current trial, such as "train".

        `total` is 0 if the number of units is unknown. `note` has a few words, such as the last
        loss.
        """
        now = time.monotonic()
        new = what != self._stage
        if new:
            self._stage, self._began = what, now
            self._drop_bar()
        elapsed = now - self._began
        left = elapsed * (total - done) / done if 0 < done < total else None
        tail = ", ".join(
            part for part in (note, f"{duration(left)} left" if left is not None else "") if part
        )
        if self._bars is not None:
            self._show(what, done, total, tail)
        elif new or done == total or now - self._printed >= LINE_SECONDS:
            self._printed = now
            head = f"[{self._trial}] " if self._trial else ""
            count = f" {done}/{total}" if total else ""
            self.say(f"{head}{what}{count}{': ' + tail if tail else ' ...' if not total else ''}")

    def _show(self, what: str, done: int, total: int, note: str) -> None:
        """Draws the bar of the current stage."""
        assert self._bars is not None
        if self._current is None:
            self._current = self._bars.add_task(self._name + what, total=total or None, note=note)
        self._bars.update(self._current, completed=done, total=total or None, note=note)

    def _drop_bar(self) -> None:
        """Removes the bar of the last stage, since rich cannot reset its total."""
        if self._bars is not None and self._current is not None:
            self._bars.remove_task(self._current)
            self._current = None

    def trial(self, name: str, done: int, total: int, left: float | None) -> None:
        """Shows that a trial of a sweep starts.

        `done` of `total` trials are finished; `left` are the estimated seconds until the end of the
        sweep, or None.
        """
        self._trial, self._stage = name, ""
        self._drop_bar()
        if self._bars is None:
            note = _time_left(left)
            self.say(f"trial {done + 1} of {total}: {name}{', ' + note if note else ''}")
        else:
            self._show_sweep(f"sweep: {name}", done, total, left)

    def finished(self, line: str, done: int, total: int, left: float | None) -> None:
        """Writes a line about a finished trial of a sweep; see `trial` for the other arguments."""
        self.say(line)
        if self._bars is not None:
            self._show_sweep("sweep", done, total, left)
        elif note := _time_left(left):
            self.say(f"{done} of {total} trials done, {note}")

    def _show_sweep(self, title: str, done: int, total: int, left: float | None) -> None:
        """Draws the bar of the sweep."""
        assert self._bars is not None
        if self._sweep is None:
            self._sweep = self._bars.add_task("sweep", total=total, note="")
        note = _time_left(left)
        self._bars.update(self._sweep, description=title, completed=done, total=total, note=note)


def _time_left(seconds: float | None) -> str:
    """The time left as "about 45 s left"; "" for None."""
    return "" if seconds is None else f"about {duration(seconds)} left"


def duration(seconds: float) -> str:
    """Returns "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def print_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints the header and the lines in aligned columns."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, *lines):
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())
