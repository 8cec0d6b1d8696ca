"""This library's side: `python -m experiments.bench.ours job.json` prints a JSON row.

A job is what `experiments.bench.cells.job` makes. A step is timed as PEFT's is: its batch is made
before and put on the device within, and the step ends when its loss and its delta are computed.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.forms import compile_repeated, make_batch
from experiments.bench.measure import Job, cores, main, peak_resident, resident, timed
from softprompt.config import ConfigDict, base_config, resolve, set_key, validate
from softprompt.console import Progress
from softprompt.data.pipeline import TrainSource, pad_rows
from softprompt.data.rows import TrainBatch
from softprompt.models.decoder import DecoderConfig
from softprompt.results import versions
from softprompt.training.optimizers import set_rate
from softprompt.training.sharding import put_batch
from softprompt.trials.prepare import (
    Prepared,
    initial_state,
    prepare,
    step_flops,
    train_source,
    trial_dropout,
)
from softprompt.trials.programs import compile_step
from softprompt.trials.session import Session, optimizer_config

PRODUCTS = 20  # in flight at a time on an accelerator
HITS: list[str] = []  # programs that the compilation cache had


def note(event: str, **_: Any) -> None:
    """Listens to JAX."""
    if event == "/jax/compilation_cache/cache_hits":
        HITS.append(event)


class Compiled(NamedTuple):
    """Seconds of tracing and compiling a step, and whether the cache had the program."""

    seconds: float
    cached: bool


def settings(job: Job, dtype: str = "auto") -> ConfigDict:
    """The resolved config of a job, whose model is the folder that PEFT reads too."""
    config = base_config()
    keys = {"model.dtype": dtype, "method.length": job["length"]}
    keys["method.init"] = "noise" if job["method"] == "prefix" else "uniform"
    for key, value in (keys | job["config"]).items():
        set_key(config, key, value)
    config = resolve(config)
    config.model.name = job["folders"][config.model.dtype]
    validate(config)
    return config


def measure(job: Job) -> dict[str, Any]:
    """Trains some steps.

    Returns:
        "seconds" of the timed steps; "losses" of all; "load" and "first" seconds (loading, and the
        first step with its compilation) and whether the program was "cached"; bytes of the
        "memory"; "flops" of a step, the "rate" of the machine at its products (None with a saving
        off, and for a T5), rows and tokens of its first "shape"; "dtype", "device", "versions".
    """
    jax.monitoring.register_event_listener(note)
    jax.config.update("jax_compilation_cache_dir", job["cache"])
    device, before, began = jax.devices()[0], resident(), time.perf_counter()
    config = settings(job, job["dtype"])
    prepared = prepare(config, Session(Progress()))
    source = train_source(prepared)
    count = job["warmup"] + job["steps"]
    check_examples(prepared, source, job["examples"], range(job["start"], job["start"] + count))
    batches = [make_batch(source, job["start"] + n, job["off"]) for n in range(count)]
    load = time.perf_counter() - began
    compiled, run = stepper(prepared, batches, off=job["off"], rate=job["rate"])
    seconds, losses = timed(run, warmup=job["warmup"], steps=job["steps"], limit=job["limit"])
    shape = batches[0].rows.tokens.shape
    is_decoder = isinstance(prepared.loaded.config, DecoderConfig)
    rate = product_rate(prepared, int(np.prod(shape))) if is_decoder and not job["off"] else None
    stats = device.memory_stats()
    memory = stats["peak_bytes_in_use"] if stats else peak_resident() - before
    return {
        "seconds": seconds[job["warmup"] :],
        "losses": losses,
        "load": load,
        "first": compiled.seconds + seconds[0],
        "cached": compiled.cached,
        "memory": memory,
        "flops": step_flops(prepared),
        "rate": rate,
        "shape": list(shape),
        "actual_dtype": config.model.dtype,
        "device": f"{device.device_kind} ({cores()} cores)",
        "versions": versions(),
    }


def stepper(
    prepared: Prepared, batches: list[TrainBatch], *, off: str, rate: float
) -> tuple[Compiled, Callable[[int], float]]:
    """Compiles the step for every shape that the batches have.

    Returns:
        What compiling it for the first batch took, and a function that trains the n-th batch and
        returns its loss.
    """
    config, mesh, session = prepared.config, prepared.mesh, prepared.session
    state, dropout = initial_state(prepared), trial_dropout(prepared)
    delta, frozen = state.delta, prepared.frozen
    opt_state = set_rate(state.opt_state, np.float32(rate))
    optimizer = optimizer_config(config)
    del state
    if not frozen:  # the weights are trained, and their first values were copied
        session.release(config)
    put = [pad_rows(batch, mesh.shape["data"]) for batch in batches]
    shapes = [tuple(a.shape for a in jax.tree.leaves(batch)) for batch in put]
    programs, compiled = {}, []
    for shape, batch in zip(shapes, put, strict=True):
        if shape in programs:
            continue
        arguments = (delta, opt_state, frozen, put_batch(mesh, batch), dropout)
        began, hits_before = time.perf_counter(), len(HITS)
        if off == "context":
            programs[shape] = compile_repeated(prepared.step, optimizer, arguments)
        else:
            programs[shape] = compile_step(prepared.step, optimizer, mesh, arguments)
        compiled.append(Compiled(time.perf_counter() - began, len(HITS) > hits_before))
        del arguments

    def run(n: int) -> float:
        nonlocal delta, opt_state
        batch = put_batch(mesh, put[n])
        delta, opt_state, metrics = programs[shapes[n]](delta, opt_state, frozen, batch, dropout)
        jax.block_until_ready((delta, metrics))
        return float(metrics["loss"])

    return compiled[0], run


def check_examples(prepared: Prepared, source: TrainSource, file: str, steps: range) -> None:
    """Checks that steps have the examples that PEFT is given."""
    with np.load(file) as saved:
        examples_SB, lengths_SB = saved["examples"], saved["lengths"]
    for step in steps:
        ours_B = source.places(step)[0]
        assert (examples_SB[step] == ours_B).all(), f"step {step} has other examples in {file}"
        encoded, opening = source.encoded, len(prepared.step.opening)
        sizes = [opening + len(encoded.inputs[n]) + len(encoded.targets[n]) for n in ours_B]
        assert lengths_SB[step].tolist() == sizes, f"step {step}: other lengths in {file}"


def product_rate(prepared: Prepared, tokens: int) -> float:
    """Operations a second in products of the step's own shapes, each as often as a layer has it.

    Every projection of a layer, of the rows' tokens and of a prompt's context, forward and to the
    gradient of its input (and of its matrix, where that is trained), each alone on its device.
    """
    config, method = prepared.loaded.config, prepared.step.method
    assert isinstance(config, DecoderConfig)
    lengths = [tokens, prepared.contexts.decoder]
    kinds = ["mk,kn->mn", "mn,kn->mk", *(["mk,mn->kn"] if method == "full" else [])]
    flops = taken = 0.0
    for (k, n), times in Counter(projections(config)).items():
        for m in filter(None, lengths):
            sizes = {"mk": (m, k), "kn": (k, n), "mn": (m, n)}
            for kind in kinds:
                shapes = [sizes[name] for name in kind.split("->")[0].split(",")]
                flops += times * 2 * m * k * n
                taken += times * product_seconds(kind, shapes, prepared.config.model.dtype)
    return flops / taken


def projections(config: DecoderConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of a layer's matrices: q, k, v, o, gate, up, down."""
    c = config
    wide, narrow = c.heads * c.head_size, c.kv_heads * c.head_size
    attention = [(c.width, wide), (c.width, narrow), (c.width, narrow), (wide, c.width)]
    return attention + [(c.width, c.ffn)] * (1 + c.gated) + [(c.ffn, c.width)]


def product_seconds(kind: str, shapes: list[tuple[int, int]], dtype: str) -> float:
    """The median time of a product.

    An accelerator is given several before it is waited for: else launching one is what is timed.
    """
    count = 1 if jax.default_backend() == "cpu" else PRODUCTS
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))
    product = jax.jit(lambda a, b: jnp.einsum(kind, a, b))
    product(a, b).block_until_ready()
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        jax.block_until_ready([product(a, b) for _ in range(count)])
        seconds.append((time.perf_counter() - began) / count)
    return statistics.median(seconds)


if __name__ == "__main__":
    main(measure)
