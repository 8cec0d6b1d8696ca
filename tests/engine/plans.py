"""Plans of trials that only sleep, and workers that run them as processes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

from softprompt.source import commit
from softprompt.trials.engine.plan import PLAN, Job, Plan
from softprompt.trials.engine.store import open_store

REPOSITORY = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("stub_child.py")

WORKER = """
import sys
from softprompt.errors import UserError
from softprompt import interrupts
from softprompt.trials.engine.claims import Timing
from softprompt.trials.engine.store import FolderStore
from softprompt.trials.engine.worker import work

def logged(method):
    def call(store, name, content):
        wrote = method(store, name, content)
        if wrote is not False:
            with open({ends!r} + ".writes", "a") as file:
                file.write(name + "\\n")
        return wrote
    return call

FolderStore.write, FolderStore.create = logged(FolderStore.write), logged(FolderStore.create)
interrupts.exit_at_once()
command = [sys.executable, {stub!r}, {ends!r}]
try:
    sys.exit(work({workdir!r}, command=command, timing=Timing(**{timing!r})))
except UserError as error:
    print(error, file=sys.stderr)
    sys.exit(2)
"""


def job(number: int, *, steps: int = 1, seconds: float = 0.0, then: str = "done") -> Job:
    """A trial for tests/engine/stub_child.py."""
    config = {"steps": steps, "seconds": seconds, "then": then}
    return Job(f"{number:010x}", f"t{number}", f"t{number}-{number:010x}", "g", "m", 0, config)


def write_plan(workdir: str, jobs: list[Job]) -> Plan:
    """Writes a plan of such trials."""
    plan = Plan("stub", "full", commit(), "", "", os.urandom(8).hex(), tuple(jobs))
    open_store(workdir).write(PLAN, json.dumps(dataclasses.asdict(plan)).encode())
    return plan


def start(workdir: str, ends: Path, **timing: float) -> subprocess.Popen[str]:
    """Starts a worker, which notes each file that it has written in ENDS.writes."""
    timing = {"beat": 0.5, "dead": 3.0, "publish": 0.0, "grace": 2.0} | timing
    code = WORKER.format(stub=str(STUB), ends=str(ends), workdir=str(workdir), timing=timing)
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
