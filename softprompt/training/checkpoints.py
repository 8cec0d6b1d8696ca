"""Checkpoints of what a trial changes: delta, best delta, optimizer state, step. Never a weight.

One small wrapper around orbax, so that its interface is met in one place. Writes are atomic: a
process that dies during one leaves the checkpoint before it.

Orbax runs in daemon threads, one call at a time. A signal interrupts the main thread, which waits
for them, and never orbax itself, whose threads would then wait for one another; and none of them
keeps a process alive that is to leave.
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

LEAVING_SECONDS = 60.0  # that a process which is to leave waits for a write

_open: list[ocp.CheckpointManager] = []
_one_call = threading.Lock()


@contextlib.contextmanager
def checkpoint_manager(folder: epath.PathLike, *, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """A manager of `folder` that finishes its writes before the block ends.

    Where the block ends in an exception, it waits for a write no longer than `LEAVING_SECONDS`.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options)
    _open.append(manager)
    try:
        yield manager
    except BaseException:
        with contextlib.suppress(Exception):  # the block's own says more
            _in_daemon_thread(manager.close, seconds=LEAVING_SECONDS)
        raise
    else:
        _in_daemon_thread(manager.close)
    finally:
        _open.remove(manager)


def _in_daemon_thread(call: Callable[[], T], *, seconds: float | None = None) -> T:
    """What a call returns or raises in a daemon thread of its own.

    Raises:
        TimeoutError: it takes longer than `seconds`; the thread is left to itself.
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
    """Starts writing the state after `step` updates, once no other write is under way.

    Args:
        manager: of the trial's folder.
        step: updates done.
        state: trees of arrays. Copied before this returns, so that the caller may donate them.
            Those without entries, which orbax does not write, are left out.
        notes: small JSON beside the arrays: the resolved config, and where the best delta was.
    """
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(_written(state)), notes=ocp.args.JsonSave(notes)
    )
    # Orbax numbers the writes of a process, and takes those of two managers for one another's.
    for other in [one for one in _open if one is not manager]:
        with contextlib.suppress(Exception):  # the other trial meets it itself
            _in_daemon_thread(other.wait_until_finished)
    _in_daemon_thread(lambda: manager.save(step, args=items))


def restore_newest(
    manager: ocp.CheckpointManager,
    like: Tree,
    *,
    check: Callable[[int, dict[str, Any]], None],
    say: Callable[[str], None],
) -> tuple[int, dict[str, Any], Tree] | None:
    """Step, notes and state of the newest checkpoint that can be read, None where there is none.

    Newer ones that cannot be read are deleted, so that their steps can be written again.

    Args:
        manager: of the trial's folder.
        like: a state of the same structure, whose shapes and shardings the restored one gets.
        check: called with step and notes before the state is read; may raise.
        say: is told in one line of each checkpoint that cannot be read.

    Raises:
        UserError: there are checkpoints, and none of them can be read.
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
            "a whole checkpoint, or a new --workdir"
        )
    return None


def _unreadable(manager: ocp.CheckpointManager, step: int, error: Exception) -> str:
    """One line that names a checkpoint's folder, and why it cannot be read."""
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
    return f"{manager.directory / str(step)}: this checkpoint cannot be read ({reason})"


def _restore(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    return _in_daemon_thread(lambda: manager.restore(step, args=ocp.args.Composite(**items)))


def _restore_state(manager: ocp.CheckpointManager, step: int, like: Tree) -> Tree:
    """The state of a checkpoint, laid out like `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _written(like))
    found = _restore(manager, step, state=ocp.args.StandardRestore(abstract))["state"]
    return jax.tree.map(lambda leaf, one: leaf if one is None else one, like, found)


def _written(state: Tree) -> Tree:
    """The state with None for what has no entries."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)
