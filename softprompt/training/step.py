"""The training step: a pure function of (delta, opt_state, weights, batch, dropout).

Gradients are taken with respect to the delta only, so the weights are frozen. `dropout` holds the
step's random key and the probabilities of keeping an entry; it is None without dropout.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt.data.rows import TrainBatch
from softprompt.methods import METHODS
from softprompt.methods.prompt import dropped
from softprompt.models import Model
from softprompt.models.dropout import Dropout, split, streams
from softprompt.models.layers import collections, head_weights
from softprompt.models.rows import Rows
from softprompt.training.chunked_loss import chunked
from softprompt.training.optimizers import row_norms

Tree = Any
Shared = tuple[Tree, Any]  # the method's variables, and the model's context
Metrics = dict[str, jax.Array]


class StepConfig(NamedTuple):
    """The static configuration of a training step, besides shapes and the optimizer.

    Trials share one compiled program if these values and the non-None fields of their `Dropout` are
    equal. The probabilities themselves may differ.

    Attributes:
        model: a decoder or an encoder-decoder, without its weights.
        method: name of the method that defines the delta.
        method_config: the static part of the method's configuration.
        z_loss: weight of the squared log-normaliser. Source: arXiv 2204.02311, section 5.
        microbatches: number of sequential parts that a step's rows are split into.
        opening: the tokens that the texts of all examples begin with. A decoder's context ends with
            them, and they are not in the rows. () if there are none.
        loss_chunk: the positions of a row whose logits exist at a time, see
            `softprompt.training.chunked_loss`; 0 for all.
    """

    model: Model
    method: str
    method_config: Any
    z_loss: float = 0.0
    microbatches: int = 1
    opening: tuple[int, ...] = ()
    loss_chunk: int = 0


def shared_part(
    config: StepConfig, delta: Tree, weights: Tree, dropout: Dropout | None = None
) -> Shared:
    """Computes what all rows of a step share: the method's variables and the model's context."""
    cfg, in_context = config.method_config, None
    if dropout is not None:
        in_prompt, in_context, _ = split(dropout)
        if in_prompt.prompt is not None:
            delta = dropped(delta, cfg, in_prompt.key, in_prompt.prompt)
    variables = METHODS[config.method].variables(delta, weights, cfg, None)
    apply = functools.partial(config.model.apply, collections(weights, variables))
    opening = (np.array(config.opening, np.int32),) if config.opening else ()
    context = apply(in_context, *opening, method="prompt_context", rngs=streams(in_context))
    return variables, context


def row_states(
    model: Model, weights: Tree, shared: Shared, rows: Rows, dropout: Dropout | None = None
) -> jax.Array:
    """The head's inputs [R, M, D] at the positions `rows.index` [R, M]."""
    variables, context = shared
    in_rows = None if dropout is None else split(dropout)[-1]
    apply: Callable[..., Any] = functools.partial(
        model.apply, collections(weights, variables), rngs=streams(in_rows)
    )
    states: jax.Array = jax.vmap(lambda row: apply(context, row, in_rows, method="target_states"))(
        rows
    )
    return states


def unembed(model: Model, variables: Tree, x_RMD: jax.Array) -> jax.Array:
    """Logits [R, M, V] of the head's inputs, from Flax's collections.

    The unembedding runs once over all rows, so that its gradient is computed once.
    """
    logits: Any = model.apply(variables, x_RMD.reshape(-1, x_RMD.shape[-1]), method="unembed")
    return logits.reshape(*x_RMD.shape[:2], -1)


def row_logits(
    model: Model, weights: Tree, shared: Shared, rows: Rows, dropout: Dropout | None = None
) -> jax.Array:
    """Logits [R, M, V] at the positions `rows.index` [R, M]."""
    x_RMD = row_states(model, weights, shared, rows, dropout)
    return unembed(model, collections(weights, shared[0]), x_RMD)


def rows_loss(
    config: StepConfig,
    shared: Shared,
    weights: Tree,
    batch: TrainBatch,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, Metrics]:
    """Weighted cross-entropy of the targets, whose weights sum to 1 over the step.

    The loss is therefore a plain sum over rows: packing, padding rows, microbatches and devices do
    not change its value.
    """
    x_RMD = row_states(config.model, weights, shared, batch.rows, dropout)
    head, targets = collections(weights, shared[0]), (batch.targets, batch.loss_weights)
    loss = functools.partial(head_loss, config)
    if config.loss_chunk:
        return chunked(loss, head_weights(head), x_RMD, targets, config.loss_chunk)
    return loss(head, x_RMD, targets)


def head_loss(
    config: StepConfig, variables: Tree, x_RMD: jax.Array, targets: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Metrics]:
    """The loss and metrics of `rows_loss`, from the head's inputs.

    Args:
        config: of the step.
        variables: Flax's collections, with the head's weights at least.
        x_RMD: the head's inputs.
        targets: the targets and their weights, both [R, M].
    """
    logits_RMV, (target_RM, weight_RM) = unembed(config.model, variables, x_RMD), targets
    norm_RM = jax.nn.logsumexp(logits_RMV, axis=-1)
    right_RM = jnp.take_along_axis(logits_RMV, target_RM[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(weight_RM * (norm_RM - right_RM))
    loss = cross_entropy + config.z_loss * jnp.sum(weight_RM * norm_RM**2)
    hit_RM = right_RM >= logits_RMV.max(axis=-1)  # much faster than an argmax on a CPU
    return loss, {"loss": cross_entropy, "token_accuracy": jnp.sum(weight_RM * hit_RM)}


def loss_fn(
    delta: Tree, weights: Tree, batch: TrainBatch, dropout: Dropout | None, *, config: StepConfig
) -> tuple[jax.Array, Metrics]:
    """The loss of a step, and its metrics."""
    shared = shared_part(config, delta, weights, dropout)
    return rows_loss(config, shared, weights, batch, dropout)


def accumulated(
    delta: Tree, weights: Tree, batch: TrainBatch, dropout: Dropout | None, *, config: StepConfig
) -> tuple[tuple[jax.Array, Metrics], Tree]:
    """Value and gradient of `loss_fn`, accumulated over microbatches of rows.

    The context is computed once, outside the microbatches. Its cotangents are summed in float32 and
    pulled back once. Dropout masks depend on examples, so microbatches do not change them.
    """
    shared, pull_back = jax.vjp(lambda d: shared_part(config, d, weights, dropout), delta)
    # Row r goes to microbatch r mod n. Each then has rows of every device, and no row moves.
    parts = jax.tree.map(
        lambda x: x.reshape(-1, config.microbatches, *x.shape[1:]).swapaxes(0, 1), batch
    )
    part_loss = jax.value_and_grad(
        lambda s, part: rows_loss(config, s, weights, part, dropout), has_aux=True
    )

    def add(total: Tree, part: TrainBatch) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, part_loss(shared, part)), None

    shapes = jax.eval_shape(lambda: part_loss(shared, jax.tree.map(lambda x: x[0], parts)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, "f4")), shapes)
    (value, total), _ = jax.lax.scan(add, zeros, parts)
    cotangent = jax.tree.map(lambda leaf, s: leaf.astype(s.dtype), total, shared)
    return value, pull_back(cotangent)[0]


def gradients(
    delta: Tree, weights: Tree, batch: TrainBatch, dropout: Dropout | None, *, config: StepConfig
) -> tuple[Metrics, Tree]:
    """Metrics and the delta's gradient; both are sums over the batch's rows, like the loss."""
    arguments = delta, weights, batch, dropout
    if config.microbatches == 1:
        loss = functools.partial(loss_fn, config=config)
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(*arguments)
    else:
        (_, metrics), grads = accumulated(*arguments, config=config)
    return metrics, grads


Gradients = Callable[[Tree, Tree, TrainBatch, Dropout | None], tuple[Metrics, Tree]]


def train_step(
    delta: Tree,
    opt_state: Tree,
    weights: Tree,
    batch: TrainBatch,
    dropout: Dropout | None,
    *,
    config: StepConfig,
    tx: optax.GradientTransformation,
    per_device: Callable[[Gradients], Gradients] = lambda function: function,
) -> tuple[Tree, Tree, Metrics]:
    """One update of the delta.

    Args:
        delta: what is trained. Donated when jitted.
        opt_state: the optimizer's state, which carries the learning rate. Donated when jitted.
        weights: the frozen model.
        batch: the step's rows and their targets.
        dropout: with the step's key; None without dropout.
        config: the static configuration.
        tx: the optimizer.
        per_device: transforms `gradients`, see `softprompt.training.sharding.by_device`.

    Returns:
        The new delta and state, and scalars: loss (nats per target token), token_accuracy,
        grad_norm, update_norm, delta_norm, and row_norm_min, _mean and _max of a delta's prompts,
        after any reparametrisation (for a multitask prompt: of the prompt that its tasks share).
    """
    row_gradients = functools.partial(gradients, config=config)
    metrics, grads = per_device(row_gradients)(delta, weights, batch, dropout)
    updates, opt_state = tx.update(grads, opt_state, delta)
    delta = optax.apply_updates(delta, updates)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "delta_norm": optax.tree.norm(delta),
        **row_norms(METHODS[config.method].fold(delta, config.method_config)),
    }
    return delta, opt_state, metrics


TrainStep = Callable[[Tree, Tree, Tree, TrainBatch, Dropout | None], tuple[Tree, Tree, Metrics]]


class StepCall(NamedTuple):
    """The arguments of a training step, and `program`, which identifies its compiled program."""

    program: Any
    delta: Tree
    opt_state: Tree
    weights: Tree
    batch: TrainBatch
    dropout: Dropout | None


class StepResult(NamedTuple):
    """The outputs of a training step."""

    delta: Tree
    opt_state: Tree
    metrics: Metrics
