"""How much memory a device has, and what lies there."""

import os
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
