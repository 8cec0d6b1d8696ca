"""What does a context cost in decoding?

Question: how many tokens a second does batched decoding of the real SmolLM2-135M make behind a
context of 100 positions, and how many behind none?

Prediction: within 5 % of each other. A step reads all weights and multiplies them with every row;
the context's 100 keys and values a layer are computed once, kept once for all rows, and are 1 % of
what is read. A row's attention to them adds 3 % of its operations.

This is a measurement, not a sweep of trials: it has no `sweep`, `table` and `figure`. The two forms
take turns in one process, so that what else the machine does hits both; the processors' seconds say
more than the clock where it does much. Prefill is not counted.

Command, from the repository root, on a machine that does nothing else:
    python -m experiments.decode_speed
    python -m experiments.decode_speed --rows 32 --new 128 --dtype float32

Cost: two minutes on two x86 cores, by estimate.

Expected: not known yet. It has not been run on a machine that did nothing else.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.inference.decode import Rows, Rules, decode_function, prefill_function
from softprompt.inference.sampling import GREEDY
from softprompt.models.loading import Loaded, load_model

MODEL = "smollm2-135m-instruct-q4"
INPUT, CONTEXT = 64, 100  # tokens


def decoder_of(loaded: Loaded, context: int, rows: int, new: int) -> Callable[[], Any]:
    """A function that decodes `new` tokens of every row behind a context, and waits for them."""
    model, weights = loaded.model, loaded.weights
    random = np.random.default_rng(0)
    tokens_BT = random.integers(2, model.config.vocab, (rows, INPUT)).astype(np.int32)
    lengths_B = random.integers(INPUT // 2, INPUT + 1, rows).astype(np.int32)
    tokens_P = random.integers(2, model.config.vocab, context)
    shared: Any = {}, model.apply({"params": weights}, jnp.asarray(tokens_P), method="text_context")
    prefilled = prefill_function(model)(weights, shared, tokens_BT, lengths_B, slots=INPUT)
    logits_BV, memory = jax.block_until_ready(prefilled)
    who = Rows(np.arange(rows, dtype=np.uint32), np.ones(rows, bool))
    rules = Rules(new, -1, GREEDY, jax.random.key(0))
    decode = decode_function(model, None)
    return lambda: jax.block_until_ready(
        decode(weights, shared, memory, logits_BV, who, rules, new=new)
    )


def seconds(run: Callable[[], Any]) -> tuple[float, float]:
    """How long a call takes, by the clock and in seconds of all processors."""
    began = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began[0], time.process_time() - began[1]


def main() -> None:
    """Prints tokens a second of both, and their ratio by pairs of neighbours in time."""
    parser = argparse.ArgumentParser(description="What does a context cost in decoding?")
    for name, value in (("rows", 16), ("new", 64), ("pairs", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    said = parser.parse_args()
    loaded = load_model(MODEL, dtype=said.dtype)
    runs = {c: decoder_of(loaded, c, said.rows, said.new) for c in (0, CONTEXT)}
    for run in runs.values():  # compiles
        run()
    times: dict[int, list[tuple[float, float]]] = {c: [] for c in runs}
    for pair in range(said.pairs):
        for context in sorted(runs, reverse=bool(pair % 2)):
            times[context].append(seconds(runs[context]))
    for context, values in times.items():
        rate = said.rows * said.new / statistics.median(clock for clock, _ in values)
        print(f"context of {context}: {rate:.0f} tokens/s (median of {len(values)})")
    for kind, name in enumerate(("clock", "processors")):
        pairs = zip(times[0], times[CONTEXT], strict=True)
        ratios = sorted(without[kind] / behind[kind] for without, behind in pairs)
        told = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"speed with over without by {name}: {statistics.median(ratios):.3f} ({told})")


if __name__ == "__main__":
    main()
