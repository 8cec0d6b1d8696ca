"""Prepares a trial from its config: forward pass, examples, initial state and learning rates."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import optax
from etils import epath

from softprompt.analysis.flops import Work, train_flops, train_work
from softprompt.config import ConfigDict, method_settings, transfers
from softprompt.data.encode import check_ranking
from softprompt.data.pipeline import TrainSource
from softprompt.data.rows import TrainBatch
from softprompt.data.splits import split_rule
from softprompt.errors import UserError
from softprompt.evaluation.perplexity import check_room
from softprompt.methods import METHODS
from softprompt.methods.initializers import InitializerSettings, embedding_rms
from softprompt.models.dropout import Dropout
from softprompt.models.layers import collections
from softprompt.models.quantize import embedding
from softprompt.pretrained.loading import Loaded
from softprompt.training import loop
from softprompt.training.optimizers import make_optimizer, rates, set_row_cap
from softprompt.training.sharding import path_name, put, random_key, replicated, weight_shardings
from softprompt.training.step import StepConfig
from softprompt.trials.data import TaskData, TrialData, evaluators_of
from softprompt.trials.forward import ForwardPass, prepare_forward, text_bos, with_kernel
from softprompt.trials.session import Session, optimizer_config
from softprompt.trials.starts import located

Tree = Any


@dataclasses.dataclass(frozen=True)
class Prepared(ForwardPass):
    """A prepared trial: a forward pass, its examples, and the session.

    Attributes:
        session: the process's.
        data: the config's task, or those of its mixture, encoded for the model, without the
            opening `step.opening` of all inputs.
    """

    session: Session
    data: TrialData

    @property
    def tasks(self) -> tuple[TaskData, ...]:
        """The config's task, or those of its mixture."""
        return self.data.tasks

    def for_task(self, task: str) -> "Prepared":
        """The same trial with one task of its mixture; the task keeps its index."""
        return dataclasses.replace(self, data=self.data.only(task))


def prepare(config: ConfigDict, session: Session, workdir: epath.Path | None = None) -> Prepared:
    """Loads the model and data of a config, for training and testing.

    Args:
        config: resolved.
        session: loads them.
        workdir: has the trial that this one starts from; see `starts.located`.

    Raises:
        UserError: see `load_model`, the task's source, and the method's settings; or a task has no
            train split.
    """
    data = session.data(config, bos=text_bos(config, session.model(config)))
    for one in data.tasks:
        split_rule(one.task, "train")
        if "ranking" in evaluators_of(one.task, config):
            check_ranking(one.train, config.eval.score)
    made = prepare_scoring(config, session, initializer=located(config, workdir))
    if config.compute.attention not in ("auto", "reference") and method_settings(config).trains:
        tokens = train_source(made).template.shape.tokens  # which the named kernel must support
        context = made.contexts.decoder
        with_kernel(config, made.step.model, made.mesh, context=context, tokens=tokens)
    for other in transfers(config):
        session.data(other, bos=made.bos)
    if config.eval.text:  # read before training, since it may not exist
        text = session.text(config, bos=made.bos)
        context = made.with_opening(()).contexts.decoder
        check_room(text, made.loaded, name=config.eval.text, context=context)
    return made


def prepare_scoring(
    config: ConfigDict, session: Session, *, initializer: InitializerSettings | None = None
) -> Prepared:
    """Loads the model and data of a config, for scoring a trained delta.

    `initializer` has the settings of the prompt's initialiser; None if the delta exists already.
    """
    data = session.data(config, bos=text_bos(config, session.model(config)))
    opening = opening_of(config, session, data)
    made = prepare_forward(
        config, session, train=data.train, initializer=initializer, opening=opening
    )
    rest = data.without_opening(len(opening), session.progress.say)
    return Prepared(**vars(made), session=session, data=rest)


def opening_of(config: ConfigDict, session: Session, data: TrialData) -> tuple[int, ...]:
    """The tokens that all inputs of a trial begin with and that its contexts therefore hold.

    An encoder-decoder has none: its encoder reads an input's first tokens with the others. A trial
    with dropout in the model has none either, since each example has its own mask.
    """
    drops = keep_probabilities(config).keys() - {"prompt"}
    return () if session.model(config).encoder_decoder or drops else data.opening


def train_source(prepared: Prepared) -> TrainSource:
    """The training batches of a trial, by step."""
    config, data, layout = prepared.config, prepared.data, prepared.layout
    template = data.template(config.train.batch, layout, prepared.session.progress.say)
    ids = bool(keep_probabilities(config))
    return TrainSource(data.train, template, config.seed, layout, ids=ids)


def keep_probabilities(config: ConfigDict) -> dict[str, np.ndarray]:
    """The keep probabilities of a trial's `Dropout`, float32 []; a rate of 0 has no field."""
    drop_rates, drops = {"model": config.train.dropout}, method_settings(config).drops
    if drops:
        drop_rates[drops] = config.method.dropout
    return {name: np.asarray(1 - rate, np.float32) for name, rate in drop_rates.items() if rate}


def trial_dropout(prepared: Prepared) -> Dropout | None:
    """A trial's dropout, replicated on all devices; None without dropout."""
    config, mesh = prepared.config, prepared.mesh
    keep = keep_probabilities(config)
    if not keep:
        return None
    fields = {name: put(probability, replicated(mesh)) for name, probability in keep.items()}
    return Dropout(random_key(config.seed, mesh), **fields)


def initial_state(prepared: Prepared) -> loop.State:
    """The delta and the optimizer's state at step 0, on the devices.

    Raises:
        UserError: the model does not use a leaf of the delta.
    """
    config, step = prepared.config, prepared.step
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    shapes = delta_shapes(prepared)
    shardings = delta_shardings(prepared, shapes)
    make = jax.jit(functools.partial(first_delta, step), out_shardings=shardings)
    delta = make(key, prepared.loaded.weights)
    check_read(step, prepared.frozen, delta, train_source(prepared)[0])
    tx = make_optimizer(optimizer_config(config))
    state_sharding = state_shardings(tx, shapes, shardings, mesh=prepared.mesh)
    opt_state = jax.jit(tx.init, out_shardings=state_sharding)(delta)
    if config.optimizer.max_row_norm:
        opt_state = set_row_cap(opt_state, put(row_cap(prepared), replicated(prepared.mesh)))
    return loop.State(delta, opt_state, best=jax.tree.map(lambda leaf: leaf.copy(), delta))


def delta_shardings(prepared: ForwardPass, delta: Tree) -> Tree:
    """The shardings of a delta (arrays or shapes).

    They are those of the weights if the method trains them, else replicated.
    """
    mesh = prepared.mesh
    if METHODS[prepared.step.method].Settings.trains_weights:
        return weight_shardings(delta, mesh, weights=prepared.config.mesh.weights)
    return jax.tree.map(lambda _: replicated(mesh), delta)


def state_shardings(tx: Any, delta: Tree, shardings: Tree, *, mesh: jax.sharding.Mesh) -> Tree:
    """The shardings of an optimizer's state: like the delta if shapes agree, else replicated."""
    everywhere, state = replicated(mesh), jax.eval_shape(tx.init, delta)
    if all(one.is_fully_replicated for one in jax.tree.leaves(shardings)):
        return jax.tree.map(lambda _: everywhere, state)
    return optax.tree.map_params(
        tx,
        lambda leaf, like, sharding: sharding if leaf.shape == like.shape else everywhere,
        state,
        delta,
        shardings,
        transform_non_params=lambda _: everywhere,
    )


def first_delta(step: StepConfig, key: jax.Array, weights: Tree) -> Tree:
    """The initial delta of a trial."""
    return METHODS[step.method].init(key, step.model, weights, step.method_config)


def delta_shapes(prepared: Prepared) -> Tree:
    """The shapes and dtypes of a trial's delta."""
    make = functools.partial(first_delta, prepared.step)
    return jax.eval_shape(make, jax.random.key(0), prepared.loaded.weights)


def check_read(step: StepConfig, weights: Tree, delta: Tree, batch: TrainBatch) -> None:
    """Checks that the model uses every variable that the method makes from the delta.

    Args:
        step: has the model and the method.
        weights: the frozen model.
        delta: what is trained.
        batch: any batch; its first row is traced.

    Raises:
        UserError: names the leaves that no module uses.
    """
    row = jax.tree.map(lambda array: array[0], batch.rows)

    def run() -> Any:
        variables = METHODS[step.method].variables(delta, weights, step.method_config, None)
        apply = functools.partial(
            step.model.apply, collections(weights, variables), mutable=["read"]
        )
        context, first = apply(method="prompt_context")
        x_MD, second = apply(context, row, method="target_states")
        third = apply(x_MD, method="unembed")[1]
        variables = {name: tree for name, tree in variables.items() if name != "params"}
        return variables, [made.get("read", {}) for made in (first, second, third)]

    variables, read = jax.eval_shape(run)
    names, used = _paths(variables), set().union(*map(_paths, read))
    if unread := sorted(names - used):
        raise UserError(f"no module of the model reads the delta's {', '.join(unread)}")


def _paths(tree: Tree) -> set[str]:
    """Names of a tree's leaves; a tuple is a leaf (Flax's `sow` in the collection "read")."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, tuple))
    return {path_name(path) for path, _ in leaves}


def learning_rates(prepared: Prepared) -> np.ndarray:
    """The absolute learning rate of every step, float32 [steps]."""
    o, peak = prepared.config.optimizer, prepared.config.optimizer.rate
    if o.rate_unit == "embedding_rms":
        peak *= scaled_embedding_rms(prepared.loaded)
    return rates(o.schedule, peak=peak, warmup=o.warmup, steps=prepared.config.train.steps)


def row_cap(prepared: Prepared) -> np.ndarray:
    """The largest absolute norm of a prompt's row, float32 []."""
    o, cap = prepared.config.optimizer, prepared.config.optimizer.max_row_norm
    if o.rate_unit == "embedding_rms":
        width = jax.eval_shape(embedding, prepared.loaded.weights["embed"]).shape[1]
        cap *= scaled_embedding_rms(prepared.loaded) * width**0.5
    return np.asarray(cap, np.float32)


def scaled_embedding_rms(loaded: Loaded) -> float:
    """The RMS of the embeddings after the model's scaling, if it has one."""
    rms = jax.jit(lambda embed: embedding_rms(embedding(embed)))
    return float(rms(loaded.weights["embed"])) * loaded.config.embed_scale


def step_work(prepared: Prepared) -> Work:
    """The work of an average step, without padding, counting each context once."""
    batch = prepared.config.train.batch
    return train_work(prepared.data.train, prepared.layout, prepared.contexts, batch)


def step_flops(prepared: Prepared) -> float:
    """Useful FLOPs of an average step."""
    work, method = step_work(prepared), METHODS[prepared.step.method].Settings
    flops = train_flops(prepared.loaded.config, work, weights=method.trains_weights)
    extra = matrix_flops(delta_shapes(prepared), work) if method.multiplies_tokens else 0.0
    return flops + extra


def matrix_flops(delta: Tree, work: Work) -> float:
    """FLOPs that a delta of small matrices adds to a step: 6 per token and parameter.

    They are 2 in the forward pass, and 2 for the gradient of each operand. Cross-attention counts
    as if it read only tokens of the decoder.
    """
    leaves = jax.tree_util.tree_flatten_with_path(delta)[0]
    tokens = {True: work.inputs, False: work.tokens}
    return 6 * sum(leaf.size * tokens[path_name(p).startswith("encoder/")] for p, leaf in leaves)
