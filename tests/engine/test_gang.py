"""One worker of several processes: a fake slice of two hosts with four devices each."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from softprompt import cli
from softprompt.results import read_result
from softprompt.trials.engine.claims import QUEUE, View
from softprompt.trials.engine.publish import newest_step
from softprompt.trials.engine.store import open_store
from softprompt.trials.run import run_trial
from tests.contracts.test_devices import TRIAL, check_same, config_of, free_port, session_on
from tests.engine.test_engine_trials import EXPERIMENT, variables
from tests.engine.waiting import wait_for
from tests.own_task import words, write_task
from tests.tiny import write_llama_folder

HOST = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
MORE = {**TRIAL, "train__steps": 40, "log__checkpoint_every": 5, "mesh__model": 2}


def start_host(folder: Path, port: int, number: int) -> subprocess.Popen:
    """Starts the worker of a host of the slice, and keeps what it prints."""
    with (folder / f"host{number}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "softprompt", "work", str(folder / "shared")]
            + ["--distributed", f"localhost:{port},{number},2"],
            env=variables(**HOST, JAX_DISABLE_MOST_OPTIMIZATIONS="1"),
            stdout=log,
            stderr=log,
        )


@pytest.mark.cluster
@pytest.mark.parametrize("killed", [1, 0])
def test_a_slice_of_two_hosts_of_which_one_is_killed(killed, tmp_path, monkeypatch):
    """It equals one process with 8 devices (contract 8), and so do 1 and 4 devices that go on from
    its checkpoint. Both hosts train again within 90 s.

    Mutations: the process that is left waits for the one that is gone; a host that cannot join
    gives up; the first host's claim is not taken over; the child of several processes trains in
    scratch, where the others do not find its checkpoint.
    """
    monkeypatch.chdir(tmp_path)
    write_task(tmp_path)
    write_llama_folder(tmp_path / "model", heads=8, kv_heads=4, width=64)
    config = config_of(tmp_path, **MORE)
    run_trial(config, tmp_path / "alone", session=session_on((4, 2)))
    Path("some.py").write_text(EXPERIMENT)
    sweep = ["sweep", "some.py", "--subset", "1", *words(tmp_path, tmp_path / "model", **MORE)]
    assert cli.main([*sweep, "--workdir", "shared", "--engine", "store"]) == 0
    (job,) = json.loads(Path("shared/plan.json").read_text())["jobs"]
    folder, port, store = tmp_path / "shared" / job["folder"], free_port(), open_store("shared")

    began = time.monotonic()
    hosts = [start_host(tmp_path, port, number) for number in range(2)]
    try:
        wait_for(lambda: newest_step(folder) >= 5, "checkpoint", 150)
        print(f"first checkpoint after {time.monotonic() - began:.0f} s")
        hosts[killed].send_signal(signal.SIGKILL)
        hosts[killed].wait()
        lost, step = time.monotonic(), newest_step(folder)
        hosts[killed] = start_host(tmp_path, port, killed)
        wait_for(lambda: View(store.list(QUEUE)).attempts == {job["trial"]: 2}, "second holder", 90)
        for devices in (1, 4):
            shutil.copytree(folder, tmp_path / f"{devices}")
        wait_for(lambda: newest_step(folder) > step, "newer checkpoint", 90)
        print(f"went on from step {step} after {time.monotonic() - lost:.0f} s")
        assert time.monotonic() - lost < 90
        assert [host.wait(120) for host in hosts] == [0, 0]
    finally:
        for host in hosts:
            host.kill()
    check_same(folder, tmp_path / "alone")
    row = read_result(folder)
    assert row["devices"]["processes"] == 2 and row["devices"]["count"] == 8
    for devices in (1, 4):
        run_trial(config, tmp_path / f"{devices}", session=session_on((devices, 1)))
        check_same(tmp_path / f"{devices}", tmp_path / "alone")
