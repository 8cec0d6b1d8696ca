"""How much memory a device has, what lies there, and what a program needs."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

# Of a device's memory: what weights and trials beside them may take, and what models may take that
# are kept for a later trial.
MEMORY_SHARE, KEPT_SHARE = 0.6, 0.3


def device_memory() -> int:
    """Bytes of a device's memory, or on a CPU those that this process may use."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *container_limits()])


def container_limits(root: Path = Path("/")) -> list[int]:
    """Returns the limits in bytes of the control groups that this process is in.

    A group's parents limit it too. In a container the path of its group may be the host's, of which
    only the container's own part is there.

    Source: cgroups(7), and the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.

    Args:
        root: of the file system.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    limits = []
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            top, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            top, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        own = top / group.lstrip("/")
        limits += [
            int(text)
            for folder in (own, *own.parents)
            if folder.is_relative_to(top) and (text := _text(folder / name)).isdecimal()
        ]
    return limits


def _text(file: Path) -> str:
    """A file's text without blanks around it; "" where it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def bytes_of(tree: Any) -> int:
    """Bytes of arrays, or of what has their shapes, however they lie."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_here(tree: Any) -> int:
    """Bytes that arrays take on one of their devices."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def out_of_memory(error: Exception) -> bool:
    """Whether a program could not be compiled or run for lack of a device's memory."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def program_memory(step: Any) -> int | None:
    """Bytes that a compiled program needs on a device: what goes in, comes out, and lies between.

    None where the compiler keeps no account.
    """
    account = step.memory_analysis()
    if account is None:
        return None
    there = account.argument_size_in_bytes + account.output_size_in_bytes
    return int(there + account.temp_size_in_bytes - account.alias_size_in_bytes)


def peak_memory() -> int:
    """Largest memory in use so far in bytes: of a device, or of this process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
