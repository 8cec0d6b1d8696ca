"""The latency that a delta adds to prefill and decoding, timed in pairs with the base model.

Both run alternately in one process, so that other load on the machine slows down both. The result
is the median of their ratios. Deltas are not merged into the weights.
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
Run = Callable[[], Any]  # runs a program, and waits for its outputs
Seconds = tuple[float, float]  # wall time, and CPU time of the process

ROWS, NEW, PAIRS = 8, 16, 21  # inputs in a batch, new tokens for each, measurements


class Served(NamedTuple):
    """A model to be timed: its weights, the variables and context of a method, and its inputs.

    `which` is the number of the prompt of all inputs, if the method has several prompts.
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
    """Compares the latency of `other` with `base`, in prefill and per token decoded with a cache.

    Args:
        model: of both, a decoder or a T5.
        base: the reference.
        other: compared with it.
        mesh: rows are split over its data axis.
        rows: batch size; the first inputs are used, repeatedly if there are fewer.
        new: tokens to decode, 2 or more; prefill computes the first.
        pairs: measurements of each.

    Returns:
        rows, new and pairs; then for "prefill" (of a batch) and "token" (of every row):
        `_overhead`, the median of the pairs' ratios minus 1, `_low` and `_high`, its 95 % interval,
        `_seconds` and `_base_seconds`, medians, and `_ratios`, one per pair.
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
    """A function that runs the prefill of a batch, and one that decodes `new` tokens."""
    weights, shared, inputs, which = served
    (batch,) = input_batches([inputs[n % len(inputs)] for n in range(rows)], batch=rows)
    slots = slots_for(batch.tokens_BT.shape[1])
    which_B = None if which is None else np.full(rows, which, np.int32)
    arguments = on_rows(mesh, (batch.tokens_BT, batch.lengths_B, which_B))
    row_ids = on_rows(mesh, RowIds(np.arange(rows, dtype=np.uint32), np.ones(rows, bool)))
    rules = Rules(new, NO_TOKEN, GREEDY, jax.random.key(0))

    def prefill() -> Any:
        run = prefill_function(model)
        return jax.block_until_ready(run(weights, shared, *arguments, slots=slots))

    logits_BV, input_cache = prefill()

    def decode() -> Any:
        run = decode_function(model, mesh)
        return jax.block_until_ready(
            run(weights, shared, input_cache, logits_BV, row_ids, rules, new=new)
        )

    return prefill, decode


def in_turns(first: Run, second: Run, pairs: int) -> list[tuple[Seconds, Seconds]]:
    """Times both, pair by pair, in alternating order, after a first call that compiles."""
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
    """The wall time and the CPU time of a call."""
    began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """A confidence interval of the median, with a coverage of at least 95 %.

    It needs no assumption on the distribution: its ends are two of the values. With fewer than six
    values they are the smallest and the largest, and the coverage is below 95 %.

    Source: Conover 1999, Practical Nonparametric Statistics, section 3.2.
    """
    ordered = sorted(values)
    rank = max(1, int(stats.binom.ppf(0.025, len(ordered), 0.5)))
    return ordered[rank - 1], ordered[-rank]
