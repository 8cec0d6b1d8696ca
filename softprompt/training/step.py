"""The training step: a pure function of (delta, opt_state, weights, batch, key).

Gradients are taken with respect to the first argument only; frozen is a fact of the signature. The
last is a random key, or where something is dropped a `Draw`, which has the shares too: data.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from softprompt.methods import METHODS
from softprompt.methods.prompt import dropped
from softprompt.models import Model
from softprompt.models.dropout import STREAM, Shares
from softprompt.models.layers import collections
from softprompt.training.optimizers import row_norms

Tree = Any
Shared = tuple[Tree, Any]  # the method's variables, and the model's context
Batch = Mapping[str, jax.Array]
Metrics = dict[str, jax.Array]


class StepConfig(NamedTuple):
    """What is static in a training step besides shapes and the optimizer.

    Trials that agree in all of these, and in what is dropped, if not in how much, share one
    compiled program: `Draw` has their rates.

    Attributes:
        model: a decoder or an encoder-decoder, without its weights.
        method: name of the method that reads and writes the delta.
        method_config: the static half of the method's configuration.
        z_loss: weight of the squared log-normaliser. Source: arXiv 2204.02311, section 5.
        microbatches: in how many parts, one after another, a step's rows are run.
    """

    model: Model
    method: str
    method_config: Any
    z_loss: float = 0.0
    microbatches: int = 1


class Draw(NamedTuple):
    """The key of a step that drops something, and how much it keeps."""

    key: jax.Array
    kept: Shares


Key = jax.Array | Draw


def folded(key: Key, step: int) -> Key:
    """A step's key, of a trial's."""
    if isinstance(key, Draw):
        return key._replace(key=jax.random.fold_in(key.key, step))
    return jax.random.fold_in(key, step)


class Keys(NamedTuple):
    """A step's dropout: random keys of a prompt, the context and what follows it; what is kept."""

    prompt: jax.Array
    context: jax.Array
    rows: jax.Array
    kept: Shares


def dropout_keys(key: Key) -> Keys | None:
    """The keys of a step; None where nothing is dropped."""
    if not isinstance(key, Draw):
        return None
    prompt, context, rows = jax.random.split(key.key, 3)
    return Keys(prompt, context, rows, key.kept)


def shared_part(config: StepConfig, delta: Tree, weights: Tree, keys: Keys | None = None) -> Shared:
    """What all rows of a step have in common: the method's variables, and the model's context.

    Without keys nothing is dropped.
    """
    cfg, rngs, kept = config.method_config, None, None
    if keys is not None:
        rngs, kept = {STREAM: keys.context}, keys.kept
        if kept.prompt is not None:
            delta = dropped(delta, cfg, keys.prompt, kept.prompt)
    variables = METHODS[config.method].variables(delta, weights, cfg, None)
    model = collections(weights, variables, kept)
    return variables, config.model.apply(model, method="prompt_context", rngs=rngs)


def row_logits(
    model: Model, weights: Tree, shared: Shared, batch: Batch, keys: Keys | None = None
) -> jax.Array:
    """Logits [R, M, V] at the positions `index_RM` of every row; without keys none is dropped."""
    variables, context = shared
    rngs, kept = (None, None) if keys is None else ({STREAM: keys.rows}, keys.kept)
    apply: Callable[..., Any] = functools.partial(
        model.apply, collections(weights, variables, kept), rngs=rngs
    )
    x_RMD = jax.vmap(lambda row: apply(context, row, method="target_states"))(row_inputs(batch))
    # The head is no row's affair: its matrix, if it is trained, gets one gradient.
    logits = apply(x_RMD.reshape(-1, x_RMD.shape[-1]), method="unembed")
    return logits.reshape(*x_RMD.shape[:2], -1)


def row_inputs(batch: Batch) -> Batch:
    """What the model is told of the rows, by the names it has for ONE: "tokens_T" for tokens_RT."""
    return {f"{name[:-2]}{name[-1]}": array for name, array in batch.items() if name not in _BESIDE}


_BESIDE = ("target_RM", "weight_RM", "pair_head_RC", "pair_token_RC")


def rows_loss(
    config: StepConfig,
    shared: Shared,
    weights: Tree,
    batch: Batch,
    keys: Keys | None = None,
) -> tuple[jax.Array, Metrics]:
    """Cross-entropy of the targets, weighted by `weight_RM`, which sums to 1 over the whole step.

    The weights make the loss a plain sum over rows: neither packing, nor padding rows, nor
    microbatches, nor devices change what it means.
    """
    logits_RMV = row_logits(config.model, weights, shared, batch, keys)
    norm_RM = jax.nn.logsumexp(logits_RMV, axis=-1)
    target_RM, weight_RM = batch["target_RM"], batch["weight_RM"]
    right_RM = jnp.take_along_axis(logits_RMV, target_RM[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(weight_RM * (norm_RM - right_RM))
    loss = cross_entropy + config.z_loss * jnp.sum(weight_RM * norm_RM**2)
    hit_RM = right_RM >= logits_RMV.max(axis=-1)  # an argmax takes a CPU far longer
    return loss, {"loss": cross_entropy, "token_accuracy": jnp.sum(weight_RM * hit_RM)}


def loss_fn(
    delta: Tree, weights: Tree, batch: Batch, key: Key, *, config: StepConfig
) -> tuple[jax.Array, Metrics]:
    """Loss of a step and its metrics."""
    keys = dropout_keys(key)
    return rows_loss(config, shared_part(config, delta, weights, keys), weights, batch, keys)


def accumulated(
    delta: Tree, weights: Tree, batch: Batch, key: Key, *, config: StepConfig
) -> tuple[tuple[jax.Array, Metrics], Tree]:
    """Value and gradient of `loss_fn`, a microbatch of rows at a time.

    The context is computed once, outside the microbatches; its cotangents are summed, in float32,
    and pulled back once. Dropout goes by examples, so that a part drops what the whole would.
    """
    keys = dropout_keys(key)
    shared, pull_back = jax.vjp(lambda d: shared_part(config, d, weights, keys), delta)
    # Row r goes to part r mod n: a part has rows of every device, which keep them where they are.
    parts = {
        k: v.reshape(-1, config.microbatches, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()
    }
    part_loss = jax.value_and_grad(
        lambda s, part: rows_loss(config, s, weights, part, keys), has_aux=True
    )

    def add(total: Tree, part: Batch) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, part_loss(shared, part)), None

    shapes = jax.eval_shape(lambda: part_loss(shared, {k: v[0] for k, v in parts.items()}))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, "f4")), shapes)
    (value, total), _ = jax.lax.scan(add, zeros, parts)
    cotangent = jax.tree.map(lambda leaf, s: leaf.astype(s.dtype), total, shared)
    return value, pull_back(cotangent)[0]


def gradients(
    delta: Tree, weights: Tree, batch: Batch, key: Key, *, config: StepConfig
) -> tuple[Metrics, Tree]:
    """Metrics of the batch's rows and the delta's gradient: sums over rows, as the loss is."""
    if config.microbatches == 1:
        loss = functools.partial(loss_fn, config=config)
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(delta, weights, batch, key)
    else:
        (_, metrics), grads = accumulated(delta, weights, batch, key, config=config)
    return metrics, grads


Gradients = Callable[[Tree, Tree, Batch, Key], tuple[Metrics, Tree]]


def train_step(
    delta: Tree,
    opt_state: Tree,
    weights: Tree,
    batch: Batch,
    key: Key,
    *,
    config: StepConfig,
    tx: optax.GradientTransformation,
    spread: Callable[[Gradients], Gradients] = lambda function: function,
) -> tuple[Tree, Tree, Metrics]:
    """One update of the delta.

    Args:
        delta: what is trained. Donated when jitted.
        opt_state: the optimizer's state, which carries the learning rate. Donated when jitted.
        weights: the frozen model.
        batch: see `softprompt.data.pipeline`.
        key: folded from the trial's seed and the step; a `Draw` where something is dropped.
        config: what is static.
        tx: the optimizer.
        spread: how `gradients` goes over devices, see `softprompt.training.sharding.by_device`.

    Returns:
        The new delta and state, and scalars: loss (nats a target token), token_accuracy, grad_norm,
        update_norm, delta_norm, and row_norm_min, _mean and _max of a delta's prompts, after what
        reparametrises them (of a multitask: the prompt that its tasks share).
    """
    of_rows = functools.partial(gradients, config=config)
    metrics, grads = spread(of_rows)(delta, weights, batch, key)
    updates, opt_state = tx.update(grads, opt_state, delta)
    delta = optax.apply_updates(delta, updates)
    metrics |= {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "delta_norm": optax.tree.norm(delta),
        **row_norms(METHODS[config.method].fold(delta, config.method_config)),
    }
    return delta, opt_state, metrics


TrainStep = Callable[[Tree, Tree, Tree, Batch, Key], tuple[Tree, Tree, Metrics]]


class StepCall(NamedTuple):
    """A training step to take: the arguments of `TrainStep`, and what names its program."""

    program: Any
    delta: Tree
    opt_state: Tree
    weights: Tree
    batch: Batch
    key: Key


class StepResult(NamedTuple):
    """What a training step returns."""

    delta: Tree
    opt_state: Tree
    metrics: Metrics
