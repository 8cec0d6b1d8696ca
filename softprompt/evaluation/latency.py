"""What a delta costs when a model is used: prefill and decoding, timed in pairs with the base.

The two take turns in one process, so that what else the machine does hits both, and what is told is
the median of their ratios. Nothing is merged into the weights.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from scipy import stats

from softprompt.inference.batches import input_batches, slots_for
from softprompt.inference.decode import (
    NO_TOKEN,
    RowIds,
    Rules,
    decode_function,
    on_rows,
    prefill_function,
)
from softprompt.inference.sampling import GREEDY
from softprompt.models import Model

Tree = Any
Run = Callable[[], Any]  # does its work, and waits for it
Seconds = tuple[float, float]  # by the clock, and of all processors

ROWS, NEW, PAIRS = 8, 16, 21  # inputs together, tokens that each is continued by, measurements


class Served(NamedTuple):
    """A model in use: its weights, the variables and context of a method, and what it reads.

    `which`: the number of the prompt that all inputs have, where there are several.
    """

    weights: Tree
    shared: tuple[Tree, Any]
    inputs: Sequence[np.ndarray]
    which: int | None = None


def compare(
    model: Model,
    base: Served,
    other: Served,
    *,
    mesh: Mesh | None = None,
    rows: int = ROWS,
    new: int = NEW,
    pairs: int = PAIRS,
) -> dict[str, Any]:
    """What `other` costs over `base`, in prefill and for each token decoded with a cache.

    Args:
        model: of both, a decoder or a T5.
        base: the one.
        other: the other.
        mesh: rows are split over its data axis.
        rows: inputs that are run together: the first ones, over again where there are fewer.
        new: tokens decoded, 2 or more; prefill brings the first.
        pairs: measurements of each.

    Returns:
        rows, new and pairs; then for "prefill" (of a batch) and "token" (of every row):
        `_overhead`, the median of the pairs' ratios less 1, `_low` and `_high`, its 95 % interval,
        `_seconds` and `_base_seconds`, medians, and `_ratios`, one a pair.
    """
    runs = [functions(model, one, mesh=mesh, rows=rows, new=new) for one in (base, other)]
    found: dict[str, Any] = {"rows": rows, "new": new, "pairs": pairs}
    for name, steps, which in (("prefill", 1, 0), ("token", new - 1, 1)):
        times = in_turns(runs[0][which], runs[1][which], pairs)
        clocks = [(first[0] / steps, second[0] / steps) for first, second in times]
        ratios = [second / first for first, second in clocks]
        low, high = median_interval(ratios)
        found |= {
            f"{name}_overhead": statistics.median(ratios) - 1,
            f"{name}_low": low - 1,
            f"{name}_high": high - 1,
            f"{name}_seconds": statistics.median(second for _, second in clocks),
            f"{name}_base_seconds": statistics.median(first for first, _ in clocks),
            f"{name}_ratios": ratios,
        }
    return found


def functions(
    model: Model, served: Served, *, mesh: Mesh | None, rows: int, new: int
) -> tuple[Run, Run]:
    """A function that runs a batch of inputs, and one that continues them by `new` tokens."""
    weights, shared, inputs, which = served
    (batch,) = input_batches([inputs[n % len(inputs)] for n in range(rows)], batch=rows)
    slots = slots_for(batch.tokens_BT.shape[1])
    which_B = None if which is None else np.full(rows, which, np.int32)
    arguments = on_rows(mesh, (batch.tokens_BT, batch.lengths_B, which_B))
    who = on_rows(mesh, RowIds(np.arange(rows, dtype=np.uint32), np.ones(rows, bool)))
    rules = Rules(new, NO_TOKEN, GREEDY, jax.random.key(0))

    def prefill() -> Any:
        run = prefill_function(model)
        return jax.block_until_ready(run(weights, shared, *arguments, slots=slots))

    logits_BV, memory = prefill()

    def decode() -> Any:
        run = decode_function(model, mesh)
        return jax.block_until_ready(run(weights, shared, memory, logits_BV, who, rules, new=new))

    return prefill, decode


def in_turns(first: Run, second: Run, pairs: int) -> list[tuple[Seconds, Seconds]]:
    """Seconds of both, pair by pair, the order turned round each time; a call before compiles."""
    first(), second()
    times = []
    for pair in range(pairs):
        if pair % 2:
            later, earlier = seconds(second), seconds(first)
            times.append((earlier, later))
        else:
            times.append((seconds(first), seconds(second)))
    return times


def seconds(run: Run) -> Seconds:
    """How long a call takes, by the clock and in seconds of all processors."""
    began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what the values are drawn from, 95 % or more often.

    Two of the values themselves, whatever they are distributed like; the smallest and the largest
    where they are fewer than six, which is less than 95 %.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = sorted(values)
    place = max(1, int(stats.binom.ppf(0.025, len(ordered), 0.5)))
    return ordered[place - 1], ordered[-place]
