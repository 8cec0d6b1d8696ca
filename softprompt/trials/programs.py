"""Compiled training steps, of one trial or of several trials stacked into one program."""

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
    """The static configuration of a compiled step, besides its arguments' shapes and shardings."""

    step: StepConfig
    optimizer: OptimizerConfig
    mesh: Mesh


class StepProgram:
    """A training step for arguments of given shapes, compiled when it is first run.

    Trials that share it may be stacked.

    Attributes:
        static: its static configuration.
        compiled: by the number of stacked trials; 0 is a trial that is not stacked.
    """

    def __init__(self, static: Static) -> None:
        self.static = static
        self.compiled: dict[int, Any] = {}
        # Largest number of stacked trials; when memory runs out, half of the width that was tried.
        self._most = sys.maxsize

    def step(self, call: StepCall, compiling: Compiling) -> StepResult:
        """Runs the step of one trial; donates its delta and optimizer state."""
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
        more_to_start: bool,
        say: Callable[[str], None],
    ) -> list[StepResult]:
        """Runs the steps of several trials on one model, stacked.

        If memory runs out, at most half as many trials are stacked from then on.

        Args:
            calls: of this program.
            compiling: the context in which a program is compiled.
            more_to_start: more trials are about to start, so a wider program that is already
                compiled is used, padded with copies of the first trial. Otherwise only one that is
                at most twice as wide is used.
            say: called with a line if memory runs out.
        """
        assert all(call.program is self for call in calls), "stacked steps share a program"
        assert all(call.weights is calls[0].weights for call in calls), "and weights"
        results = list[StepResult]()
        while chunk := calls[len(results) :][: self._most]:
            width = self._width(len(chunk), more_to_start=more_to_start)
            try:
                results += self._stacked(chunk, width, compiling)
            except Exception as error:
                if width == 1 or not out_of_memory(error):
                    raise
                self._most = width // 2
                self.compiled = {n: one for n, one in self.compiled.items() if n <= self._most}
                most = f"running {self._most} at a time"
                say(f"not enough memory to run {width} steps together; {most}")
        return results

    def memory(self) -> int | None:
        """Bytes that the largest program needs on a device; None if the compiler reports none."""
        return program_memory(self.compiled[max(self.compiled)]) if self.compiled else None

    def _stacked(
        self, calls: Sequence[StepCall], width: int, compiling: Compiling
    ) -> list[StepResult]:
        """Runs the steps in a program for `width` trials, padded with copies of the first."""
        first = calls[0]
        if width not in self.compiled:
            with compiling():
                self.compiled[width] = compile_population(*self.static, first[1:], width)
        padded = [
            Member(call.delta, call.opt_state, call.batch, call.dropout)
            for call in (*calls, *[first] * (width - len(calls)))
        ]
        results: list[StepResult] = self.compiled[width](padded, first.weights)
        return results[: len(calls)]

    def _width(self, count: int, *, more_to_start: bool) -> int:
        """The width of the program to run: a suitable compiled one, else `count`."""
        most = sys.maxsize if more_to_start else 2 * count
        return min((n for n in self.compiled if count <= n <= most), default=count)


def shapes_key(arguments: Any) -> tuple[Any, ...]:
    """The tree structure, shapes and dtypes of a step's arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    return (structure, *((leaf.shape, str(leaf.dtype)) for leaf in leaves))


class Member(NamedTuple):
    """The arguments of one trial in a stacked step; the frozen weights are shared by all."""

    delta: Tree
    opt_state: Tree
    batch: Tree
    dropout: Any


def compile_step(
    step: StepConfig, optimizer: OptimizerConfig, mesh: Mesh, arguments: tuple[Any, ...]
) -> TrainStep:
    """Compiles the training step: outputs keep the inputs' shardings, "data" splits rows.

    Delta and optimizer state are donated. `arguments` are those of `train_step`, arrays or shapes
    with shardings.
    """
    everywhere = replicated(mesh)
    function = _step(step, optimizer, mesh, arguments)
    state = [jax.tree.map(functools.partial(_sharding, everywhere), tree) for tree in arguments[:2]]
    jitted = jax.jit(
        function,
        donate_argnums=(0, 1),
        in_shardings=(*state, None, by_row(mesh), everywhere),
        out_shardings=(*state, everywhere),
    )
    return jitted.lower(*arguments).compile()


def compile_population(
    step: StepConfig, optimizer: OptimizerConfig, mesh: Mesh, arguments: tuple[Any, ...], width: int
) -> Any:
    """Compiles `population_step` for `width` trials, each with arguments like these.

    If the mesh's data axis divides the trials, each device runs some of the trials, without
    communication. Otherwise each device runs some rows of every trial. Nothing is donated, since
    the arguments of a trial may be used twice, as padding.
    """
    everywhere, rows = replicated(mesh), by_row(mesh)
    delta, opt_state, weights, batch, dropout = arguments
    by_trial = width % mesh.shape["data"] == 0 and not split_over_data((delta, weights))
    function = _step(step, optimizer, mesh, arguments, per_device=not by_trial)
    shardings: Any = Member(everywhere, everywhere, rows, everywhere)
    jitted = jax.jit(
        functools.partial(population_step, step=function, along=rows if by_trial else None),
        in_shardings=([shardings] * width, None),
        out_shardings=everywhere,
    )
    return jitted.lower([Member(delta, opt_state, batch, dropout)] * width, weights).compile()


def population_step(
    trials: Sequence[Member], weights: Tree, *, step: TrainStep, along: NamedSharding | None
) -> list[StepResult]:
    """Runs the steps of all trials, vmapped over everything but the weights.

    Args:
        trials: of equal shapes.
        weights: the frozen model.
        step: `train_step` with its static arguments bound.
        along: sharding of the axis of trials; None if their rows are split instead.
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


def _sharding(default: Any, leaf: Any) -> Any:
    """An array's sharding; `default` for values without one, such as NumPy scalars."""
    return getattr(leaf, "sharding", None) or default
