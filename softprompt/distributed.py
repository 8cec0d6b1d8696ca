"""Joins the processes of a run, and finds JAX's devices."""

import os
import re

from softprompt.errors import UserError


class NotJoined(UserError):
    """The other processes of a run are not there; they may come later."""


def start_jax(distributed: str | None = None, *, heartbeat: int = 100) -> None:
    """Joins the other processes of a run, if it has any, and finds JAX's devices.

    Args:
        distributed: "auto" (JAX asks the TPU slice, SLURM or Open MPI), or "host:port,i,n": the
            address of process 0, this one's number and how many there are. None: one process.
        heartbeat: seconds after which a process that says nothing counts as lost, and the others
            are ended by JAX.

    Raises:
        NotJoined: nothing to join.
        UserError: another form, or no device of `JAX_PLATFORMS`.
    """
    import jax

    if distributed is not None:
        _join(distributed, heartbeat)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax asserts that a CPU-only jaxlib has "cuda"
        reason = str(error).partition(" (set JAX_PLATFORMS")[0] or "not installed"
        raise UserError(
            f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}: {reason}; allowed: "
            "platforms that are there, such as cpu, or '' for the best of them"
        ) from error


def parse_distributed(text: str) -> tuple[str, int, int] | None:
    """Parses "host:port,i,n"; None for "auto".

    Raises:
        UserError: another form.
    """
    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", text)
    if text != "auto" and not (found and int(found[2]) < int(found[3])):
        raise UserError(
            f"--distributed is {text!r}; allowed: no value, or HOST:PORT,I,N with I from 0 to N - 1"
        )
    return (found[1], int(found[2]), int(found[3])) if found else None


def _join(distributed: str, heartbeat: int) -> None:
    """Joins the other processes of a run."""
    import jax

    found = parse_distributed(distributed)
    try:
        if found:
            host, number, count = found
            jax.distributed.initialize(host, count, number, heartbeat_timeout_seconds=heartbeat)
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat)
    except (ValueError, RuntimeError) as error:
        raise NotJoined(f"--distributed {distributed}: {error}") from error


def from_first(content: bytes) -> bytes:
    """What the first of several processes has, for all of them."""
    import numpy as np
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    padded = np.frombuffer(content.ljust(size, b"\0")[:size], np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded)))


def agreed_text(text: str) -> str:
    """What the first of several processes says, for all of them."""
    import jax

    return text if jax.process_count() == 1 else from_first(text.encode()).decode()


def agreed(value: bool) -> bool:
    """What the first of several processes says, for all of them."""
    import jax

    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(value))
