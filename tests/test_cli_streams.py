"""The command line where the shell, the disk or the environment takes something away."""

import os
import signal
import subprocess
import sys

import pytest

from tests.own_task import REPOSITORY


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--version >&-", "standard output is closed"),
        ("models >/dev/full", "cannot write any more: No space left on device"),
        ("predict --run nowhere <&-", "standard input is closed"),
        ("train --workdir w", "JAX_PLATFORMS is 'nowhere': Unable to initialize backend 'nowhere'"),
    ],
)
def test_what_a_shell_takes_away(tmp_path, command, message):
    """Breaks when a closed stream, a full disk or a missing platform ends in a traceback."""
    done = subprocess.run(
        f"exec {sys.executable} -m softprompt {command}",
        shell=True,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "nowhere"},
    )
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"softprompt: error: {message}")
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


def test_a_closed_standard_error_is_replaced(tmp_path):
    """Breaks when what is written to it is written to standard output, or nowhere to be found."""
    done = subprocess.run(
        f"exec {sys.executable} -m softprompt tarin 2>&-",
        shell=True,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    assert (done.returncode, done.stdout) == (2, b"")


SAVING = """
import sys, time
from softprompt import interrupts
interrupts.exit_at_once()
with interrupts.deferred_signals():
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_a_process_that_saves():
    """Breaks when a second Ctrl-C waits for the save that the first one asked for."""
    command = [sys.executable, "-c", SAVING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=REPOSITORY) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        said = process.stderr.read()
    assert said == "softprompt: interrupted; the same command resumes\n"
