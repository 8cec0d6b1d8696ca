"""The time to the first token, and from one to the next, as a client sees it over HTTP."""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
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
TURNS = 10  # pairs a round
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
Parts = list[tuple[float, int]]  # seconds since the request, and tokens, of an answer's parts


def first_token(said: argparse.Namespace, folder: Path) -> None:
    """Requests to a task and to the base model in turns; keys and values are cached."""
    loaded = load_model(said.model, dtype=said.dtype)
    assert isinstance(loaded.config, DecoderConfig)
    room = loaded.config.context_length - INPUT - NEW
    targets = {length: target for length, target in TARGETS.items() if length <= room}
    for length in targets:
        make_task(folder / f"prompt-{length}", loaded, seed=1, name="prompt", length=length)
    shape = TURNS * said.rounds, INPUT
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
) -> dict[str, Parts]:
    """The answers of the base model and of a task to one input; who is first alternates."""
    order = names if turn % 2 else names[::-1]
    return {name: ask(client, name, ids) for name in order}


def ask(client: httpx2.Client, name: str, ids: list[int]) -> Parts:
    """The parts of a streamed answer.

    Log-probabilities are asked for because they say how many tokens a part has: the server keeps a
    token back whose character is not complete.
    """
    body: dict[str, Any] = {"model": name, "prompt": ids, "max_tokens": NEW, "temperature": 0}
    parts, began = [], time.perf_counter()
    with client.stream(
        "POST", "/v1/completions", json=body | {"stream": True, "logprobs": 0}
    ) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            text = line.removeprefix("data: ")
            if text.startswith("{") and (logprobs := json.loads(text)["choices"][0]["logprobs"]):
                parts.append((time.perf_counter() - began, len(logprobs["tokens"])))
    return parts


def report(
    config: DecoderConfig, length: int, target: str, found: Sequence[Mapping[str, Parts]]
) -> None:
    """Prints what a task takes over the base model, measured and predicted."""
    pairs = [[one[name] for name in sorted(one, key=_is_task)] for one in found]
    first = [
        (base[0][0], task[0][0])
        for base, task in pairs
        if all(parts and parts[0][1] == 1 for parts in (base, task))
    ]
    rest = [
        tuple(map(seconds_a_token, pair))
        for pair in pairs
        if all(sum(count for _, count in parts) >= LEAST for parts in pair)
    ]
    for name, several, tokens in (("first token", first, INPUT), ("a token", rest, 1)):
        ratios = [task / base for base, task in several]
        low, high = median_interval(ratios)
        base, task = (1000 * statistics.median(side) for side in zip(*several, strict=True))
        shown = (
            f"{statistics.median(ratios) - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%}), "
            f"{base:.1f} and {task:.1f} ms, {len(ratios)} pairs"
        )
        expected = f"{target if tokens > 1 else 'none'}; operations "
        say(f"first: {name}, P = {length}", shown, f"{expected}{more(config, length, tokens):+.1%}")


def seconds_a_token(parts: Parts) -> float:
    """The seconds from one token to the next, behind the first part."""
    return (parts[-1][0] - parts[0][0]) / sum(count for _, count in parts[1:])


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
