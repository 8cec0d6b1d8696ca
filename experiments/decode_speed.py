"""What does a context cost in decoding?

Question: how many tokens a second does batched decoding with the real SmolLM2-135M produce after a
context of 100 positions, and how many without a context?

Prediction: within 5 % of each other. A step reads all weights and multiplies them with every row.
The context's 100 keys and values in each layer are computed once and shared by all rows; they are
1 % of the bytes read. A row's attention to them adds 3 % to its operations.

This is a measurement, not a sweep of trials: it has no `sweep`, `table` and `figure`. The two forms
take turns in one process, so that other load on the machine affects both. On a busy machine the
processor time is more reliable than the clock. Prefill and its token are not counted.

Command, from the repository root, on a machine that does nothing else:
    python -m experiments.decode_speed
    python -m experiments.decode_speed --rows 32 --new 128 --dtype float32

Cost: 40 seconds on two x86 cores.

Expected: 0.957, 0.982 and 0.939 by the clock in three runs; in the last, a noisy hour, 338 tokens a
second behind the context and 359 without (bfloat16, jax 0.12, two x86 cores).
"""

import argparse
import statistics
from typing import Any

import jax.numpy as jnp
import numpy as np

from softprompt.evaluation.latency import Served, functions, in_turns
from softprompt.pretrained.loading import Loaded, load_model

MODEL = "smollm2-135m-instruct-q4"
INPUT, CONTEXT = 64, 100  # tokens


def served(loaded: Loaded, context: int, rows: int) -> Served:
    """The model behind a context of so many random tokens, with random inputs."""
    model, random = loaded.model, np.random.default_rng(0)
    lengths_B = random.integers(INPUT // 2, INPUT + 1, rows)
    inputs = [random.integers(2, model.config.vocab, n).astype(np.int32) for n in lengths_B]
    tokens_P = random.integers(2, model.config.vocab, context)
    apply = model.apply
    shared: Any = apply({"params": loaded.weights}, jnp.asarray(tokens_P), method="text_context")
    return Served(loaded.weights, ({}, shared), inputs)


def main() -> None:
    """Prints tokens a second of both, and their ratio by pairs of neighbours in time."""
    parser = argparse.ArgumentParser(description="What does a context cost in decoding?")
    for name, value in (("rows", 16), ("new", 64), ("pairs", 9)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="bfloat16")
    said = parser.parse_args()
    loaded = load_model(MODEL, dtype=said.dtype)
    sizes = {"mesh": None, "rows": said.rows, "new": said.new}
    without, behind = (
        functions(loaded.model, served(loaded, context, said.rows), **sizes)[1]
        for context in (0, CONTEXT)
    )
    times = in_turns(without, behind, said.pairs)
    for place, context in enumerate((0, CONTEXT)):
        rate = said.rows * (said.new - 1) / statistics.median(pair[place][0] for pair in times)
        print(f"context of {context}: {rate:.0f} tokens/s (median of {said.pairs})")
    for kind, name in enumerate(("clock", "processors")):
        ratios = sorted(plain[kind] / context[kind] for plain, context in times)
        told = " ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"speed with over without by {name}: {statistics.median(ratios):.3f} ({told})")


if __name__ == "__main__":
    main()
