"""Checkpoints of what a trial changes: delta, best delta, optimizer state, step. Never a weight.

One small wrapper around orbax, so that its interface is met in one place. Writes are atomic: a
process that dies during one leaves the checkpoint before it.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

Tree = Any

# orbax numbers the writes of a process, and takes those of two managers for one another's: where
# trials run in threads, a write ends before the next begins.
_WRITING = threading.Lock()


@contextmanager
def checkpoint_manager(folder: epath.PathLike, *, keep: int = 2) -> Iterator[ocp.CheckpointManager]:
    """A manager of `folder` that finishes its writes before the block ends."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    manager = ocp.CheckpointManager(epath.Path(folder).resolve(), options=options)
    try:
        yield manager
    finally:
        with _WRITING:
            manager.wait_until_finished()
            manager.close()


def _written(state: Tree) -> Tree:
    """The state with None for what has no entries."""
    return jax.tree.map(lambda leaf: leaf if leaf.size else None, state)


def save(manager: ocp.CheckpointManager, step: int, state: Tree, notes: dict[str, Any]) -> None:
    """Starts writing the state after `step` updates.

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
    with _WRITING:
        manager.save(step, args=items)
        if threading.current_thread() is not threading.main_thread():
            manager.wait_until_finished()


def newest(manager: ocp.CheckpointManager) -> tuple[int, dict[str, Any]] | None:
    """The step and the notes of the newest complete checkpoint, or None where there is none."""
    step = manager.latest_step()
    if step is None:
        return None
    found = manager.restore(step, args=ocp.args.Composite(notes=ocp.args.JsonRestore()))
    return step, found["notes"]


def restore(manager: ocp.CheckpointManager, step: int, like: Tree) -> Tree:
    """The state of a checkpoint.

    Args:
        manager: of the trial's folder.
        step: of the checkpoint.
        like: a state of the same structure, whose shapes and shardings the restored one gets.
    """
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, _written(like))
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    found = manager.restore(step, args=items)["state"]
    return jax.tree.map(lambda leaf, one: leaf if one is None else one, like, found)
