"""A config with all that it names: model, data, mesh, method, and what a trial starts from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt.analysis.flops import Work, train_flops, train_work
from softprompt.config import ConfigDict, members
from softprompt.config.schema import UNTRAINED
from softprompt.data.encode import Encoded, check_ranking
from softprompt.data.pipeline import TrainSource
from softprompt.data.rows import RowLayout, TrainBatch
from softprompt.errors import UserError
from softprompt.evaluation.perplexity import check_room
from softprompt.evaluation.ranking import shared_function, text_context_function
from softprompt.methods import METHODS
from softprompt.methods.initializers import embedding_rms
from softprompt.methods.multitask import MultitaskConfig
from softprompt.methods.prefix import PrefixConfig
from softprompt.methods.prompt import PromptConfig
from softprompt.methods.setup import (
    few_shot_tokens,
    keep_probabilities,
    method_config,
    wants_bos,
)
from softprompt.models import T5, Model
from softprompt.models.decoder_layers import attention_case
from softprompt.models.dropout import Dropout
from softprompt.models.kernels import Case, Kernel, choose, device_of
from softprompt.models.layers import collections
from softprompt.models.quantize import embedding
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.loading import Loaded
from softprompt.training import loop
from softprompt.training.optimizers import make_optimizer, rates, set_row_cap
from softprompt.training.sharding import path_name, put, random_key, replicated, weight_shardings
from softprompt.training.step import StepConfig
from softprompt.trials.data import TaskData, TrialData
from softprompt.trials.session import Session, optimizer_config

Tree = Any


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A trial before its first step.

    Attributes:
        config: resolved.
        session: what it shares with other trials.
        loaded: the pretrained model.
        frozen: its weights less those that are trained themselves.
        data: the config's task, or those of its mixture, encoded for the model.
        mesh: where it runs.
        step: what is static in its steps; `step.model` is the model as the method wants it.
        bos: texts begin with the tokenizer's BOS.
        layout: where the model wants an example.
        contexts: lengths of the encoder's (0 for a decoder) and the decoder's context, a BOS before
            a prompt included.
        shared: delta -> what every row of a forward pass shares (variables and context).
        prefix: solved examples that an encoder reads before each input, as those of `tasks` have
            them already; empty but for few-shot.
    """

    config: ConfigDict
    session: Session
    loaded: Loaded
    frozen: Tree
    data: TrialData
    mesh: jax.sharding.Mesh
    step: StepConfig
    bos: bool
    layout: RowLayout
    contexts: tuple[int, int]
    shared: Callable[[Tree], Any]
    prefix: np.ndarray

    @property
    def tasks(self) -> tuple[TaskData, ...]:
        """The config's task, or those of its mixture."""
        return self.data.tasks

    def of(self, task: str) -> "Prepared":
        """The same for one task of a mixture, which keeps its number."""
        return dataclasses.replace(self, data=self.data.only(task))


def prepare(config: ConfigDict, session: Session) -> Prepared:
    """Loads what a config names and sets up its method.

    Raises:
        UserError: see `load_model`, the task's source, and the method's settings.
    """
    mesh, loaded = session.mesh(config), session.model(config)
    method = config.method
    begun = method.name == "fewshot" or (method.name == "prompt" and method.bos == "before")
    bos = wants_bos(config, loaded.tokenizer) and not begun  # else it begins the context
    room = min(free_positions(one, loaded) for one in members(config))
    data = session.data(config, bos=bos)
    train = data.train
    for one in data.tasks:
        check_ranking(one.train, config.eval.score)
    cfg = method_config(config, loaded, train)
    model, layout, contexts = arrange(config, loaded, cfg)

    def row_tokens() -> int:
        return data.template(config.train.batch, layout, session.progress.say).shape.tokens

    model = with_kernel(config, model, mesh, context=contexts[1], row_tokens=row_tokens)
    name = "none" if method.name == "fewshot" else method.name
    step = StepConfig(model, name, cfg, config.train.z_loss, config.train.microbatches)
    frozen = {} if name == "full" else loaded.weights
    compiled = shared_function(step, mesh)
    shared: Callable[[Tree], Any] = lambda delta: compiled(delta, frozen)  # noqa: E731
    prefix = np.zeros(0, np.int32)
    if method.name == "fewshot":
        tokens_P = few_shot_tokens(config, loaded, train, room=room)
        if isinstance(model, T5):
            prefix = tokens_P
            data = TrialData([one.each(functools.partial(behind, prefix)) for one in data.tasks])
        else:
            context = text_context_function(model)(loaded.weights, jnp.asarray(tokens_P))
            contexts = 0, len(tokens_P)
            shared = lambda delta: ({}, context)  # noqa: E731
    if config.eval.text:  # read before anything is trained, for it may not be there
        check_room(config, session.text(config, bos=bos), loaded, context=contexts[1])
    return Prepared(
        config=config,
        session=session,
        loaded=loaded,
        frozen=frozen,
        data=data,
        mesh=mesh,
        step=step,
        bos=bos,
        layout=layout,
        contexts=contexts,
        shared=shared,
        prefix=prefix,
    )


def behind(prefix: np.ndarray, encoded: Encoded) -> Encoded:
    """The same examples, their inputs behind a prefix."""
    if not len(prefix):
        return encoded
    inputs = [np.concatenate([prefix, tokens]) for tokens in encoded.inputs]
    return dataclasses.replace(encoded, inputs=inputs)


def free_positions(config: ConfigDict, loaded: Loaded) -> int:
    """Positions that the task leaves for a context; an encoder-decoder's are relative, and endless.

    Raises:
        UserError: a prompt that takes more, or inputs that alone may.
    """
    if loaded.encoder_decoder:
        return 2**30
    method = config.method
    room = loaded.config.context_length - config.task.max_input - config.task.max_target
    if room < 0:
        raise UserError(
            f"config key 'task.max_input' is {config.task.max_input}; allowed: at most "
            f"{room + config.task.max_input} (the model's context of "
            f"{loaded.config.context_length} less task.max_target)"
        )
    most = room - (method.bos == "before")
    if method.name in ("prompt", "multitask", "prefix") and method.length > most:
        raise UserError(
            f"config key 'method.length' is {method.length}; allowed: at most {most} (the model's "
            f"context of {loaded.config.context_length} less task.max_input and task.max_target"
            f"{', and a BOS before the prompt' if most < room else ''})"
        )
    return room


def arrange(
    config: ConfigDict, loaded: Loaded, cfg: Any
) -> tuple[Model, RowLayout, tuple[int, int]]:
    """The model as the method wants it, the layout of its rows, and its contexts' lengths.

    `cfg` is the method's; a prompt and a prefix take places before a text.
    """
    length, places = 0, tuple[str, ...]()
    if isinstance(cfg, PromptConfig | PrefixConfig):
        length, places = cfg.length, cfg.places
    if isinstance(cfg, PromptConfig) and cfg.bos_before is not None:
        length += 1
    prompts = cfg.tasks if isinstance(cfg, MultitaskConfig) else 0
    model = loaded.model.clone(remat=config.mesh.remat)
    if not (isinstance(model, T5) and isinstance(loaded.config, T5Config)):
        return model, RowLayout(prompts=prompts), (0, length)
    encoder, decoder = (length if place in places else 0 for place in ("encoder", "decoder"))
    model = model.clone(prompt_to_input=config.method.prompt_to_input)
    if isinstance(cfg, PromptConfig) and config.method.prompt_to_input:
        return model, RowLayout(loaded.config.start, encoder, decoder, prompts), (0, 0)
    return model, RowLayout(loaded.config.start), (encoder, decoder)


def with_kernel(
    config: ConfigDict,
    model: Model,
    mesh: jax.sharding.Mesh,
    *,
    context: int,
    row_tokens: Callable[[], int],
) -> Model:
    """The model with the attention that its config asks for.

    Rows that a kernel cannot serve are left to the reference one by one, when they are traced: here
    their length counts only where a kernel is asked for by its name.

    Raises:
        UserError: that kernel cannot serve the rows that are trained on.
    """
    wanted = config.mesh.attention
    named = wanted not in ("auto", "reference") and config.method.name not in UNTRAINED
    if isinstance(model, T5):
        case = Case(model.dtype.name, model.config.head_size, bias=True)
    else:
        tokens = row_tokens() if named else None
        case = attention_case(model.config, model.dtype, context=context, tokens=tokens)
    name = choose(wanted, case, device_of(mesh))
    if name == "reference":
        return model
    return model.clone(attention=Kernel(name, mesh if mesh.size > 1 else None))


def train_source(prepared: Prepared) -> TrainSource:
    """The training batches of a trial, by step."""
    config, data, layout = prepared.config, prepared.data, prepared.layout
    template = data.template(config.train.batch, layout, prepared.session.progress.say)
    ids = bool(keep_probabilities(config))
    return TrainSource(data.train, template, config.seed, layout, ids=ids)


def trial_dropout(prepared: Prepared) -> Dropout | None:
    """A trial's dropout, on every device of every process; None where nothing is dropped."""
    config, mesh = prepared.config, prepared.mesh
    keep = keep_probabilities(config)
    if not keep:
        return None
    whole = replicated(mesh)
    placed = {name: put(probability, whole) for name, probability in keep.items()}
    return Dropout(random_key(config.seed, mesh), **placed)


def initial_state(prepared: Prepared) -> loop.State:
    """The delta at step 0, and the optimizer's state, on every device.

    Raises:
        UserError: the delta has a leaf that no module reads.
    """
    config, step = prepared.config, prepared.step
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    shapes = delta_shapes(prepared)
    where = delta_shardings(prepared, shapes)
    make = jax.jit(functools.partial(first_delta, step), out_shardings=where)
    delta = make(key, prepared.loaded.weights)
    check_read(step, prepared.frozen, delta, train_source(prepared)[0])
    tx = make_optimizer(optimizer_config(config))
    state_where = state_shardings(tx, shapes, where, mesh=prepared.mesh)
    opt_state = jax.jit(tx.init, out_shardings=state_where)(delta)
    if config.optimizer.max_row_norm:
        opt_state = set_row_cap(opt_state, put(row_cap(prepared), replicated(prepared.mesh)))
    return loop.State(delta, opt_state, best=jax.tree.map(lambda leaf: leaf.copy(), delta))


def delta_shardings(prepared: Prepared, delta: Tree) -> Tree:
    """How a delta (arrays or shapes) lies: whole everywhere; weights as frozen ones would."""
    mesh = prepared.mesh
    if prepared.step.method == "full":
        return weight_shardings(delta, mesh, weights=prepared.config.mesh.weights)
    return jax.tree.map(lambda _: replicated(mesh), delta)


def state_shardings(tx: Any, delta: Tree, where: Tree, *, mesh: jax.sharding.Mesh) -> Tree:
    """How an optimizer's state lies: what has a leaf's shape as the leaf does, the rest whole."""
    whole, state = replicated(mesh), jax.eval_shape(tx.init, delta)
    if all(there.is_fully_replicated for there in jax.tree.leaves(where)):
        return jax.tree.map(lambda _: whole, state)
    return optax.tree.map_params(
        tx,
        lambda leaf, like, there: there if leaf.shape == like.shape else whole,
        state,
        delta,
        where,
        transform_non_params=lambda _: whole,
    )


def first_delta(step: StepConfig, key: jax.Array, weights: Tree) -> Tree:
    """The delta that a trial starts from."""
    return METHODS[step.method].init(key, step.model, weights, step.method_config)


def delta_shapes(prepared: Prepared) -> Tree:
    """The shapes and dtypes of a trial's delta."""
    make = functools.partial(first_delta, prepared.step)
    return jax.eval_shape(make, jax.random.key(0), prepared.loaded.weights)


def check_read(step: StepConfig, weights: Tree, delta: Tree, batch: TrainBatch) -> None:
    """Checks that the model reads every variable that the delta becomes.

    Args:
        step: names the model and the method.
        weights: the frozen model.
        delta: what is trained.
        batch: any, of which a row is run.

    Raises:
        UserError: names the leaves that no module reads.
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
    names, found = _paths(variables), set().union(*map(_paths, read))
    if unread := sorted(names - found):
        raise UserError(f"no module of the model reads the delta's {', '.join(unread)}")


def _paths(tree: Tree) -> set[str]:
    """Names of a tree's leaves; what a module noted as read is a tuple there."""
    stop = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    return {path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(tree, stop)[0]}


def learning_rates(prepared: Prepared) -> np.ndarray:
    """The rate of every step, in absolute units, float32 [steps]."""
    o, peak = prepared.config.optimizer, prepared.config.optimizer.rate
    if o.rate_unit == "embedding_rms":
        peak *= seen_rms(prepared.loaded)
    return rates(o.schedule, peak=peak, warmup=o.warmup, steps=prepared.config.train.steps)


def row_cap(prepared: Prepared) -> np.ndarray:
    """The largest norm of a prompt's row, in absolute units, float32 []."""
    o, cap = prepared.config.optimizer, prepared.config.optimizer.max_row_norm
    if o.rate_unit == "embedding_rms":
        width = jax.eval_shape(embedding, prepared.loaded.weights["embed"]).shape[1]
        cap *= seen_rms(prepared.loaded) * width**0.5
    return np.asarray(cap, np.float32)


def seen_rms(loaded: Loaded) -> float:
    """The RMS of the embeddings as the layers see them: scaled, in a model that scales them."""
    rms = jax.jit(lambda embed: embedding_rms(embedding(embed)))
    return float(rms(loaded.weights["embed"])) * loaded.config.embed_scale


def step_work(prepared: Prepared) -> Work:
    """What an average step has to compute: no padding, each context once."""
    batch, layout = prepared.config.train.batch, prepared.layout
    runs = 0 if prepared.step.method == "prefix" else max(1, layout.prompts)
    return train_work(prepared.data.train, layout, prepared.contexts, batch, runs=runs)


def step_flops(prepared: Prepared) -> float:
    """Useful operations of an average step."""
    work, method = step_work(prepared), prepared.step.method
    flops = train_flops(prepared.loaded.config, work, weights=method == "full")
    return flops + (matrix_flops(delta_shapes(prepared), work) if method in MATRICES else 0.0)


MATRICES = ("lora", "adapter")  # methods whose delta every token is multiplied by


def matrix_flops(delta: Tree, work: Work) -> float:
    """What a delta of small matrices adds to a step: 6 operations a token and number.

    Its products take part in the forward pass, and in the gradients of both of their operands.
    Cross-attention's count as if they were all of the decoder's tokens.
    """
    leaves = jax.tree_util.tree_flatten_with_path(delta)[0]
    tokens = {True: work.inputs, False: work.tokens}
    return 6 * sum(leaf.size * tokens[path_name(p).startswith("encoder/")] for p, leaf in leaves)
