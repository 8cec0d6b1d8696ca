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


def save(manager: ocp.CheckpointManager, step: int, state: Tree, notes: dict[str, Any]) -> None:
    """Starts writing the state after `step` updates.

    Args:
        manager: of the trial's folder.
        step: updates done.
        state: trees of arrays. Copied before this returns, so that the caller may donate them.
        notes: small JSON beside the arrays: the resolved config, and where the best delta was.
    """
    items = ocp.args.Composite(state=ocp.args.StandardSave(state), notes=ocp.args.JsonSave(notes))
    with _WRITING:
        manager.save(step, args=items)
        if threading.current_thread() is not threading.main_thread():
            manager.wait_until_finished()


def restore(manager: ocp.CheckpointManager, like: Tree) -> tuple[int, Tree, dict[str, Any]] | None:
    """The newest complete checkpoint as (step, state, notes), or None where there is none.

    Args:
        manager: of the trial's folder.
        like: a state of the same structure, whose shapes and shardings the restored one gets.
    """
    step = manager.latest_step()
    if step is None:
        return None
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    items = ocp.args.Composite(
        state=ocp.args.StandardRestore(abstract), notes=ocp.args.JsonRestore()
    )
    restored = manager.restore(step, args=items)
    return step, restored["state"], restored["notes"]
