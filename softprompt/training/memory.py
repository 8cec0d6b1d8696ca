"""How much memory a device has, what lies there, and what a program needs."""

import os
import resource
import sys
from typing import Any

import jax

# Of a device's memory: what weights and trials beside them may take, and what models may take that
# are kept for a later trial.
MEMORY_SHARE, KEPT_SHARE = 0.6, 0.3


def device_memory() -> int:
    """Bytes of a device's memory, or of the machine's on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
