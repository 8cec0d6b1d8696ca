"""A pool of many prompts against PEFT that switches adapters, and against one PyTorch batch."""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.serving_measure import Answers, ratio, say, take_turns
from experiments.serving_tasks import make_task
from softprompt.evaluation.latency import Seconds, seconds
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.pretrained.save import save_folder
from softprompt.serving.bank import Bank
from softprompt.serving.engine import Engine
from softprompt.serving.placement import Sizes
from softprompt.serving.requests import Request
from softprompt.trials.run import DELTA

REQUESTS, LENGTH, INPUT, NEW = 64, 100, 31, 32
FEW = 4  # requests by which the better dtype of switching is chosen
DTYPES = ("bfloat16", "float32")
Ask = Callable[[str, str, int], dict[str, Any]]


def against_peft(said: argparse.Namespace, folder: Path) -> None:
    """64 requests for 64 prompts, P = 100: 31 tokens in, 32 out, to the last token of the last."""
    models = {dtype: load_model(said.model, dtype=dtype) for dtype in DTYPES}
    vocab = models["float32"].config.vocab
    inputs = np.random.default_rng(4).integers(5, vocab - 5, (REQUESTS, INPUT))
    tasks = write_inputs(folder, models, inputs)
    engines = {dtype: engine_of(loaded, tasks) for dtype, loaded in models.items()}
    ours = {dtype: functools.partial(run, one, inputs) for dtype, one in engines.items()}
    with other_side(said.peft_python, folder / "job.json") as ask:
        wanted = ask("batch", "float32", REQUESTS)["tokens"]
        same = sum(a == b for a, b in zip(ours["float32"](), wanted, strict=True))
        say("peft: greedy tokens (float32)", f"{same} of {REQUESTS} rows equal the batch's", "all")
        own, batch, switching = (
            better("ours", lambda dtype: seconds(ours[dtype])[0]),
            better("batch", lambda dtype: ask("batch", dtype, REQUESTS)["seconds"]),
            better("switching", lambda dtype: ask("switching", dtype, FEW)["seconds"]),
        )
        forms = {
            "ours": functools.partial(seconds, ours[own]),
            "contexts": functools.partial(seconds, contexts(models[own], tasks)),
            "batch": functools.partial(timed, ask, "batch", batch),
            "switching": functools.partial(timed, ask, "switching", switching),
        }
        times = take_turns(forms, said.rounds)
    for engine in engines.values():
        engine.close()
    for name, each in times.items():
        shown = f"{statistics.median(a for a, _ in each):.2f} s"
        print(f"peft: {name}, {REQUESTS} requests: {shown}", flush=True)
    say("peft: pool over switching adapters", ratio(times, "switching", "ours"), "8")
    say("peft: pool over a batch of embeddings", ratio(times, "batch", "ours"), "1.2")


def better(name: str, clock: Callable[[str], float]) -> str:
    """The dtype in which a form takes fewer seconds."""
    tried = {dtype: clock(dtype) for dtype in DTYPES}
    shown = ", ".join(f"{dtype} {taken:.2f} s" for dtype, taken in tried.items())
    print(f"peft: {name}: {shown}", flush=True)
    return min(tried, key=lambda dtype: tried[dtype])


def write_inputs(folder: Path, models: dict[str, Loaded], inputs: np.ndarray) -> list[Path]:
    """Writes the tasks, the model and the other side's job; returns the tasks' folders."""
    loaded = models["float32"]
    tasks = [
        make_task(folder / f"task-{n}", loaded, seed=n, name="prompt", length=LENGTH)
        for n in range(REQUESTS)
    ]
    for dtype, model in models.items():
        save_folder(folder / dtype, model.config, model.weights, model.tokenizer)
    job = {
        "folders": {dtype: str(folder / dtype) for dtype in DTYPES},
        "prompts": [str(path / DELTA) for path in tasks],
        "inputs": inputs.tolist(),
        "new": NEW,
    }
    (folder / "job.json").write_text(json.dumps(job))
    return tasks


def engine_of(loaded: Loaded, tasks: list[Path]) -> Engine:
    """An engine with a lane for each task, whose outputs do not end before their limit."""
    endless = dataclasses.replace(loaded.tokenizer, eos_id=None)
    sizes = Sizes(REQUESTS, 32, NEW, lanes=REQUESTS, together=16, scores=False)
    engine = Engine(dataclasses.replace(loaded, tokenizer=endless), sizes=sizes)
    for path in tasks:
        engine.load(path.name, path)
    return engine


def run(engine: Engine, inputs: np.ndarray) -> list[list[int]]:
    """The generated ids of all requests."""
    requests = [Request(f"task-{n}", tuple(ids.tolist()), NEW) for n, ids in enumerate(inputs)]
    return [[token.id for token in one] for one in Answers(engine, requests).wait()]


def contexts(loaded: Loaded, tasks: list[Path]) -> Callable[[], Any]:
    """Computes the keys and values of all tasks, which the pool has computed before."""
    bank = Bank(loaded)
    found = [bank.read(path.name, path)[0] for path in tasks]
    return lambda: jax.block_until_ready([task.make() for task in found])


def timed(ask: Ask, form: str, dtype: str) -> Seconds:
    """The seconds of a form of the other side."""
    answer = ask(form, dtype, REQUESTS)
    return answer["seconds"], answer["processors"]


@contextlib.contextmanager
def other_side(python: str, job: Path) -> Iterator[Ask]:
    """Runs `experiments.serving_torch`; gives a function that has it run a form."""
    command = [python, "-m", "experiments.serving_torch", str(job)]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": quiet}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def ask(form: str, dtype: str, requests: int) -> dict[str, Any]:
            print(json.dumps([form, dtype, requests]), file=stdin, flush=True)
            found: dict[str, Any] = json.loads(stdout.readline())
            return found

        yield ask
        stdin.close()
