"""A process that is started again until its exit code is final; in Python and in bash."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from softprompt.trials.engine.restarts import FINAL, keep_running
from softprompt.trials.engine.scripts import render
from tests.engine.waiting import wait_for

WORKER = Path(__file__).with_name("counting_worker.py")


def in_python(command: list[str]) -> tuple[Callable[[], int], Callable[[], None]]:
    """Keeps a command running in a thread; returns what waits for its code, and what stops it."""
    stopping, codes = threading.Event(), []
    thread = threading.Thread(
        target=lambda: codes.append(keep_running(command, stopping)), daemon=True
    )
    thread.start()

    def code() -> int:
        thread.join(20)
        return codes[0]

    return code, stopping.set


def in_bash(command: list[str]) -> tuple[Callable[[], int], Callable[[], None]]:
    """The same in a script with `keep`."""
    final = " ".join(map(str, FINAL))
    script = render("keep.sh") + f'terminate() {{ kill -TERM "$1"; }}\nkeep "{final}" "$@"\n'
    process = subprocess.Popen(["bash", "-c", script, "keep", *command])
    return lambda: process.wait(20), process.terminate


@pytest.fixture(params=[in_python, in_bash])
def keep(request):
    return request.param


@pytest.mark.parametrize("code", [0, 1, 2, 3])
def test_final_codes_end_it(keep, code, tmp_path):
    """Breaks when a worker is started again though nothing is left, after a user's mistake, or once
    a minute while the sweep is stopped.
    """
    wait, _ = keep(["bash", "-c", f"echo >> {tmp_path}/starts; exit {code}"])
    assert wait() == code
    assert (tmp_path / "starts").read_text() == "\n"


def test_killed_it_starts_again_and_stopped_it_saves(keep, tmp_path):
    """Breaks when kill -9 ends it, when SIGTERM does not reach the process, when its own exit code
    is not waited for, or when it starts again after it was to stop.
    """
    log = lambda: (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""  # noqa: E731
    wait, stop = keep([sys.executable, str(WORKER), str(tmp_path), "1000", "0.1"])
    wait_for(lambda: "count 1" in log(), "counting", 20)
    os.kill(int(log().split()[1]), signal.SIGKILL)
    wait_for(lambda: log().count("count 1\n") == 2, "counting again", 20)
    stop()
    assert wait() == 75
    assert log().endswith("saved\n") and log().count("start ") == 2


def test_the_process_ends_with_the_one_that_keeps_it(tmp_path):
    """Breaks when the process is not tied to its parent: a supervisor that is killed would leave a
    worker behind, beside the one that the next supervisor starts.
    """
    words = [sys.executable, str(WORKER), str(tmp_path), "1000", "0.1"]
    code = "import sys, threading\nfrom softprompt.trials.engine.restarts import keep_running\n"
    code += "keep_running(sys.argv[1:], threading.Event())"
    parent = subprocess.Popen([sys.executable, "-c", code, *words])
    log = lambda: (tmp_path / "log").read_text() if (tmp_path / "log").exists() else ""  # noqa: E731
    wait_for(lambda: "count 1" in log(), "counting", 20)
    parent.kill()
    parent.wait()
    wait_for(lambda: log().endswith("saved\n"), "an end", 10)
