"""The pools of one kind of task, and which slot of them a new row gets."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax

from softprompt.inference.pool import Pool, RowIndex, Tree
from softprompt.inference.pool_programs import Grid, Lane
from softprompt.inference.text_scores import TextScores
from softprompt.models.decoder import Decoder

Kind = tuple[Any, ...]


def kind_of(lane: Lane) -> Kind:
    """What tasks of one pool have in common: the tree of a lane, its shapes and its dtypes."""
    leaves, tree = jax.tree.flatten(lane)
    return tree, *((leaf.shape, str(leaf.dtype)) for leaf in leaves)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of all pools.

    Attributes:
        rows: of a pool.
        input: the most tokens of an input.
        new: the most tokens of an output.
        lanes: None makes two pools: `rows` x 1 for mixed tasks, and 1 x `rows` for a task that
            fills at least half of it. A number makes one pool with so many lanes.
        together: inputs in one prefill (see `Grid`). A pool with running rows takes new ones only
            when it has so many free slots. A larger number gives more tokens per second, and a
            later first token.
        scores: also compile the programs that score texts.
    """

    rows: int = 8
    input: int = 512
    new: int = 512
    lanes: int | None = None
    together: int = 1
    scores: bool = True

    def within(self, context: int) -> "Sizes":
        """The sizes, with inputs and outputs of at most `context` tokens, the model's."""
        return dataclasses.replace(self, input=min(self.input, context), new=min(self.new, context))


class PoolSlot(NamedTuple):
    """A slot of a pool."""

    pool: Pool
    slot: RowIndex


class KindPools:
    """The pools of tasks whose lanes have equal shapes, compiled when it is made.

    Attributes:
        pools: with rows or without.
        scores: scores texts; None unless `sizes.scores`.
    """

    def __init__(self, model: Decoder, weights: Tree, like: Lane, sizes: Sizes) -> None:
        if not like.context.slots and not jax.tree.leaves(like.variables):
            lanes = [1]  # lanes without content need not be told apart
        else:
            lanes = sorted({1, sizes.rows}) if sizes.lanes is None else [sizes.lanes]
        rest = sizes.input, max(sizes.new - 1, 1), sizes.together  # the last token is not run
        self.pools = [Pool(model, weights, like, Grid(n, sizes.rows // n, *rest)) for n in lanes]
        most = min(sizes.input + sizes.new, model.config.context_length)
        self.scores = TextScores(model, weights, like, most) if sizes.scores else None
        self._held: dict[tuple[int, int], str] = {}  # pool's index and lane -> the task's digest

    def open_pools(self, waiting: int) -> set[int]:
        """Indices of pools that take rows now, when `waiting` requests wait; see `Sizes`."""
        return {
            index
            for index, pool in enumerate(self.pools)
            if not pool.running or len(pool.free) >= min(pool.grid.together, waiting)
        }

    def assign(
        self, digest: str, demand: int, lane: Callable[[], Lane], open_: Collection[int]
    ) -> PoolSlot | None:
        """Reserves a slot for a row of a task; None if there is none now.

        Args:
            digest: of the task.
            demand: its requests that wait, this one included.
            lane: the task's; it is written into a lane that does not hold it yet.
            open_: indices of the pools that take rows.
        """
        for index, pool in enumerate(self.pools):
            if index not in open_:
                continue
            if len(self.pools) > 1 and pool.grid.lanes == 1 and not pool.running:
                if 2 * demand < pool.size:
                    continue  # too few for a pool of their own
            number = self._lane(index, digest)
            if number is None:
                continue
            if self._held.get((index, number)) != digest:
                pool.set_lane(number, lane())
                self._held[index, number] = digest
            slot = min(slot for slot in pool.free if slot[0] == number)
            pool.free.remove(slot)
            return PoolSlot(pool, slot)
        return None

    def _lane(self, index: int, digest: str) -> int | None:
        """A lane with a free slot that holds the task, or that has no rows."""
        pool = self.pools[index]
        free = Counter(lane for lane, _ in pool.free)
        held = {lane: self._held.get((index, lane)) for lane in sorted(free)}
        unused = [lane for lane in held if free[lane] == pool.grid.rows]
        with_task = [lane for lane, task in held.items() if task == digest]
        never = [lane for lane in unused if held[lane] is None]
        return next(iter([*with_task, *never, *unused]), None)
