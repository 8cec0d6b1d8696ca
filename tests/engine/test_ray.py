"""Workers on Ray: where they are placed, and a cluster whose parts are killed."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray")

import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.exceptions import OutOfMemoryError  # noqa: E402

from softprompt.trials.engine.ray import Driver, Placement, placements  # noqa: E402
from tests.engine import tiny_sweep  # noqa: E402
from tests.engine.waiting import wait_for  # noqa: E402

REPOSITORY = Path(__file__).parents[2]
TIMES = re.compile("second|share")  # what a log says of speed


def node(identity: str, *, slice_name="", worker=0, topology="", alive=True, **resources) -> dict:
    """An entry of `ray.nodes()`."""
    labels = {"ray.io/tpu-slice-name": slice_name, "ray.io/tpu-worker-id": str(worker)}
    labels |= {"ray.io/tpu-topology": topology}
    return {
        "NodeID": identity,
        "Alive": alive,
        "NodeManagerAddress": f"host-{identity}",
        "Resources": resources,
        "Labels": labels if slice_name else {},
    }


def test_every_whole_host_gets_a_worker():
    """Breaks when a slice that lacks a host gets workers, when the head without accelerators gets
    one, or when the processes of a slice are numbered by the order in which nodes joined.
    """
    nodes = [
        node("0a0000", CPU=8),  # the head
        node("0b0000", slice_name="one", topology="2x4", TPU=8),
        node("0c0000", slice_name="gone", topology="2x4", TPU=8, alive=False),
        node("0e0000", slice_name="two", worker=1, topology="2x4", TPU=4),
        node("0d0000", slice_name="two", worker=0, topology="2x4", TPU=4),
        node("0f0000", slice_name="half", worker=1, topology="2x4", TPU=4),
    ]
    address = f"host-0d0000:{20000 + 0x0D0000 % 10000}"
    assert (
        placements(nodes, "TPU")
        == placements(nodes, "")
        == [
            Placement("0b0000", "", "TPU", 8),
            Placement("0d0000", f"{address},0,2", "TPU", 4),
            Placement("0e0000", f"{address},1,2", "TPU", 4),
        ]
    )
    assert (
        placements(nodes, "CPU") == placements(nodes[:1], "") == [Placement("0a0000", "", "CPU", 8)]
    )


def test_a_supervisor_that_ray_kills_for_memory_is_started_again(monkeypatch):
    """Breaks when only the errors of actors are caught: the driver ends with a traceback."""

    def get(ref: object) -> int:
        raise OutOfMemoryError("no memory is left")

    said: list[str] = []
    driver = Driver([], "sweep", "CPU", said.append)
    driver._running = {Placement("0a", "", "CPU", 8): (None, "ref")}
    monkeypatch.setattr(ray, "wait", lambda refs, timeout: (refs, []))
    monkeypatch.setattr(ray, "get", get)
    driver.collect(1.0)
    assert said[0].startswith("lost a supervisor: ") and "memory" in said[0]
    assert driver.code is None and not driver._running


@pytest.fixture
def cluster(monkeypatch):
    """A Ray cluster of a head without processors; `add_slice(cluster, name)` adds hosts."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 0, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    running = Cluster(initialize_head=True, head_node_args=small)
    yield running
    running.shutdown()


def add_slice(cluster: Cluster, name: str) -> object:
    """Adds a node that says it is a host with four chips of a TPU slice."""
    labels = {"slice-name": name, "worker-id": "0", "topology": "2x2", "pod-type": "v6e-4"}
    return cluster.add_node(
        num_cpus=1,
        object_store_memory=80 * 2**20,
        resources={"TPU": 4},
        labels={f"ray.io/tpu-{key}": value for key, value in labels.items()},
    )


@pytest.fixture
def run():
    """Starts commands of softprompt; those that still run at the end are killed."""
    started = []

    def start(*words: str, **environment: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "softprompt", *words]
        started.append(subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **environment}))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def workers(workdir: Path, children: bool = False) -> list[psutil.Process]:
    """The processes of workers on a sweep, or those in which their trials run."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.cmdline()[-2:] == ["work", str(workdir)]:
                found += process.children() if children else [process]
    return found


def over(workdir: Path) -> int:
    """The number of trials with a result."""
    return len(list(workdir.glob("*/result.json")))


def results(workdir: Path) -> dict[str, tuple]:
    """What must not depend on where a trial ran, by the trial's folder."""
    found = {}
    for folder in (file.parent for file in workdir.glob("*/result.json")):
        row = json.loads((folder / "result.json").read_text())
        if row["status"] != "done":
            found[folder.name] = (row["status"], row["error"])
            continue
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        log = [{key: line[key] for key in line if not TIMES.search(key)} for line in lines]
        predictions = (folder / "predictions.jsonl").read_text()
        delta = (folder / "delta.safetensors").read_bytes()
        found[folder.name] = (row["metrics"], log, predictions, delta)
    return found


# Ray starts its processes by a fork, which JAX warns of where other tests have opened its devices.
@pytest.mark.filterwarnings(r"ignore:os.fork\(\) was called:RuntimeWarning")
@pytest.mark.cluster
def test_a_sweep_whose_parts_are_killed_equals_an_undisturbed_one(cluster, run, tmp_path):
    """24 trials on three slices, of which one always fails, end with the bits of a local sweep.

    A trial's process and a node are killed, a worker gets SIGTERM, a node is added, and the driver
    is killed and run again, without access to a device. Breaks when a supervisor does not start its
    worker again (exit code 75, or killed), when the driver does not regroup, when supervisors end
    with the driver, when the driver opens a device, or when a worker outlives its node.
    """
    experiment = str(tiny_sweep.write(tmp_path))
    assert run("sweep", experiment, "--workdir", str(tmp_path / "alone")).wait(600) == 1

    workdir = tmp_path / "shared"
    words = ["sweep", experiment, "--workdir", str(workdir), "--engine", "ray"]
    words += ["--address", cluster.address]
    doomed = add_slice(cluster, "one")
    add_slice(cluster, "two")
    driver = run(*words, JAX_PLATFORMS="tpu")
    wait_for(lambda: over(workdir) >= 3, "three trials", 200)
    workers(workdir, children=True)[0].kill()
    time.sleep(2)
    workers(workdir)[0].send_signal(signal.SIGTERM)
    add_slice(cluster, "three")
    wait_for(lambda: len(workers(workdir)) == 3, "a third worker", 100)
    cluster.remove_node(doomed, allow_graceful=False)
    wait_for(lambda: len(workers(workdir)) == 2, "an end of the node's worker", 60)
    done = over(workdir)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    wait_for(lambda: over(workdir) > done, "work without a driver", 100)
    assert done < 24, "all was over before the driver was killed"
    assert run(*words, JAX_PLATFORMS="tpu").wait(300) == 1

    wait_for(lambda: not workers(workdir), "an end of all workers", 10)
    rows = results(workdir)
    assert sorted(rows[name][0] == "failed" for name in rows) == [False] * 23 + [True]
    assert rows == results(tmp_path / "alone")
    assert (workdir / "table.md").exists()
