"""Is the time of a training step proportional to its operations?

Question: how does the time of a step grow with prompt length (P from 0 to 1000), tokens, the number
of trials in one step, and layers? Does it grow like the count of operations (`train_flops`)?

Prediction: with prediction and measurement set equal at the base point (P = 20, 16 movie snippets,
one trial, all layers), all points are within 25 %. Points with few tokens or few layers are above
the prediction, since the update, padding and fixed costs do not shrink; P of 500 and more is below
it, since products are larger. Several trials cost the sum of one each. At P = 0 nothing is trained,
and only a forward pass is run and counted.

This is a measurement, not a sweep of trials: the number of trials in one step is not a config key,
and no model of the catalogue has fewer layers (here the first layers of the real model are used).
All points take a step in each round, in one process, so that other load on the machine affects all.

Command, from the repository root, on a machine that does nothing else:
    python -m experiments.cost_growth --subset quick
    python -m experiments.cost_growth

Cost: quick (11 points, 5 rounds) 4 minutes on two x86 cores, full (21 points, 9 rounds) 9 minutes.
Memory: 5 GB; the layers of shorter models are copied.

Expected (full, two x86 cores, jax 0.12, commit b78314e): 1.01 to 1.09 of the prediction for P of 1
to 500, 0.95 to 1.03 for 2 to 8 trials together, 1.01 to 1.20 for 5 to 20 layers and 3.6 for one;
0.93 to 0.95 for more tokens, 1.12 to 2.13 for fewer; 0.79 at P = 0; 1.26 at P = 1000, where the
prediction was below 1.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from softprompt.analysis.flops import forward_flops
from softprompt.analysis.plots import COLOURS, GREYS, STYLE
from softprompt.analysis.tables import to_markdown
from softprompt.config import (
    ConfigDict,
    base_config,
    from_dict,
    resolve,
    set_key,
    to_dict,
    validate,
)
from softprompt.console import Progress
from softprompt.data.pipeline import pad_rows
from softprompt.errors import UserError, unknown
from softprompt.files import write_text
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.loading import Loaded
from softprompt.results import Row, devices, versions
from softprompt.source import commit
from softprompt.training.optimizers import set_rate
from softprompt.training.sharding import put_batch
from softprompt.training.step import StepCall, StepResult
from softprompt.trials.outputs import write_outputs
from softprompt.trials.prepare import (
    Prepared,
    initial_state,
    prepare,
    step_flops,
    step_work,
    train_source,
    trial_dropout,
)
from softprompt.trials.session import Session, optimizer_config

CAPTION = (
    "Seconds: median of a step over all rounds, compilation and the first round left out, with the "
    "quartiles. Predicted: the operations of a step, at the rate of the base point. Tokens: of "
    "examples in a step, padding and prompt left out."
)


@dataclasses.dataclass(frozen=True)
class Point:
    """What a step is of: P, examples, trials together, and layers of the model (0: all)."""

    length: int = 20
    batch: int = 16
    members: int = 1
    layers: int = 0


BASE = Point()
AXES = {  # a point's field -> what its panel shows
    "length": "Prompt length P",
    "batch": "Tokens of examples a step",
    "members": "Trials together",
    "layers": "Layers",
}
VALUES: dict[str, dict[str, tuple[int, ...]]] = {
    "full": {
        "length": (0, 1, 50, 100, 200, 500, 1000),
        "batch": (2, 4, 8, 32, 64),
        "members": (2, 3, 4, 8),
        "layers": (1, 5, 10, 20),
    },
    "quick": {
        "length": (0, 100, 300, 1000),
        "batch": (8, 32),
        "members": (2, 4),
        "layers": (10, 20),
    },
}
ROUNDS = {"full": 9, "quick": 5}
RATE = 0.01  # of learning; nothing is made of what is learned


def points(subset: str) -> list[Point]:
    """The base point, and those that differ from it in one field.

    Raises:
        UserError: another subset.
    """
    if subset not in VALUES:
        raise unknown("subset", subset, VALUES)
    others = [
        dataclasses.replace(BASE, **{axis: value})
        for axis, values in VALUES[subset].items()
        for value in values
    ]
    return [BASE, *others]


def base(model: str, dtype: str) -> ConfigDict:
    """The config that all points share; vectors are drawn, so that any vocabulary has enough."""
    config = base_config()
    config.model.name, config.model.dtype, config.method.init = model, dtype, "uniform"
    config.data.validation_examples = config.data.test_examples = 100
    validate(config)
    return resolve(config)


def config_of(point: Point, shared: ConfigDict) -> ConfigDict:
    """The config of a point."""
    config = from_dict(to_dict(shared))
    set_key(config, "method.length", point.length)
    set_key(config, "train.batch", point.batch)
    return config


def shorter(loaded: Loaded, layers: int) -> Loaded:
    """The model with its first layers only."""
    config = loaded.config
    assert isinstance(config, DecoderConfig)
    if layers in (0, config.layers):
        return loaded
    config = dataclasses.replace(config, layers=layers, windows=config.windows[:layers])
    stacked = jax.tree.map(lambda leaf: leaf[:layers], loaded.weights["layers"])
    model = loaded.model.clone(config=config)
    weights = {**loaded.weights, "layers": stacked}
    return dataclasses.replace(loaded, model=model, weights=weights, config=config)


class Given(Session):
    """A session with a model that is given, not loaded by name."""

    def __init__(self, progress: Progress, loaded: Loaded) -> None:
        super().__init__(progress)
        self.loaded = loaded

    def model(self, config: ConfigDict) -> Loaded:
        """The same for every config."""
        return self.loaded


def measure(
    asked: Sequence[Point], shared: ConfigDict, *, rounds: int, progress: Progress
) -> list[Row]:
    """Times the steps of points in turns.

    Args:
        asked: the points; those of as many layers as the model has, or more, are left out.
        shared: see `base`.
        rounds: steps that are timed at each, after one that is not.
        progress: where it says how far it is.

    Returns:
        A row a point: its fields, layers counted; "seconds", one a round; "flops" of a step,
        "tokens" of its examples, and what was run where.
    """
    loaded = Session(progress).model(shared)
    if not isinstance(loaded.config, DecoderConfig):
        raise UserError(f"--model is {shared.model.name!r}, an encoder-decoder; allowed: decoders")
    asked = [point for point in asked if point.layers < loaded.config.layers]
    sessions = {
        layers: Given(progress, shorter(loaded, layers)) for layers in {p.layers for p in asked}
    }
    steps, rows = [], []
    for number, point in enumerate(asked):
        prepared = prepare(config_of(point, shared), sessions[point.layers])
        progress.stage("compile", number, len(asked))
        steps.append(stepper(prepared, point.members, rounds + 1))
        rows.append(describe(point, prepared))
    for number in range(rounds + 1):
        for place, step in enumerate(steps):
            progress.stage("take steps", number * len(steps) + place, (rounds + 1) * len(steps))
            seconds = step(number)
            if number:
                rows[place]["seconds"].append(seconds)
    return rows


def describe(point: Point, prepared: Prepared) -> Row:
    """A point's row, without its seconds."""
    config, work = prepared.loaded.config, step_work(prepared)
    assert isinstance(config, DecoderConfig)
    flops = step_flops(prepared) if point.length else forward_flops(config, work)
    return {
        **dataclasses.asdict(point),
        "layers": config.layers,
        "seconds": [],
        "flops": point.members * flops,
        "tokens": round(work.tokens - prepared.contexts.decoder),
        "model": prepared.config.model.name,
        "dtype": prepared.config.model.dtype,
        "commit": commit(),
        "versions": versions(),
        "devices": devices(),
    }


def stepper(prepared: Prepared, members: int, count: int) -> Callable[[int], float]:
    """Compiles a step for so many trials; returns what takes the n-th of `count` and times it.

    As in training a step is over when all of it is computed, and its batches, made before, are put
    on the devices within.
    """
    config, mesh, frozen = prepared.config, prepared.mesh, prepared.frozen
    source, dropout = train_source(prepared), trial_dropout(prepared)
    state = initial_state(prepared)
    made = [pad_rows(source[n], mesh.shape["data"]) for n in range(count * members)]
    opt_state = set_rate(state.opt_state, np.float32(RATE))
    arguments = (state.delta, opt_state, frozen, put_batch(mesh, made[0]), dropout)
    program = prepared.session.program(prepared.step, optimizer_config(config), mesh, arguments)
    states = [(state.delta, opt_state)] * members
    del state, arguments

    def take(calls: list[StepCall]) -> list[StepResult]:
        compiling = prepared.session.compiling
        if members == 1:
            return [program.step(calls[0], compiling)]
        return program.steps(calls, compiling=compiling, more_to_start=False, say=print)

    def step(n: int) -> float:
        nonlocal states
        began = time.perf_counter()
        batches = [put_batch(mesh, one) for one in made[n * members : (n + 1) * members]]
        calls = [
            StepCall(program, *own, frozen, batch, dropout)
            for own, batch in zip(states, batches, strict=True)
        ]
        results = jax.block_until_ready(take(calls))
        states = [(delta, opt_state) for delta, opt_state, _ in results]
        return time.perf_counter() - began

    return step


def of_axis(rows: Sequence[Row], axis: str) -> list[Row]:
    """The rows of a panel, in order: the base's, and those that differ from it in this field."""
    start = dataclasses.asdict(BASE) | {"layers": max((row["layers"] for row in rows), default=0)}
    others = [name for name in AXES if name != axis]
    same = [row for row in rows if all(row[name] == start[name] for name in others)]
    return sorted(same, key=lambda row: row[axis])


def predicted(row: Row, rows: Sequence[Row]) -> float | None:
    """Seconds of a row by its operations, at the rate of the base's; None where that is missing."""
    lengths = {row["length"]: row for row in of_axis(rows, "length")}
    start = lengths.get(BASE.length)
    if start is None:
        return None
    return statistics.median(start["seconds"]) * row["flops"] / start["flops"]


def quartiles(row: Row) -> tuple[float, float, float]:
    """The first quartile, the median and the third quartile of a row's seconds."""
    low, middle, high = np.quantile(row["seconds"], (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


def table(rows: Sequence[Row]) -> pd.DataFrame:
    """Returns a line a point of each panel."""
    lines = []
    for axis, name in AXES.items():
        for row in of_axis(rows, axis):
            low, middle, high = quartiles(row)
            by_flops = predicted(row, rows)
            lines.append(
                {
                    "grows": name,
                    "to": row["tokens" if axis == "batch" else axis],
                    "step s": round(middle, 3),
                    "quartiles": f"{low:.3f} to {high:.3f}",
                    "GFLOP": round(row["flops"] / 1e9, 2),
                    "predicted s": by_flops and round(by_flops, 3),
                    "measured / predicted": by_flops and round(middle / by_flops, 2),
                }
            )
    return pd.DataFrame(lines)


def figure(rows: Sequence[Row]) -> Figure:
    """Returns seconds of a step against what grows, four panels, the prediction beside."""
    with matplotlib.rc_context(STYLE):
        drawn = Figure(figsize=(6.4, 4.8))
        for axes, (axis, name) in zip(drawn.subplots(2, 2).flat, AXES.items(), strict=True):
            _panel(axes, of_axis(rows, axis), rows, axis)
            axes.set(xlabel=name, ylabel="Seconds a step", xlim=(0, None), ylim=(0, None))
        drawn.axes[0].legend(frameon=False)
        if rows:
            kind = f"{rows[0]['devices']['count']} x {rows[0]['devices']['kind']}"
            model = rows[0]["model"].rpartition("/")[2]
            drawn.suptitle(f"{model}, {rows[0]['dtype']}, {kind}", fontsize=10)
    return drawn


def _panel(axes: Axes, own: Sequence[Row], rows: Sequence[Row], axis: str) -> None:
    """One panel: medians with their quartiles, and the prediction."""
    xs = [row["tokens" if axis == "batch" else axis] for row in own]
    by_flops = [seconds for row in own if (seconds := predicted(row, rows)) is not None]
    if len(by_flops) == len(own):
        axes.plot(xs, by_flops, "--", color=GREYS[0], label="predicted by operations")
    parts = [quartiles(row) for row in own]
    bars = [[middle - low for low, middle, _ in parts], [high - m for _, m, high in parts]]
    middles = [middle for _, middle, _ in parts]
    axes.errorbar(xs, middles, bars, fmt="o", color=COLOURS[0], capsize=3, label="measured")


def main() -> None:
    """Measures, writes WORKDIR/rows.json, the table and the figure, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--subset", default="full", choices=VALUES)
    parser.add_argument("--workdir", type=Path, default=Path("runs/cost_growth"))
    parser.add_argument("--model", default="smollm2-135m-instruct-q4", help="a decoder")
    parser.add_argument("--dtype", default="bfloat16")
    said = parser.parse_args()
    try:
        with Progress() as progress:
            shared = base(said.model, said.dtype)
            asked = points(said.subset)
            rows = measure(asked, shared, rounds=ROUNDS[said.subset], progress=progress)
    except UserError as error:
        parser.error(str(error))
    write_text(said.workdir / "rows.json", json.dumps(rows, indent=1) + "\n")
    write_outputs(sys.modules[__name__], rows, said.workdir)
    print(to_markdown(table(rows), CAPTION), end="")


if __name__ == "__main__":
    main()
