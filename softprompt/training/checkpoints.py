"""Checkpoints of a trial's state: delta, best delta, optimizer state and step. No frozen weights.

This module is the only one that calls orbax's checkpoint manager. Writes are atomic: if a process
dies during a write, the previous checkpoint remains.

Each orbax call runs in a daemon thread, one call at a time. A signal therefore interrupts the main
thread, which waits for the call, and never orbax itself, whose threads could deadlock. A daemon
thread does not keep an exiting process alive.
"""

import contextlib
import functools
import textwrap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from etils import epath

from softprompt.errors import UserError

Tree = Any
T = TypeVar("T")

LEAVING_SECONDS = 60.0  # how long an exiting process waits for a write

_open: list[ocp.CheckpointManager] = []
_one_call = threading.Lock()


@contextlib.contextmanager
def checkpoint_manager(folder: epath.PathLike) -> Iterator[ocp.CheckpointManager]:
    """A checkpoint manager for `folder` that finishes its writes before the block ends.

    If the block raises an exception, the manager waits at most `LEAVING_SECONDS` for a write.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options)
    _open.append(manager)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # the block's exception matters more
            _in_daemon_thread(manager.close, seconds=LEAVING_SECONDS)
        raise
    else:
        _in_daemon_thread(manager.close)
    finally:
        _open.remove(manager)


def _in_daemon_thread(call: Callable[[], T], *, seconds: float | None = None) -> T:
    """Runs a call in a new daemon thread, and returns its result or raises its exception.

    Raises:
        TimeoutError: the call takes longer than `seconds`; its thread goes on.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            with _one_call:
                done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="checkpoints", daemon=True).start()
    return done.result(seconds)


def save(manager: ocp.CheckpointManager, step: int, state: Tree, notes: dict[str, Any]) -> None:
    """Waits for pending writes, then starts writing the state after `step` updates.

    Args:
        manager: of the trial's folder.
        step: updates done.
        state: trees of arrays. They are copied before this returns, so the caller may donate them.
            Arrays of size 0, which orbax cannot write, are left out.
        notes: JSON saved with the arrays, such as the resolved config and the best step.
    """
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(_written(state)), notes=ocp.args.JsonSave(notes)
    )
    # Orbax numbers writes per process, so concurrent writes of two managers would be confused.
    for other in [one for one in _open if one is not manager]:
        with contextlib.suppress(Exception):  # the other trial will raise it itself
            _in_daemon_thread(other.wait_until_finished)
    _in_daemon_thread(lambda: manager.save(step, args=items))


def restore_newest(
    manager: ocp.CheckpointManager,
    like: Tree,
    *,
    check: Callable[[int, dict[str, Any]], None],
    say: Callable[[str], None],
) -> tuple[int, dict[str, Any], Tree] | None:
    """Restores the newest readable checkpoint.

    Unreadable newer checkpoints are deleted, so that their steps can be written again.

    Args:
        manager: of the trial's folder.
        like: a state with the structure, shapes and shardings of the one to restore.
        check: called with step and notes before the state is read; may raise.
        say: called with one line about each unreadable checkpoint.

    Returns:
        Its step, notes and state; None if the folder has no checkpoint.

    Raises:
        UserError: there are checkpoints, but none is readable.
    """
    problems: dict[int, Exception] = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            notes = _restore(manager, step, notes=ocp.args.JsonRestore())["notes"]
        except Exception as error:
            problems[step] = error
            continue
        check(step, notes)
        try:
            state = _restore_state(manager, step, like)
        except Exception as error:
            problems[step] = error
            continue
        for broken, problem in problems.items():
            say(f"{_unreadable(manager, broken, problem)}; deleted, step {step} is used instead")
            _in_daemon_thread(functools.partial(manager.delete, broken))
        return step, notes, state
    if problems:
        newest = next(iter(problems))
        raise UserError(
            f"{_unreadable(manager, newest, problems[newest])}, and no older one can; allowed: "
            "a readable checkpoint, or a new --workdir"
        )
    return None


def _unreadable(manager: ocp.CheckpointManager, step: int, error: Exception) -> str:
    """A line that names an unreadable checkpoint's folder and the reason."""
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
    return f"{manager.directory / str(step)}: this checkpoint cannot be read ({reason})"


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    return _in_daemon_thread(lambda: manager.restore(step, args=ocp.args.Composite(**items)))


def _restore_state(manager: ocp.CheckpointManager, step: int, like: Tree) -> Tree:
    """The state of a checkpoint, with the shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _written(like))
    restored = _restore(manager, step, state=ocp.args.StandardRestore(abstract))["state"]
    return jax.tree.map(lambda leaf, read: leaf if read is None else read, like, restored)


def _written(state: Tree) -> Tree:
    """The state with None in place of each array of size 0."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)
