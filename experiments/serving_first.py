"""The time to the first token, and from one to the next, as a client sees it over HTTP."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx2
import numpy as np

from experiments.serving_measure import say
from experiments.serving_soak import server
from experiments.serving_tasks import make_task
from softprompt.analysis.flops import Work, forward_flops
from softprompt.evaluation.latency import median_interval
from softprompt.models.decoder_layers import DecoderConfig
from softprompt.pretrained.loading import load_model

INPUT, NEW, LEAST = 31, 17, 9  # tokens of an input and an output; fewer than LEAST do not count
TARGETS = {20: "+5 %", 100: "+10 %", 500: "+30 %"}
LLAMA_8B = DecoderConfig(  # sizes of Llama 3.1 8B
    vocab=128256,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_size=128,
    ffn=14336,
    context_length=131072,
    tied=False,
)


def first_token(said: argparse.Namespace, folder: Path) -> None:
    """Requests to a task and to the base model in turns; keys and values are cached."""
    loaded = load_model(said.model, dtype=said.dtype)
    assert isinstance(loaded.config, DecoderConfig)
    room = loaded.config.context_length - INPUT - NEW
    targets = {length: target for length, target in TARGETS.items() if length <= room}
    for length in targets:
        make_task(folder / f"prompt-{length}", loaded, seed=1, name="prompt", length=length)
    shape = 3 * said.rounds, INPUT
    inputs = np.random.default_rng(6).integers(5, loaded.config.vocab - 5, shape).tolist()
    options = ("--dtype", said.dtype, "--max-input", "64", "--max-tokens", "64")
    with server(folder, said.model, "no-key-of-changes", *options) as address:
        with httpx2.Client(base_url=address, timeout=120) as client:
            for length, target in targets.items():
                names = said.model, f"prompt-{length}"
                ask(client, names[1], inputs[0])
                found = [in_pair(client, names, ids, turn) for turn, ids in enumerate(inputs)]
                report(loaded.config, length, target, found)
    for name, config in (("this model", loaded.config), ("Llama 8B", LLAMA_8B)):
        print(f"first: 1 % more operations in {name}: P = {one_percent(config):.0f}", flush=True)


def in_pair(
    client: httpx2.Client, names: tuple[str, str], ids: list[int], turn: int
) -> dict[str, list[float]]:
    """The times of the base model and of a task, for one input; who is first alternates."""
    order = names if turn % 2 else names[::-1]
    return {name: ask(client, name, ids) for name in order}


def ask(client: httpx2.Client, name: str, ids: list[int]) -> list[float]:
    """The times at which the tokens of a streamed answer came, in seconds since it was asked."""
    body: dict[str, Any] = {"model": name, "prompt": ids, "max_tokens": NEW, "temperature": 0}
    times, began = [], time.perf_counter()
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            text = line.removeprefix("data: ")
            if text.startswith("{") and json.loads(text)["choices"][0]["text"]:
                times.append(time.perf_counter() - began)
    return times


def report(
    config: DecoderConfig, length: int, target: str, found: list[dict[str, list[float]]]
) -> None:
    """Prints what a task takes over the base model, measured and predicted."""
    pairs = [tuple(one[name] for name in sorted(one, key=_is_task)) for one in found]
    first = [(base[0], task[0]) for base, task in pairs if base and task]
    rest = [
        tuple((times[-1] - times[0]) / (len(times) - 1) for times in pair)
        for pair in pairs
        if min(map(len, pair)) >= LEAST
    ]
    for name, several, tokens in (("first token", first, INPUT), ("a token", rest, 1)):
        ratios = [task / base for base, task in several]
        low, high = median_interval(ratios)
        base = 1000 * statistics.median(base for base, _ in several)
        shown = (
            f"{statistics.median(ratios) - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}) "
            f"of {base:.0f} ms, {len(ratios)} pairs"
        )
        expected = f"{target if tokens > 1 else 'none'}; operations "
        say(f"first: {name}, P = {length}", shown, f"{expected}{more(config, length, tokens):+.1%}")


def _is_task(name: str) -> bool:
    return name.startswith("prompt-")


def more(config: DecoderConfig, length: int, tokens: int) -> float:
    """The share of operations that attention to P cached positions adds to a pass of `tokens`."""
    own = tokens * (tokens + 1) / 2
    with_context, base = (
        forward_flops(config, Work(tokens, own + tokens * positions, 1))
        for positions in (length, 0)
    )
    return with_context / base - 1


def one_percent(config: DecoderConfig) -> float:
    """The P at which attention takes 1 % of the operations of a pass without the head."""
    flops = [forward_flops(config, Work(1, keys, 0)) for keys in (0, 1)]
    return 0.01 * flops[0] / (flops[1] - flops[0])
