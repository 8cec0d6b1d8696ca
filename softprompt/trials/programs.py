"""Compiled training steps: of one trial, or of several trials stacked into one program."""

import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from softprompt.training.memory import out_of_memory, program_memory
from softprompt.training.optimizers import OptimizerConfig, make_optimizer
from softprompt.training.sharding import by_device, by_row, replicated, split_over_data
from softprompt.training.step import StepCall, StepConfig, StepResult, TrainStep, train_step

Tree = Any
Compiling = Callable[[], AbstractContextManager[None]]


class Static(NamedTuple):
    """What is static in a training step; the shapes and shardings of its arguments do the rest."""

    step: StepConfig
    optimizer: OptimizerConfig
    mesh: Mesh


class StepProgram:
    """A training step for arguments of given shapes, compiled when it is first taken.

    Trials that share it may be stacked.

    Attributes:
        static: what is static in it.
        compiled: by the number of stacked trials; 0 is a trial by itself.
    """

    def __init__(self, static: Static) -> None:
        self.static = static
        self.compiled: dict[int, Any] = {}
        self._most = sys.maxsize  # stacked trials that memory has room for, as far as is known

    def step(self, call: StepCall, compiling: Compiling) -> StepResult:
        """The step of one trial, whose delta and optimizer's state are donated."""
        arguments = call[1:]
        if 0 not in self.compiled:
            with compiling():
                self.compiled[0] = compile_step(*self.static, arguments)
        return StepResult(*self.compiled[0](*arguments))

    def steps(
        self,
        calls: Sequence[StepCall],
        *,
        compiling: Compiling,
        spare: bool,
        say: Callable[[str], None],
    ) -> list[StepResult]:
        """The steps of several trials on one model, stacked.

        Where memory has no room for so many, half as many are taken at a time, from then on.

        Args:
            calls: of this program.
            compiling: the context in which a program is compiled.
            spare: other trials are about to take the places of those that ended, so a larger
                program serves, its spare places filled with copies.
            say: is given a line where memory has no room.
        """
        assert all(call.program is self for call in calls), "stacked steps are one program"
        assert all(call.weights is calls[0].weights for call in calls), "and of one model"
        results = list[StepResult]()
        while some := calls[len(results) :][: self._most]:
            width = self._width(len(some), spare=spare)
            try:
                results += self._stacked(some, width, compiling)
            except Exception as error:
                if width == 1 or not out_of_memory(error):
                    raise
                self._most = width // 2
                self.compiled = {n: one for n, one in self.compiled.items() if n <= self._most}
                say(f"no memory for {width} steps together: {self._most} at a time from now on")
        return results

    def memory(self) -> int | None:
        """Bytes that the largest program needs on a device; None if the compiler does not say."""
        return program_memory(self.compiled[max(self.compiled)]) if self.compiled else None

    def _stacked(
        self, calls: Sequence[StepCall], width: int, compiling: Compiling
    ) -> list[StepResult]:
        """The steps of these, in a program of `width` places."""
        first = calls[0]
        if width not in self.compiled:
            with compiling():
                self.compiled[width] = compile_population(*self.static, first[1:], width)
        filled = [_member(call) for call in (*calls, *[first] * (width - len(calls)))]
        results: list[StepResult] = self.compiled[width](filled, first.weights)
        return results[: len(calls)]

    def _width(self, count: int, *, spare: bool) -> int:
        """Places of the program to run: `count` where none of those that there are will do."""
        most = sys.maxsize if spare else 2 * count
        return min((n for n in self.compiled if count <= n <= most), default=count)


def shapes_key(arguments: Any) -> tuple[Any, ...]:
    """Shapes, dtypes and structure of a step's arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    return (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))


class Member(NamedTuple):
    """What is a trial's own in a stacked step; the frozen weights are everybody's."""

    delta: Tree
    opt_state: Tree
    batch: Tree
    dropout: Any


def _member(call: StepCall) -> Member:
    return Member(call.delta, call.opt_state, call.batch, call.dropout)


def compile_step(
    step: StepConfig, optimizer: OptimizerConfig, mesh: Mesh, arguments: tuple[Any, ...]
) -> TrainStep:
    """Compiles the training step: everything keeps its shards, rows lie over "data".

    Delta and optimizer state are donated. `arguments` are those of `train_step`, arrays or shapes
    with shardings.
    """
    whole = replicated(mesh)
    function = _step(step, optimizer, mesh, arguments)
    kept = [jax.tree.map(functools.partial(_sharding, whole), tree) for tree in arguments[:2]]
    jitted = jax.jit(
        function,
        donate_argnums=(0, 1),
        in_shardings=(*kept, None, by_row(mesh), whole),
        out_shardings=(*kept, whole),
    )
    return jitted.lower(*arguments).compile()


def compile_population(
    step: StepConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    width: int,
) -> Any:
    """Compiles `population_step` for so many trials, each with arguments like these.

    Where the trials divide by the mesh's data axis, each device along it takes whole trials, which
    need nothing of one another; else each takes some rows of every trial. Nothing is donated: a
    trial's arguments stand in for those of a trial that is over.
    """
    whole, rows = replicated(mesh), by_row(mesh)
    delta, opt_state, weights, batch, dropout = arguments
    over = width % mesh.shape["data"] == 0 and not split_over_data((delta, weights))
    function = _step(step, optimizer, mesh, arguments, per_device=not over)
    where: Any = Member(whole, whole, rows, whole)
    jitted = jax.jit(
        functools.partial(population_step, step=function, along=rows if over else None),
        in_shardings=([where] * width, None),
        out_shardings=whole,
    )
    return jitted.lower([Member(delta, opt_state, batch, dropout)] * width, weights).compile()


def population_step(
    trials: Sequence[Member], weights: Tree, *, step: TrainStep, along: NamedSharding | None
) -> list[StepResult]:
    """The steps of all trials, vmapped over everything but the weights.

    Args:
        trials: of equal shapes.
        weights: the frozen model.
        step: `train_step`, its static arguments given.
        along: how the axis of trials lies over devices; None leaves that to their rows.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trials)
    if along is not None:
        stacked = jax.lax.with_sharding_constraint(stacked, along)
    results = jax.vmap(lambda one: step(one.delta, one.opt_state, weights, one.batch, one.dropout))(
        stacked
    )
    return [
        StepResult(*jax.tree.map(lambda leaf, n=n: leaf[n], results)) for n in range(len(trials))
    ]


def _step(
    step: StepConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    *,
    per_device: bool = True,
) -> TrainStep:
    """The step function on a mesh; with `per_device`, each device sums over its own rows."""
    function = functools.partial(train_step, config=step, tx=make_optimizer(optimizer))
    if not per_device or mesh.shape["data"] == 1 or split_over_data((arguments[0], arguments[2])):
        return function
    return functools.partial(function, per_device=by_device(mesh))


def _sharding(whole: Any, leaf: Any) -> Any:
    """An array's sharding; `whole` for what has none, as a number of the host."""
    return getattr(leaf, "sharding", None) or whole
