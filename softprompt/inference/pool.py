"""A pool of rows: its compiled programs, its device arrays, and its rows' state on the host."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from softprompt.errors import UserError
from softprompt.inference.pool_programs import (
    Choice,
    Grid,
    Lane,
    PrefillBatch,
    RowState,
    lane_axes,
    prefill,
    set_lane,
    step,
)
from softprompt.inference.sampling import RowSampling
from softprompt.models.decoder import Decoder

Tree = Any
RowIndex = tuple[int, int]  # a lane, and a row in it
SIZES = (32, 128, 512, 2048, 8192, 32768, 131072)  # what inputs and contexts are padded to


def padded(length: int, sizes: Sequence[int] = SIZES) -> int:
    """The smallest of the sizes, in ascending order, that is at least `length`; 0 for 0.

    Raises:
        UserError: none is.
    """
    for size in (0, *sizes):
        if size >= length:
            return size
    raise UserError(f"an input or a context of {length} tokens; allowed: up to {sizes[-1]}")


@dataclasses.dataclass(frozen=True)
class Draw:
    """How a row's tokens are chosen; see `RowSampling`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Joining:
    """A new row: its slot, its input, its draw, and whether it needs alternatives."""

    slot: RowIndex
    tokens: Sequence[int] | np.ndarray
    draw: Draw = Draw()
    alternatives: bool = False


class Pool:
    """Rows of one kind of lane, which join and leave between steps.

    Args:
        model: a decoder.
        weights: its frozen weights.
        like: a lane; all lanes have its shapes.
        grid: the sizes. S is padded to one of `sizes`.
        sizes: what inputs are padded to, in ascending order; a program for each of them up to S.

    Attributes:
        grid: the sizes.
        free: the slots without a row; a caller may reserve one by removing it.
    """

    def __init__(
        self, model: Decoder, weights: Tree, like: Lane, grid: Grid, sizes: Sequence[int] = SIZES
    ) -> None:
        self.grid = grid = dataclasses.replace(grid, slots=padded(grid.slots, sizes))
        self._sizes = [size for size in sizes if size <= grid.slots]
        shape = grid.lanes, grid.rows
        self.free: set[RowIndex] = {(lane, row) for lane, row in np.ndindex(*shape)}
        self._weights, self._column = weights, 0
        self._rows = RowState(*(np.zeros(shape, np.int32) for _ in RowState._fields))
        self._draws, self._alternatives = _greedy(shape), np.zeros(shape, bool)
        self._shapes = pool_shapes(model, like, grid)
        self._programs = compiled(self._lowered(model, like))
        self._lanes: Any = None
        self._inputs: Any = None
        self._ring: Any = None

    @property
    def size(self) -> int:
        """The number of slots."""
        return self.grid.lanes * self.grid.rows

    @property
    def running(self) -> int:
        """The number of rows."""
        return self.size - len(self.free)

    def set_lane(self, number: int, lane: Lane) -> None:
        """Writes a task into a lane that has no rows."""
        if self._lanes is None:  # allocated for the first task
            arrays = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), self._shapes)
            self._lanes, self._inputs, self._ring = jax.tree.map(jax.device_put, arrays)
        self._lanes = self._programs["lane"](self._lanes, np.int32(number), lane)

    def wait(self) -> None:
        """Waits for what the device still does for the pool."""
        jax.block_until_ready((self._lanes, self._inputs, self._ring))

    def join(self, rows: Sequence[Joining]) -> list[Choice]:
        """Runs the inputs of new rows, at most `grid.together`; returns their first tokens.

        The inputs are padded to the same size.
        """
        for row in rows:
            self.free.discard(row.slot)
            self._rows.lengths[row.slot], self._rows.counts[row.slot] = len(row.tokens), 0
            self._alternatives[row.slot] = row.alternatives
            for field, value in dataclasses.asdict(row.draw).items():
                self._draws[field][row.slot] = value
        several = [*rows, *[rows[-1]] * (self.grid.together - len(rows))]
        size = max(padded(len(row.tokens), self._sizes) for row in rows)
        ids_BT = np.zeros((len(several), size), np.int32)
        for ids_T, row in zip(ids_BT, several, strict=True):
            ids_T[: len(row.tokens)] = row.tokens
        lanes_B, rows_B = np.array([row.slot for row in several], np.int32).T
        slots = lanes_B, rows_B
        arguments = (
            PrefillBatch(lanes_B, rows_B, ids_BT, self._rows.lengths[slots]),
            _sampling({field: array[slots] for field, array in self._draws.items()}, 0),
            self._alternatives[slots].any(),
        )
        run = self._programs[size]
        choice, self._inputs = run(self._weights, self._lanes, self._inputs, *arguments)
        first = Choice(*map(np.asarray, choice))
        self._rows.ids[slots] = first.ids
        return [Choice(*(field[n] for field in first)) for n in range(len(rows))]

    def step(self) -> Choice:
        """Runs a token of every row; returns the next tokens [A, B], with those of empty slots."""
        arguments = (
            np.int32(self._column),
            self._rows,
            _sampling(self._draws, self._rows.counts + 1),
            self._alternatives.any(),
        )
        arrays = self._lanes, self._inputs, self._ring
        choice, self._ring = self._programs["step"](self._weights, *arrays, *arguments)
        made = Choice(*map(np.asarray, choice))
        self._rows.ids[...] = made.ids
        self._rows.counts[...] = np.minimum(self._rows.counts + 1, self.grid.columns)
        self._column = (self._column + 1) % self.grid.columns
        return made

    def leave(self, slot: RowIndex) -> None:
        """Removes a row."""
        self.free.add(slot)
        self._draws["temperature"][slot] = 0  # an empty slot needs no noise
        self._alternatives[slot] = False
        if not self.running:
            self._column = 0  # so that an idle pool rounds equal requests equally

    def _lowered(self, model: Decoder, like: Lane) -> Iterator[tuple[Any, Any]]:
        """The pool's programs: a step, the writing of a lane, and a prefill of each size."""
        leaves, tree = jax.tree.flatten(lane_axes(like))
        write, run, fill = _functions(model, tree, tuple(leaves))
        number, flag = np.int32(0), np.bool_(False)
        lanes, inputs, ring = self._shapes
        yield "lane", write.lower(lanes, number, jax.tree.map(abstract, like))
        how = _sampling(self._draws, self._rows.counts)
        yield "step", run.lower(self._weights, lanes, inputs, ring, number, self._rows, how, flag)
        number_B = np.zeros(self.grid.together, np.int32)
        how = _sampling(_greedy(number_B.shape), number_B)
        for size in self._sizes:
            rows = PrefillBatch(
                number_B, number_B, np.zeros((len(number_B), size), np.int32), number_B
            )
            yield size, fill.lower(self._weights, lanes, inputs, rows, how, flag)


@functools.lru_cache(maxsize=32)
def _functions(model: Decoder, tree: Any, leaves: tuple[int, ...]) -> tuple[Any, Any, Any]:
    """`set_lane`, `step` and `prefill` for lanes stacked along these axes.

    The compiler's results are kept with the functions, so that a pool like an earlier one, for
    instance of the next evaluation of a trial, is not compiled again.
    """
    axes = jax.tree.unflatten(tree, leaves)
    return (
        jax.jit(functools.partial(set_lane, axes), donate_argnums=0),
        jax.jit(functools.partial(step, model, axes), donate_argnums=3),
        jax.jit(functools.partial(prefill, model, axes), donate_argnums=2),
    )


def pool_shapes(model: Decoder, like: Lane, grid: Grid) -> tuple[Any, Any, Any]:
    """Shapes and dtypes of a pool's lanes, of its inputs' cache and of its ring."""
    c = model.config

    def stacked(leaf: Any, axis: int) -> jax.ShapeDtypeStruct:
        shape = (*leaf.shape[:axis], grid.lanes, *leaf.shape[axis:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    def cache(length: int) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
        shape = c.layers, grid.lanes, grid.rows, length, c.kv_heads, c.head_size
        one = jax.ShapeDtypeStruct(shape, model.dtype)
        return one, one

    lanes = jax.tree.map(stacked, like, lane_axes(like))
    return lanes, cache(grid.slots), cache(grid.columns)


def compiled(lowered: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Compiles traced programs, two at a time."""
    names, programs = zip(*lowered, strict=True)
    with ThreadPoolExecutor(2) as threads:
        done = threads.map(lambda program: program.compile(), programs)
        return dict(zip(names, done, strict=True))


def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)


def _greedy(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The fields of a `Draw` for each of several rows."""
    dtypes = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.uint32}
    default = dataclasses.asdict(Draw())
    return {field: np.full(shape, default[field], dtype) for field, dtype in dtypes.items()}


def _sampling(draws: dict[str, np.ndarray], nth: Any) -> RowSampling:
    """The rows' sampling of token number `nth`."""
    first = draws["temperature"]
    return RowSampling(**draws, nth=np.broadcast_to(nth, first.shape).astype(np.int32))
