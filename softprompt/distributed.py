"""Joins the processes of a run, and finds JAX's devices."""

import os
import re

from softprompt.errors import UserError


def start_jax(distributed: str | None = None) -> None:
    """Joins the other processes of a run, if it has any, and finds JAX's devices.

    Args:
        distributed: "auto" (JAX asks the TPU slice, SLURM or Open MPI), or "host:port,i,n": the
            address of process 0, this one's number and how many there are. None: one process.

    Raises:
        UserError: another form, nothing to join, or no device of `JAX_PLATFORMS`.
    """
    import jax

    if distributed is not None:
        _join(distributed)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a CPU-only jaxlib has "cuda"
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "not installed"
        raise UserError(
            f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}: {reason}; allowed: "
            "platforms that are there, such as cpu, or '' for the best of them"
        ) from error


def _join(distributed: str) -> None:
    """Joins the other processes of a run."""
    import jax

    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", distributed)
    if distributed != "auto" and not (found and int(found[2]) < int(found[3])):
        raise UserError(
            f"--distributed is {distributed!r}; allowed: no value, or HOST:PORT,I,N "
            "with I from 0 to N - 1"
        )
    try:
        if found:
            jax.distributed.initialize(found[1], int(found[3]), int(found[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed {distributed}: {error}") from error


def agreed(value: bool) -> bool:
    """What the first of several processes says, for all of them."""
    import jax

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(value))
