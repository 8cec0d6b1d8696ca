"""The training step with one of its savings switched off: the same losses, at what they cost.

"packing": one example a row, padded to the longest of the step (rounded up to 8, as rows are).
"targets": logits at all positions; those without a target have no weight.
"context": each row has a copy of the prompt and computes a context of its own. For as many contexts
as examples, rows hold one example each, so that this switches packing off too: its own cost is
what it takes more than "packing".
"""

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt.data.packing import RowShape
from softprompt.data.pipeline import TrainSource, train_batch
from softprompt.data.rows import TrainBatch
from softprompt.training.optimizers import OptimizerConfig, make_optimizer
from softprompt.training.step import Metrics, StepConfig, TrainStep, rows_loss, shared_part

Tree = Any


def make_batch(source: TrainSource, step: int, off: str) -> TrainBatch:
    """The rows of a step, with the saving `off` ("" for none) switched off."""
    if off in ("packing", "context"):
        return alone(source, step)
    return everywhere(source[step]) if off == "targets" else source[step]


def alone(source: TrainSource, step: int) -> TrainBatch:
    """The examples of a step, one a row."""
    examples_B, _ = source.places(step)
    tokens = -(-int(source.lengths_N[examples_B].max()) // 8) * 8
    targets = max(len(source.encoded.targets[n]) for n in examples_B)
    shape = RowShape(len(examples_B), tokens, targets, 1)
    return train_batch(source.encoded, examples_B, np.arange(len(examples_B)), shape, source.layout)


def everywhere(batch: TrainBatch) -> TrainBatch:
    """The same rows with M = T: every position is one whose logits are computed."""
    rows, shape = batch.rows, batch.rows.tokens.shape
    used = np.nonzero(batch.loss_weights)
    where = used[0], rows.index[used]

    def spread(array_RM: np.ndarray) -> np.ndarray:
        array_RT = np.zeros(shape, array_RM.dtype)
        array_RT[where] = array_RM[used]
        return array_RT

    index_RT = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    beside = spread(batch.targets), spread(batch.loss_weights)
    return TrainBatch(replace(rows, index=index_RT), *beside)


def compile_repeated(
    step: StepConfig, optimizer: OptimizerConfig, arguments: tuple[Any, ...]
) -> TrainStep:
    """`softprompt.trials.programs.compile_step` for a context a row, on one device."""
    update = functools.partial(repeated_step, config=step, tx=make_optimizer(optimizer))
    return jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()


def repeated_step(
    delta: Tree,
    opt_state: Tree,
    weights: Tree,
    batch: TrainBatch,
    dropout: None,
    *,
    config: StepConfig,
    tx: optax.GradientTransformation,
) -> tuple[Tree, Tree, Metrics]:
    """`softprompt.training.step.train_step` with a context a row."""
    del dropout

    def loss(delta: Tree) -> tuple[jax.Array, Metrics]:
        rows, prompt_PD = len(batch.rows.tokens), delta["prompt"]
        prompts_RPD = jnp.broadcast_to(prompt_PD, (rows, *prompt_PD.shape))
        parts = jax.vmap(functools.partial(row_loss, config, weights))(prompts_RPD, batch)
        summed: tuple[jax.Array, Metrics] = jax.tree.map(jnp.sum, parts)
        return summed

    (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(delta)
    updates, opt_state = tx.update(grads, opt_state, delta)
    return optax.apply_updates(delta, updates), opt_state, metrics


def row_loss(
    config: StepConfig, weights: Tree, prompt_PD: jax.Array, row: TrainBatch
) -> tuple[jax.Array, Metrics]:
    """The part of one row in the step's loss, behind a context of its own."""
    shared = shared_part(config, {"prompt": prompt_PD}, weights)
    return rows_loss(config, shared, weights, jax.tree.map(lambda x: x[None], row))
