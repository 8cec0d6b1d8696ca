"""Workers on a Ray cluster: one supervisor on each host, which keeps a worker running there.

The driver starts supervisors on the hosts that join, and waits. Supervisors do not end with it, so
workers go on when it dies, and the same command finds them again. Ray places and watches; a worker
is a process outside of Ray's own, so that no process of Ray's pool ever holds an accelerator.

Source: https://docs.ray.io/en/releases-2.60.0/ray-core/actors/named-actors.html, and the labels of
TPU nodes in ray._private.accelerators.tpu of Ray 2.60.
"""

import hashlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from softprompt import interrupts
from softprompt.errors import UserError, one_line
from softprompt.trials.engine.restarts import keep_running

NAMESPACE = "softprompt"
LABEL = "ray.io/tpu-"
KINDS = ("TPU", "GPU", "CPU")
REGROUP_SECONDS = 10.0
LINGER_SECONDS = 60.0
MISTAKE = 2  # exit code of a worker that cannot work on its host


@dataclass(frozen=True)
class Placement:
    """A process of a worker on a host.

    Attributes:
        node: the id of Ray's node.
        distributed: "HOST:PORT,I,N" for one of N processes on a slice's N hosts, else "".
        resource: what it takes, "TPU", "GPU" or "CPU".
        amount: how much of it: all that the host has.
    """

    node: str
    distributed: str
    resource: str
    amount: float


def placements(nodes: Sequence[Mapping[str, Any]], resource: str) -> list[Placement]:
    """Returns where processes of workers run now: on every host, but on slices only if whole.

    Args:
        nodes: what `ray.nodes()` returns.
        resource: "TPU", "GPU" or "CPU": hosts without it are left out. "" is the first of these
            that any host has.
    """
    alive = [node for node in nodes if node["Alive"]]
    kinds = (kind for kind in KINDS if any(node["Resources"].get(kind) for node in alive))
    resource = resource or next(kinds, "CPU")
    slices: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for node in alive:
        if node["Resources"].get(resource, 0) >= 1:
            slices[node["Labels"].get(f"{LABEL}slice-name", node["NodeID"])].append(node)
    found = []
    for hosts in slices.values():
        hosts.sort(key=lambda host: int(host["Labels"].get(f"{LABEL}worker-id", 0)))
        if len(hosts) != _hosts_of_slice(hosts[0]):
            continue
        port = 20000 + int(hosts[0]["NodeID"][:6], 16) % 10000
        for index, host in enumerate(hosts):
            joins = f"{hosts[0]['NodeManagerAddress']}:{port},{index},{len(hosts)}"
            joins = joins if len(hosts) > 1 else ""
            found.append(Placement(host["NodeID"], joins, resource, host["Resources"][resource]))
    return found


def _hosts_of_slice(node: Mapping[str, Any]) -> int:
    """How many hosts the slice of a node has, from its topology such as "4x4"."""
    topology = node["Labels"].get(f"{LABEL}topology")
    if topology is None:
        return 1
    chips = math.prod(int(side) for side in topology.split("x"))
    return max(1, round(chips / node["Resources"].get("TPU", chips)))


_remote: Any = ray.remote  # its types know the options of tasks only


@_remote(num_cpus=0, max_concurrency=100)
class Supervisor:
    """Keeps a process running on its host; an actor.

    It ends by itself a minute after the process has ended for good, should no driver be there.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._stopping = threading.Event()
        self._ended = threading.Event()
        self._code = 0
        command = [sys.executable, *arguments]
        threading.Thread(target=self._run, args=(command,), daemon=True).start()

    def _run(self, command: Sequence[str]) -> None:
        self._code = keep_running(command, self._stopping)
        self._ended.set()
        time.sleep(LINGER_SECONDS)
        os._exit(0)

    def wait(self) -> int:
        """Waits for the process's last exit code, and returns it."""
        self._ended.wait()
        return self._code

    def stop(self) -> None:
        """Stops the process: SIGTERM, after 30 s SIGKILL."""
        self._stopping.set()


class Driver:
    """The supervisors of a sweep on the hosts of a cluster; for the arguments see `run`."""

    def __init__(
        self, arguments: Sequence[str], sweep: str, resource: str, say: Callable[[str], None]
    ) -> None:
        self._arguments, self._resource, self._say = list(arguments), resource, say
        self._sweep = hashlib.sha256(sweep.encode()).hexdigest()[:12]
        self._running: dict[Placement, tuple[Any, ray.ObjectRef]] = {}
        self._codes: dict[Placement, int] = {}
        self._said = ""

    def regroup(self) -> None:
        """Starts supervisors where they are missing, and stops those of broken slices."""
        wanted = set(placements(ray.nodes(), self._resource))
        for gone in self._running.keys() - wanted:
            self._running.pop(gone)[0].stop.remote()
        for new in wanted - self._running.keys() - self._codes.keys():
            supervisor = self._start(new)
            self._running[new] = (supervisor, supervisor.wait.remote())
        self._report()

    def _start(self, placement: Placement) -> Any:
        """Starts the supervisor of a placement, or finds the one that is there."""
        joins = ["--distributed", placement.distributed] if placement.distributed else []
        resource, amount = placement.resource, placement.amount
        takes: dict[str, Any] = {f"num_{resource.lower()}s": amount}
        return Supervisor.options(  # type: ignore[attr-defined]
            name=f"{self._sweep} {placement.node} {placement.distributed}",
            get_if_exists=True,
            lifetime="detached",
            scheduling_strategy=NodeAffinitySchedulingStrategy(placement.node, soft=False),
            **({"resources": {"TPU": amount}} if resource == "TPU" else takes),
        ).remote([*self._arguments, *joins])

    def collect(self, seconds: float) -> None:
        """Waits for processes that end for good, at most so many seconds."""
        refs = {ref: placement for placement, (_, ref) in self._running.items()}
        if not refs:
            time.sleep(seconds)
            return
        ended, _ = ray.wait(list(refs), timeout=seconds)
        for ref in ended:
            supervisor, _ = self._running.pop(refs[ref])
            try:
                self._codes[refs[ref]] = ray.get(ref)
                ray.kill(supervisor)
            except RayError as error:  # with its node, or alone: then another one is started
                self._say(f"lost a supervisor: {one_line(error)}")
        if ended:
            self._report()

    def stop(self, seconds: float) -> None:
        """Stops all processes, and waits for them, at most so many seconds."""
        for supervisor, _ in self._running.values():
            supervisor.stop.remote()
        end = time.monotonic() + seconds
        while self._running and time.monotonic() < end:
            self.collect(1.0)

    @property
    def code(self) -> int | None:
        """The sweep's exit code once every process has ended for good, else None."""
        codes = sorted(self._codes.values(), key=lambda code: (code == MISTAKE, code))
        return codes[0] if codes and not self._running else None

    def _report(self) -> None:
        line = f"{len(self._running)} hosts with a worker, {len(self._codes)} have ended"
        if line != self._said:
            self._say(line)
        self._said = line


def run(
    arguments: Sequence[str], *, sweep: str, resource: str, address: str, say: Callable[[str], None]
) -> int:
    """Runs workers on the hosts of a cluster, those that join later too, until nothing is left.

    SIGTERM and Ctrl-C stop the workers, which save. If this process is killed, they go on.

    Args:
        arguments: of Python, for a process that runs a worker. The processes on a slice of several
            hosts also get `--distributed HOST:PORT,I,N`.
        sweep: what tells this sweep's supervisors from others', such as its folder.
        resource: "TPU", "GPU" or "CPU": what a host must have, and what a worker takes all of; ""
            is the first of these that any host has.
        address: of Ray's head, "HOST:PORT", or "auto".
        say: reports a line.

    Returns:
        0 if nothing is left to do, 1 if some trial failed, 3 after `softprompt stop`, 2 if every
        worker found a mistake.

    Raises:
        UserError: no cluster at this address.
        SystemExit: 75 after SIGTERM.
        KeyboardInterrupt: after Ctrl-C.
    """
    _connect(address)
    try:
        with interrupts.deferred_signals():
            driver = Driver(arguments, sweep, resource, say)
            regrouped = -math.inf
            while (code := driver.code) is None:
                if interrupts.requested():
                    driver.stop(40.0)
                    raise interrupts.exit_exception(interrupts.requested())
                if time.monotonic() - regrouped >= REGROUP_SECONDS:
                    driver.regroup()
                    regrouped = time.monotonic()
                driver.collect(1.0)
            return code
    finally:
        ray.shutdown()


def _connect(address: str) -> None:
    """Connects to a cluster, and keeps this process's handlers of signals, which Ray replaces.

    To an address at which nothing listens Ray would try for minutes.

    Raises:
        UserError: there is none.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, _, port = address.rpartition(":")
    handlers = {number: signal.getsignal(number) for number in interrupts.CODES}
    try:
        if port.isdecimal():
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, namespace=NAMESPACE)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--address {address}: no Ray cluster ({one_line(error)})") from error
    for number, handler in handlers.items():
        signal.signal(number, handler)
