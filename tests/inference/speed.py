"""Measures batched decoding of the real SmolLM2-135M, with a context of 100 positions and without.

Run from the repository root on a machine that does nothing else (about two minutes):

    python -m tests.inference.speed [--rows 16] [--new 64] [--pairs 9] [--dtype bfloat16]

The two take turns, so that what else the machine does hits both; the ratio is the median over
pairs.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.inference.decode import Rows, Rules, decode_function, prefill_function
from softprompt.inference.sampling import GREEDY
from softprompt.models.loading import Loaded, load_model

INPUT, CONTEXT = 64, 100  # tokens


def decoder_of(loaded: Loaded, context: int, rows: int, new: int) -> Any:
    """A function that decodes `new` tokens of every row behind a context, and waits for them."""
    model, weights = loaded.model, loaded.weights
    random = np.random.default_rng(0)
    tokens_P = random.integers(2, model.config.vocab, context)
    shared = {}, model.apply({"params": weights}, jnp.asarray(tokens_P), method="text_context")
    tokens_BT = random.integers(2, model.config.vocab, (rows, INPUT)).astype(np.int32)
    lengths_B = random.integers(INPUT // 2, INPUT + 1, rows).astype(np.int32)
    prefilled = prefill_function(model)(weights, shared, tokens_BT, lengths_B, slots=INPUT)
    logits_BV, memory = jax.block_until_ready(prefilled)
    who = Rows(np.arange(rows, dtype=np.uint32), np.ones(rows, bool))
    rules = Rules(new, -1, GREEDY, jax.random.key(0))
    decode = decode_function(model, None)

    def run() -> None:
        jax.block_until_ready(decode(weights, shared, memory, logits_BV, who, rules, new=new))

    return run


def seconds(run: Any) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def main() -> None:
    """Prints tokens a second of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("rows", 16), ("new", 64), ("pairs", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    said = parser.parse_args()
    loaded = load_model("smollm2-135m-instruct-q4", dtype=said.dtype)
    runs = {c: decoder_of(loaded, c, said.rows, said.new) for c in (0, CONTEXT)}
    for run in runs.values():  # compiles
        run()
    times: dict[int, list[float]] = {c: [] for c in runs}
    for pair in range(said.pairs):
        for context in sorted(runs, reverse=bool(pair % 2)):
            times[context].append(seconds(runs[context]))
    for context, values in times.items():
        rate = said.rows * said.new / statistics.median(values)
        print(f"context of {context}: {rate:.0f} tokens/s (median of {len(values)})")
    ratios = [a / b for a, b in zip(times[0], times[CONTEXT], strict=True)]
    print(f"with over without, median of pairs: {statistics.median(ratios):.3f}")
    print("ratios:", " ".join(f"{ratio:.3f}" for ratio in ratios))


if __name__ == "__main__":
    main()
