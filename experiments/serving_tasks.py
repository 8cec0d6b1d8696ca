"""Untrained tasks for measurements of serving, and what a row of them gives alone."""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.config import (
    ConfigDict,
    base_config,
    method_settings,
    resolve,
    set_key,
    task_configs,
    to_dict,
)
from softprompt.files import write_text
from softprompt.inference.pool import Pool
from softprompt.inference.pool_programs import Lane
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.models.layers import collections
from softprompt.models.rows import Rows
from softprompt.pretrained.loading import Loaded
from softprompt.training.step import Shared, StepConfig, shared_part
from softprompt.trials.run import CONFIG, DELTA, provenance, read_config


def make_task(
    folder: Path, loaded: Loaded, *, seed: int, config: ConfigDict | None = None, **method: Any
) -> Path:
    """Writes a trial's folder with a random delta.

    Args:
        folder: of the new task.
        loaded: the model.
        seed: of the delta.
        config: of the trial, by default the base config.
        **method: keys of its section "method".
    """
    config = (config or base_config()).copy_and_resolve_references().lock()
    set_key(config, "model.name", loaded.name)
    set_key(config, "model.dtype", loaded.model.dtype.name)
    for name, value in method.items():
        set_key(config, f"method.{name}", value)
    config = resolve(config)
    settings = method_settings(config)
    cfg = method_config(config, loaded)
    key, noise = jax.random.split(jax.random.key(seed))
    delta = METHODS[settings.name].init(key, loaded.model, loaded.weights, cfg)
    leaves, tree = jax.tree.flatten(delta)
    keys = jax.random.split(noise, len(leaves))
    moved = [
        leaf + 0.05 * jax.random.normal(one, leaf.shape)  # also what starts at zero
        for leaf, one in zip(leaves, keys, strict=True)
    ]
    save_delta(folder / DELTA, jax.tree.unflatten(tree, moved), provenance(config, loaded))
    write_text(folder / CONFIG, json.dumps(to_dict(config), indent=2) + "\n")
    return folder


def method_config(config: ConfigDict, loaded: Loaded) -> Any:
    """The static configuration of a config's method."""
    settings = method_settings(config)
    setup = Setup(loaded.config, tasks=len(task_configs(config)), loaded=loaded)
    return METHODS[settings.name].resolve(settings, setup)


_SHARED: dict[Path | None, Shared] = {}


def alone(loaded: Loaded, folder: Path | None) -> Shared:
    """The variables and the unpadded context of a task; of the base model for None."""
    if folder is None:
        return {}, loaded.model.empty_context()
    if folder not in _SHARED:
        config = read_config(folder)
        name = method_settings(config).name
        step = StepConfig(loaded.model, name, method_config(config, loaded))
        delta = load_delta(folder / DELTA)[0]
        _SHARED[folder] = jax.jit(functools.partial(shared_part, step))(delta, loaded.weights)
    return _SHARED[folder]


def reference_logprobs(
    loaded: Loaded,
    shared: Shared,
    tokens: Sequence[int],
    output: Sequence[int],
    *,
    room: int,
    which: int | None = None,
) -> list[float]:
    """Log-probabilities of an output after an input, from one pass without a cache.

    Args:
        loaded: the model.
        shared: of the task, from `alone`.
        tokens: the input.
        output: what follows it.
        room: the length that both are padded to.
        which: the number of the prompt, if the task has several.
    """
    ids_T = np.zeros(room, np.int32)
    ids_T[: len(tokens) + len(output)] = [*tokens, *output]
    which_T = None if which is None else np.full(room, which)
    logprobs_TV = _whole(loaded.model, loaded.weights, shared, ids_T, which_T)
    return [float(logprobs_TV[len(tokens) - 1 + n, token]) for n, token in enumerate(output)]


@functools.partial(jax.jit, static_argnums=0)
def _whole(model: Any, weights: Any, shared: Shared, ids_T: jax.Array, which_T: Any) -> jax.Array:
    variables, context = shared
    apply = functools.partial(model.apply, collections(weights, variables))
    row = Rows(ids_T, jnp.ones_like(ids_T), jnp.arange(len(ids_T)), which=which_T)
    logits_TV: Any = apply(apply(context, row, method="hidden"), method="logits")
    return jax.nn.log_softmax(logits_TV)


def resident(pool: Pool, lane: Lane) -> float:
    """Seconds to write a lane into a pool."""
    began = time.perf_counter()
    pool.set_lane(0, lane)
    pool.wait()
    return time.perf_counter() - began
