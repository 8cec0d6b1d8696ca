"""Workers on Slurm: the script of the job array, and a real cluster that preempts its jobs."""

import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.errors import UserError
from softprompt.trials.engine.slurm import batch_script, submit
from tests.engine import slurm_cluster
from tests.engine.slurm_cluster import output
from tests.engine.waiting import wait_for

WORKER = Path(__file__).with_name("counting_worker.py")


def test_the_script_has_the_options_of_the_user_last():
    """Breaks when the array is not requeued or truncates its logs, or when the user's options come
    before the script's, which would win.
    """
    options = "--partition=gpu --gres=gpu:1"
    script = batch_script(["softprompt", "work", "a b"], workers=8, options=options, logs="/logs")
    head = [line.removeprefix("#SBATCH ") for line in script.splitlines() if "#SBATCH" in line]
    assert head[-1] == options
    assert {"--array=1-8", "--requeue", "--open-mode=append", "--signal=B:TERM@60"} <= set(head)
    assert "worker=(softprompt work 'a b')" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


@pytest.mark.parametrize("options", ["gpu", "--comment='a", "--time=5\nrm"])
def test_options_that_are_none_are_refused(options):
    """Breaks when the check is left out: sbatch would take the first word for the script's end."""
    with pytest.raises(UserError) as raised:
        batch_script(["work"], workers=1, options=options, logs="/logs")
    assert "--slurm" in str(raised.value) and repr(options) in str(raised.value)


def test_no_slurm_is_one_line(monkeypatch):
    """Breaks when `submit` lets FileNotFoundError through."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="sbatch"):
        submit(["work"], workers=1, options="", logs="/logs")


def start_counting(folder: Path, options: str, last: int = 12) -> None:
    """Submits one job that counts, and waits until it does."""
    folder.mkdir()
    command = [sys.executable, str(WORKER), str(folder), str(last), "0.5"]
    submit(command, workers=1, options=options, logs=str(folder / "logs"))
    wait_for(lambda: "count 2" in log(folder), "counting", 30)


def log(folder: Path) -> str:
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def starts(folder: Path) -> list[int]:
    """What each start of the worker found counted."""
    lines = log(folder).splitlines()
    return [int(line.split()[-1]) for line in lines if line.startswith("start")]


@pytest.mark.cluster
@pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing())
def test_preempted_jobs_and_those_at_their_time_limit_go_on(tmp_path, monkeypatch):
    """A worker that is preempted, one near its time limit and one that is killed end their work.

    Breaks when the worker is no step of its job, which then is preempted without SIGTERM; when the
    script does not requeue at the time limit; when `keep` does not restart after kill -9; and when
    the log is truncated.
    """
    with slurm_cluster.cluster(tmp_path / "slurm") as environment:
        for name in ("PATH", "SLURM_CONF"):
            monkeypatch.setenv(name, environment[name])
        limited, preempted = tmp_path / "limited", tmp_path / "preempted"
        start_counting(limited, "--partition=steady --time=1 --signal=B:TERM@50", last=120)
        start_counting(preempted, "--partition=low")
        urgent = ["sbatch", "--partition=high", "--output=/dev/null", "--wrap=sleep 2"]
        subprocess.run(urgent, check=True, capture_output=True)
        wait_for(lambda: "saved" in log(preempted), "SIGTERM", 15)
        wait_for(lambda: "done" in log(preempted), "end of the preempted worker", 60)
        assert len(starts(preempted)) == 2 and starts(preempted)[1] >= 2

        wait_for(lambda: "saved" in log(limited), "SIGTERM before the time limit", 60)
        wait_for(lambda: len(starts(limited)) == 2, "a second start", 60)
        pid = log(limited).split("start ")[-1].split()[0]
        subprocess.run(["kill", "-9", pid], check=True)
        (limited / "count").write_text("118")
        wait_for(lambda: "done" in log(limited), "end of the limited worker", 30)
        assert len(starts(limited)) == 3 and 2 <= starts(limited)[1] < 118
        wait_for(lambda: not output(["squeue", "-h"], environment), "an empty queue", 30)
        written = "".join(file.read_text() for file in (limited / "logs").iterdir())
        assert "exit code 75" in written and "starts again in 1 s" in written
