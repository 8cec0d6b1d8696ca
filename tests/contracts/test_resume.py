"""Contract 9: a trial that is stopped, however often and however hard, ends as if it never was.

Real processes of the command line are killed (SIGKILL) and asked to stop (SIGTERM); in-process
interruptions stop at every kind of step. What is compared: delta.safetensors and predictions.jsonl
byte for byte, metrics.jsonl but for its timings, and the row's metrics.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from softprompt import cli
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.results import read_result
from softprompt.training.logs import read_line
from softprompt.trials.evaluate import evaluate_trials
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session
from tests.contracts.trials import StopAt, check_same
from tests.own_task import REPOSITORY, Lines, make_config, train_command, words, write_task
from tests.tiny import write_llama_folder

LONG = {  # long enough to be hit, with something of everything between checkpoints
    "train__steps": 400,
    "train__batch": 6,
    "eval__every": 50,
    "log__checkpoint_every": 20,
    "optimizer__rate": 0.05,
    "method__length": 8,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A task and where its trials are."""
    return write_task(tmp_path_factory.mktemp("resume"))


def logged(folder):
    """The last step in a log that another process may be writing, -1 where there is none."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return max([line["step"] for line in map(read_line, lines) if line], default=-1)


def wait_for(process, happened):
    """Waits until something happened while the process runs; returns whether it did."""
    end = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < end:
        if happened():
            return True
        time.sleep(0.001)
    return False


def half_written(folder):
    """Checkpoints that are being written, or that a kill left half-written."""
    root = folder / "checkpoints"
    return [name for name in os.listdir(root) if not name.isdigit()] if root.is_dir() else []


def in_a_write(folder):
    """Whether a process that has gone on from what is there now is writing a checkpoint."""
    before = logged(folder)
    return lambda: logged(folder) > before and bool(half_written(folder))


def after(seconds):
    """Whether so many seconds have passed since it was first asked."""
    asked = []

    def passed():
        asked.append(time.monotonic())
        return asked[-1] - asked[0] > seconds

    return passed


class Launcher:
    """Starts the same command again and again, each time with what the last one left."""

    def __init__(self, command, folder, cache):
        self.command, self.folder, self.said = command, folder, []
        # Its processes compile once between them; the reference compiles for itself.
        self.env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self):
        return subprocess.Popen(
            self.command, cwd=REPOSITORY, env=self.env, stderr=subprocess.PIPE, text=True
        )

    def stop(self, number, happened):
        """Sends a signal when something happened; returns the exit code."""
        process = self.start()
        try:
            if wait_for(process, happened):
                process.send_signal(number)
            self.said.append(process.communicate(timeout=240)[1])
        finally:
            process.kill()
        return process.returncode

    def finish(self):
        return self.stop(signal.SIGTERM, lambda: False)


@pytest.fixture(scope="module")
def stopped(place, tiny_folder):
    """A trial killed twice at random steps and once in a write, then asked to stop at several
    moments, then ended. A signal ends the command with its code and one line, without a traceback.

    Beside it, the same trial left alone.
    """
    command = [train_command(place, tiny_folder, place / name, **LONG) for name in ("w", "alone")]
    alone = subprocess.Popen(command[1], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    launcher = Launcher(command[0], place / "w", place / "cache")
    folder, random = place / "w", np.random.default_rng(9)
    try:
        for _ in range(2):
            target = logged(folder) + int(random.integers(15, 75))
            code = launcher.stop(signal.SIGKILL, lambda at=target: logged(folder) >= at)
            assert code == -signal.SIGKILL, launcher.said[-1][-2000:]
        for _ in range(3):  # a write may end before the signal comes
            code = launcher.stop(signal.SIGKILL, in_a_write(folder))
            assert code == -signal.SIGKILL, launcher.said[-1][-2000:]
            if half_written(folder):
                break
        left = half_written(folder)
        # While JAX is imported, while the model loads, in a write.
        for number, moment in (
            (signal.SIGINT, after(0.7)),
            (signal.SIGHUP, after(3.0)),
            (signal.SIGINT, in_a_write(folder)),
        ):
            code = launcher.stop(number, moment)
            said = launcher.said.pop()
            assert code == (130 if number == signal.SIGINT else 75), said[-2000:]
            assert "Traceback" not in said, said[-2000:]
            assert said.count("interrupted; the same command resumes") == 1 or code == 75, said
        target = logged(folder) + 10
        code = launcher.stop(signal.SIGTERM, lambda: logged(folder) >= target)
        launcher.left, launcher.sigterm = left, (code, logged(folder), read_result(folder))
        launcher.code = launcher.finish()
        assert alone.wait(timeout=240) == 0
    finally:
        alone.kill()
    return launcher


def test_kills_change_nothing(place, stopped):
    """Fails if the data starts over, if a moment or the best delta is not restored, if the log is
    not cut back."""
    assert stopped.code == 0, stopped.said[-1][-2000:]
    check_same(place / "w", place / "alone")
    went_on = [said for said in stopped.said if "resumes from step" in said]
    assert len(went_on) >= len(stopped.said) - 2, "the later processes began from checkpoints"


def test_a_kill_during_a_write_leaves_a_checkpoint_to_go_on_from(stopped):
    """Fails if a checkpoint is written in place: the next process would read half of one."""
    assert stopped.left
    assert "resumes from step" in stopped.said[-2]


def test_sigterm_saves_and_exits_with_75(stopped):
    """Fails if the loop ends without a save, or exits with another code."""
    code, step, row = stopped.sigterm
    assert code == 75
    assert row is None
    assert f"resumes from step {step}\n" in stopped.said[-1], "the step it was asked to stop after"


def test_a_finished_trial_is_left_alone(place, stopped, tiny_folder, capsys):
    """Fails if `run_trial` does not look for a result before it starts."""
    folder = place / "w"
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    argv = ["train", *words(place, tiny_folder, **LONG), "--workdir", str(folder)]
    assert cli.main(argv) == 0
    written = capsys.readouterr()
    assert f"is done already (in {folder})" in written.err
    assert json.loads(written.out)["status"] == "done"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


SHORT = {
    "train__steps": 24,
    "train__batch": 6,
    "eval__every": 5,
    "log__checkpoint_every": 4,
    "log__snapshots": 8,
    "log__every": 3,
    "optimizer__rate": 0.3,
    "method__length": 8,
}


@pytest.fixture(scope="module")
def session():
    return Session(StopAt())


def interrupt(config, folder, session, *, step, number):
    """Runs a trial that is stopped after a step."""
    session.progress.step, session.progress.number = step, number
    expected = KeyboardInterrupt if number == signal.SIGINT else SystemExit
    with pytest.raises(expected) as stop:
        run_trial(config, folder, session=session)
    if number == signal.SIGTERM:
        assert stop.value.code == 75


@pytest.fixture(scope="module")
def whole(place, tiny_folder, session):
    """The folder of a short trial that nothing interrupts."""
    run_trial(make_config(place, tiny_folder, **SHORT), place / "whole", session=session)
    return place / "whole"


@pytest.mark.parametrize(
    ("number", "steps"), [(signal.SIGINT, [2, 8, 13]), (signal.SIGTERM, [4, 11, 22])]
)
def test_interrupted_in_process(place, whole, tiny_folder, session, tmp_path, number, steps):
    """As above, at steps with and without a checkpoint, an evaluation or a snapshot."""
    config = make_config(place, tiny_folder, **SHORT)
    for step in steps:
        interrupt(config, tmp_path / "w", session, step=step, number=number)
    run_trial(config, tmp_path / "w", session=session)
    check_same(tmp_path / "w", whole)
    for step in (8, 16, 24):
        name = f"snapshots/{step}.safetensors"
        assert (tmp_path / "w" / name).read_bytes() == (whole / name).read_bytes()


AVERAGED = {"train__ema": 0.8, "optimizer__name": "adafactor_t5x", "optimizer__max_row_norm": 4.0}
DROPPED = {"train__dropout": 0.3, "method__dropout": 0.2}


def test_more_is_gone_on_with(place, tiny_folder, session, tmp_path):
    """Fails if a checkpoint lacks the average, or the cap of rows, or holds the delta for it; if
    dropout's keys count from where a process began.
    """
    config = make_config(place, tiny_folder, **SHORT, **AVERAGED, **DROPPED)
    run_trial(config, tmp_path / "alone", session=session)
    for step, number in ((6, signal.SIGTERM), (13, signal.SIGINT)):
        interrupt(config, tmp_path / "w", session, step=step, number=number)
    run_trial(config, tmp_path / "w", session=session)
    check_same(tmp_path / "w", tmp_path / "alone")


def test_a_log_line_cut_short_is_cut_off(place, whole, tiny_folder, session, tmp_path):
    """Fails if the log is appended to as it is."""
    config = make_config(place, tiny_folder, **SHORT)
    interrupt(config, tmp_path / "w", session, step=10, number=signal.SIGINT)
    log = tmp_path / "w" / "metrics.jsonl"
    with log.open("a") as file:
        file.write('{"step": 12, "lo')
    run_trial(config, tmp_path / "w", session=session)
    assert all(map(read_line, log.read_text().splitlines()))
    check_same(tmp_path / "w", whole)


def test_a_half_written_checkpoint_is_passed_over(place, whole, tiny_folder, session, tmp_path):
    """Fails if the newest folder is taken for a checkpoint, whatever it holds."""
    config = make_config(place, tiny_folder, **SHORT)
    interrupt(config, tmp_path / "w", session, step=10, number=signal.SIGINT)
    root = tmp_path / "w" / "checkpoints"
    assert sorted(folder.name for folder in root.iterdir()) == ["4", "8"]
    half = root / "12.orbax-checkpoint-tmp"
    half.mkdir()
    (half / "state").mkdir()
    (half / "state" / "manifest.ocdbt").write_bytes(b"\0" * 7)
    run_trial(config, tmp_path / "w", session=session)
    check_same(tmp_path / "w", whole)


def test_stopped_between_training_and_testing(place, whole, tiny_folder, session, tmp_path):
    """Fails if a trial whose training is complete trains on, or forgets its scores."""
    config = make_config(place, tiny_folder, **SHORT)
    run_trial(config, tmp_path / "w", session=session)
    for name in ("result.json", "delta.safetensors", "predictions.jsonl"):
        (tmp_path / "w" / name).unlink()
    run_trial(config, tmp_path / "w", session=session)
    check_same(tmp_path / "w", whole)


STOPPED_WHILE_TESTING = """
import os, signal, time
from softprompt.__main__ import entry
from softprompt.console import Progress

def stage(self, what, *rest):
    if what == "score test":
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

Progress.stage = stage
entry()
"""


@pytest.mark.matrix
def test_sigterm_while_testing_exits_with_75(place, tiny_folder, tmp_path):
    """Fails if SIGTERM kills a process that is not training: the code would say that it failed."""
    folder = tmp_path / "w"
    command = train_command(place, tiny_folder, folder, **SHORT)
    stopped = [sys.executable, "-c", STOPPED_WHILE_TESTING, *command[3:]]
    done = subprocess.run(stopped, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 75, done.stderr[-2000:]
    assert done.stderr.endswith("softprompt: interrupted; the same command resumes\n")
    assert read_result(folder) is None


def test_other_weights_are_not_gone_on_with(place, session, tmp_path):
    """Fails if a checkpoint is restored without a look at the fingerprint it was trained on."""
    config = make_config(place, write_llama_folder(tmp_path / "model"), **SHORT)
    interrupt(config, tmp_path / "w", session, step=5, number=signal.SIGTERM)
    write_llama_folder(tmp_path / "model", seed=1)
    with pytest.raises(UserError, match=rf"^{tmp_path / 'w'}: step 6 was trained on weights"):
        run_trial(config, tmp_path / "w", session=Session(Progress()))


def test_other_data_is_not_gone_on_with(tiny_folder, session, tmp_path):
    """Fails if labels flipped between a kill and the same command go unnoticed, or `evaluate` does
    not say that the test split is another."""
    task = write_task(tmp_path)
    config = make_config(task, tiny_folder, **SHORT)
    interrupt(config, tmp_path / "w", session, step=5, number=signal.SIGTERM)
    for split in ("train", "test"):
        file = task / f"{split}.jsonl"
        file.write_text(file.read_text().replace('"good"', '"bad"', 3))
    with pytest.raises(UserError, match="step 6 was made with other data: the digest of train was"):
        run_trial(config, tmp_path / "w", session=Session(Progress()))
    run_trial(config, tmp_path / "new", session=Session(Progress()))
    lines = Lines()
    evaluate_trials([tmp_path / "new"], progress=lines)
    assert not [line for line in lines.said if "other data" in line]
    write_task(tmp_path)
    evaluate_trials([tmp_path / "new"], progress=lines)
    assert [line for line in lines.said if "digest of test was" in line]


@pytest.mark.matrix
def test_early_stopping_counts_on(place, tiny_folder, session, tmp_path):
    """Fails if the evaluations waited for, or the best score, are not restored."""
    more = {**SHORT, "eval__every": 2, "eval__patience": 4, "train__steps": 60}
    config = make_config(place, tiny_folder, **more)
    row = run_trial(config, tmp_path / "alone", session=session)
    last = row["steps"]
    assert 8 <= last < 60, "patience has run out before the end"
    assert row["metrics"]["selected_step"] == last - 8
    for step in (last - 5, last - 2):
        interrupt(config, tmp_path / "w", session, step=step, number=signal.SIGTERM)
    run_trial(config, tmp_path / "w", session=session)
    check_same(tmp_path / "w", tmp_path / "alone")
    (tmp_path / "w" / "result.json").unlink()
    run_trial(config, tmp_path / "w", session=session)  # does not train on either
    check_same(tmp_path / "w", tmp_path / "alone")


@pytest.mark.real
@pytest.mark.long
def test_smollm2_killed(tmp_path):
    """The same on the real model, killed once."""
    write_task(tmp_path, {"train": 12, "validation": 4, "test": 4}, endings=("film",))
    more = {"train__steps": 8, "log__checkpoint_every": 2, "method__length": 4}
    folders = tmp_path / "w", tmp_path / "alone"
    commands = [
        train_command(tmp_path, "smollm2-135m-instruct-q4", folder, **more) for folder in folders
    ]
    launcher = Launcher(commands[0], folders[0], tmp_path / "cache")
    assert launcher.stop(signal.SIGKILL, lambda: logged(folders[0]) >= 5) == -signal.SIGKILL
    assert launcher.finish() == 0
    assert "resumes from step" in launcher.said[-1]
    subprocess.run(commands[1], cwd=REPOSITORY, check=True, stderr=subprocess.DEVNULL)
    check_same(*folders)
