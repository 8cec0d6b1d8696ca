"""What both sides of the benchmark share: a job in, a JSON row out; times, memory, failures.

Of the standard library alone, for PEFT's interpreter has nothing of ours.
"""

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Job = dict[str, Any]

FEWEST = 3  # timed steps, however long one takes

# What the several libraries say when there is no memory left, in lower case.
NO_MEMORY = ("resource_exhausted", "out of memory", "can't allocate memory", "bad_alloc")
TERMS = "SOFTPROMPT_ACCEPT_TERMS"


def main(measure: Callable[[Job], dict[str, Any]]) -> None:
    """Measures the job whose file the command line names; the last line printed is the row.

    Whatever is raised is the row's status and error. On Linux this process asks to be the first
    that dies when memory runs out.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    first_to_die = Path("/proc/self/oom_score_adj")
    if first_to_die.exists():
        first_to_die.write_text("1000")
    try:
        row = {"status": "done", "error": "", **measure(job)}
    except Exception as error:
        traceback.print_exc()
        row = {"status": status_of(error), "error": " ".join(f"{error}".split())[:300]}
    print("\n" + json.dumps(row), flush=True)


def status_of(error: Exception) -> str:
    """The status "out of memory", "terms not accepted" or "failed"."""
    text = f"{error}".lower()
    if isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY):
        return "out of memory"
    return "terms not accepted" if TERMS.lower() in text else "failed"


def timed(
    step: Callable[[int], float], *, warmup: int, steps: int, limit: float
) -> tuple[list[float], list[float]]:
    """Runs training steps one after another.

    Args:
        step: runs the n-th step, waits until all of it is computed, and returns its loss.
        warmup: steps at first that `limit` does not count.
        steps: further ones.
        limit: seconds after which no further step begins, once `FEWEST` are done.

    Returns:
        Seconds and loss of every step, those of the warm-up included.
    """
    seconds: list[float] = []
    losses: list[float] = []
    for n in range(warmup + steps):
        if len(seconds) >= warmup + FEWEST and sum(seconds[warmup:]) > limit:
            break
        began = time.perf_counter()
        losses.append(step(n))
        seconds.append(time.perf_counter() - began)
    return seconds, losses


def resident() -> int:
    """Bytes of this process in memory now (off Linux: at most until now)."""
    return _kilobytes("VmRSS") * 1024 or _largest()


def peak_resident() -> int:
    """The most bytes of this process in memory until now.

    On Linux that of the running program: `ru_maxrss` also counts the process that started it.
    """
    return _kilobytes("VmHWM") * 1024 or _largest()


def _kilobytes(field: str) -> int:
    """A field of /proc/self/status, 0 where there is none."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def _largest() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
