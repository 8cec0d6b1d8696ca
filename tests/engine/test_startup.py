"""The startup script, run in an empty home."""

import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from softprompt.trials.engine.launch import Order, startup_script
from tests.engine.waiting import wait_for

WORKER = Path(__file__).with_name("counting_worker.py")
PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "softprompt"
version = "0"

[project.optional-dependencies]
some = []

[project.scripts]
softprompt = "stand_in:main"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """The script for an archive of a small project that also is called softprompt.

    Its command `softprompt work FOLDER` counts to 40 in FOLDER.
    """
    folder = tmp_path_factory.mktemp("startup")
    source = folder / "source"
    source.mkdir()
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "constraints.txt").write_text("")
    begin = "def main() -> int:\n"
    arguments = "    sys.argv = [sys.argv[0], sys.argv[2], '40', '0.1']\n"
    (source / "stand_in.py").write_text(WORKER.read_text().replace(begin, begin + arguments))
    with tarfile.open(folder / "code.tar.gz", "w:gz") as archive:
        archive.add(source, ".")
    (folder / "counts").mkdir()
    order = Order(str(folder / "counts"), "", str(folder / "code.tar.gz"), "abc", "", 1, False, "")
    file = folder / "startup.sh"
    file.write_text(startup_script(order, extras="some"))
    return file


@contextmanager
def running(script: Path, home: Path) -> Iterator[subprocess.Popen]:
    """Runs the script in a home, with nothing of this environment but the way to the index."""
    kept = {
        name: os.environ[name] for name in os.environ if name.startswith(("PIP_", "UV_", "SSL"))
    }
    environment = kept | {"HOME": str(home), "PATH": "/usr/local/bin:/usr/bin:/bin"}
    with (home / "out").open("w") as out:
        process = subprocess.Popen(
            ["bash", str(script)], env=environment, stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.cluster
def test_python_a_worker_and_its_return_after_kill_9(script, tmp_path):
    """Breaks when the script does not install into an empty home, does not start the worker again
    after kill -9, does not pass SIGTERM on, starts it again after exit code 0, or installs anew
    what is there.
    """
    counts = script.parent / "counts"
    log = lambda: (counts / "log").read_text() if (counts / "log").exists() else ""  # noqa: E731
    with running(script, tmp_path) as process:
        wait_for(lambda: "count 3" in log() or process.poll() is not None, "worker", 300)
        worker = log().split("start ")[-1].split()[0]
        os.kill(int(worker), signal.SIGKILL)
        wait_for(lambda: log().count("start ") == 2, "second start", 10)
        wait_for(lambda: log().count("count 3") == 2, "counting", 10)
        assert "starts again in 1 s" in (tmp_path / "out").read_text()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75
        assert log().splitlines()[-1] == "saved"
    began = time.monotonic()
    with running(script, tmp_path) as process:
        assert process.wait(30) == 0
        assert log().splitlines()[-1] == "done" and log().count("start ") == 3
    assert time.monotonic() - began < 20
