"""The memory of a device, and the memory that arrays and compiled programs need."""

import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax

# Shares of a device's memory: for weights and concurrent trials, and for cached models.
MEMORY_SHARE, CACHE_SHARE = 0.6, 0.3


def device_memory() -> int:
    """Bytes of a device's memory; on a CPU the bytes that this process may use."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *container_limits()])


def container_limits(root: Path = Path("/")) -> list[int]:
    """Returns the memory limits in bytes of this process's control groups and their parents.

    In a container the group's path may be that of the host. Folders of it that do not exist in the
    container are skipped.

    Source: cgroups(7), and the kernel's cgroup-v2.rst and cgroup-v1/memory.rst.
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
    """A file's text, stripped; "" if it cannot be read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def bytes_of(tree: Any) -> int:
    """Bytes of a tree of arrays or `ShapeDtypeStruct`s, whatever their shardings."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def bytes_here(tree: Any) -> int:
    """Bytes that a tree of arrays takes on one device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def out_of_memory(error: Exception) -> bool:
    """Whether a device ran out of memory while a program was compiled or run."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def program_memory(step: Any) -> int | None:
    """Bytes that a compiled program needs on a device: arguments, outputs and temporaries.

    None if the compiler does not report them.
    """
    sizes = step.memory_analysis()
    if sizes is None:
        return None
    interface = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    return int(interface + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes)


def peak_memory() -> int:
    """Peak memory so far in bytes, of a device, or on a CPU of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return int(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
