"""Prepares the forward pass of a config: its model and its method, for any delta."""

import dataclasses
from typing import Any, Self

import jax

from softprompt.analysis.flops import ContextLengths
from softprompt.config import ConfigDict, method_settings, task_configs
from softprompt.data.encode import Encoded
from softprompt.data.rows import RowLayout
from softprompt.errors import UserError
from softprompt.evaluation.evaluators import EvaluatorInputs
from softprompt.evaluation.ranking import shared_function
from softprompt.methods import METHODS
from softprompt.methods.base import ContextShape, Setup, wants_bos
from softprompt.methods.initializers import InitializerSettings
from softprompt.models import T5, Model
from softprompt.models.decoder_layers import attention_case
from softprompt.models.kernels import Case, Kernel, choose, device_of
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.loading import Loaded
from softprompt.training.step import Shared, StepConfig
from softprompt.trials.session import Session

Tree = Any


@dataclasses.dataclass(frozen=True)
class ForwardPass:
    """The inputs of a forward pass besides the delta, for one config.

    Attributes:
        config: resolved.
        loaded: the pretrained model.
        frozen: its frozen weights; {} if the method trains the weights.
        mesh: the devices.
        step: the static configuration; `step.model` is the model configured for the method.
        bos: texts begin with the tokenizer's BOS.
        layout: how an example is laid out in a row.
        contexts: their lengths, including a BOS before a prompt.
    """

    config: ConfigDict
    loaded: Loaded
    frozen: Tree
    mesh: jax.sharding.Mesh
    step: StepConfig
    bos: bool
    layout: RowLayout
    contexts: ContextLengths

    def shared(self, delta: Tree) -> Shared:
        """Computes what all rows of a forward pass share: the variables and the context."""
        shared: Shared = shared_function(self.step, self.mesh)(delta, self.frozen)
        return shared

    def with_opening(self, opening: tuple[int, ...]) -> Self:
        """The forward pass for texts that all begin with these tokens, which the rows leave out."""
        more = len(opening) - len(self.step.opening)
        contexts = self.contexts._replace(
            decoder=self.contexts.decoder + more, opening=len(opening)
        )
        return dataclasses.replace(
            self, step=self.step._replace(opening=opening), contexts=contexts
        )

    @property
    def evaluator_inputs(self) -> EvaluatorInputs:
        """The forward pass as the input of evaluators."""
        tokenizer = self.loaded.tokenizer
        return EvaluatorInputs(self.step.model, self.frozen, self.mesh, self.layout, tokenizer)


def prepare_forward(
    config: ConfigDict,
    session: Session,
    *,
    train: Encoded | None = None,
    initializer: InitializerSettings | None = None,
    opening: tuple[int, ...] = (),
) -> ForwardPass:
    """Loads a config's model and sets up its method.

    Args:
        config: resolved.
        session: loads the model.
        train: the training examples, for few-shot methods and for prompt initialisers.
        initializer: settings of the prompt's initialiser; None if the delta exists already.
        opening: tokens that all texts begin with, and that are left out of the rows.

    Raises:
        UserError: see `load_model`, and the method's settings.
    """
    mesh, loaded = session.mesh(config), session.model(config)
    settings = method_settings(config)
    setup = Setup(
        sizes=loaded.config,
        tasks=len(task_configs(config)),
        seed=config.seed,
        room=min(free_positions(one, loaded) for one in task_configs(config)),
        initializer_settings=initializer,
        loaded=loaded,
        train=train,
    )
    cfg = METHODS[settings.name].resolve(settings, setup)
    model, layout, contexts = configure_model(config, loaded, cfg)
    model = with_kernel(config, model, mesh, context=contexts.decoder + len(opening))
    return ForwardPass(
        config=config,
        loaded=loaded,
        frozen={} if settings.trains_weights else loaded.weights,
        mesh=mesh,
        step=StepConfig(model, settings.name, cfg, config.train.z_loss, config.train.microbatches),
        bos=text_bos(config, loaded),
        layout=layout,
        contexts=contexts,
    ).with_opening(opening)


def text_bos(config: ConfigDict, loaded: Loaded) -> bool:
    """Whether texts begin with BOS.

    It is False if BOS comes before the method's context or is not used.
    """
    settings = method_settings(config)
    return wants_bos(settings.bos, loaded.tokenizer) and not settings.begins_with_bos


def free_positions(config: ConfigDict, loaded: Loaded) -> int:
    """Positions that the task's texts leave for a context; unlimited for an encoder-decoder.

    Raises:
        UserError: the task's texts alone may exceed the model's context length.
    """
    if loaded.encoder_decoder:
        return 2**30
    room = loaded.config.context_length - config.task.max_input - config.task.max_target
    if room < 0:
        raise UserError(
            f"config key 'task.max_input' is {config.task.max_input}; allowed: at most "
            f"{room + config.task.max_input} (the model's context of "
            f"{loaded.config.context_length} less task.max_target)"
        )
    return room


def configure_model(
    config: ConfigDict, loaded: Loaded, cfg: Any
) -> tuple[Model, RowLayout, ContextLengths]:
    """The model configured for the method, the layout of its rows, and its contexts.

    `cfg` is the static configuration of the method.
    """
    method, settings = METHODS[config.method.name], method_settings(config)
    context = method.context(cfg) if settings.is_context else ContextShape()
    length, stacks, prompts = context.length, context.stacks, context.prompts
    model, runs = loaded.model.clone(remat=config.compute.remat), 0
    if settings.is_prompt:
        runs = max(1, prompts)
    if not (isinstance(model, T5) and isinstance(loaded.config, T5Config)):
        return model, RowLayout(prompts=prompts), ContextLengths(0, length, runs)
    encoder, decoder = (length if stack in stacks else 0 for stack in ("encoder", "decoder"))
    model = model.clone(prompt_to_input=config.method.prompt_to_input)
    if settings.is_prompt and config.method.prompt_to_input:
        layout = RowLayout(loaded.config.start, encoder, decoder, prompts)
        return model, layout, ContextLengths(runs=runs)
    return model, RowLayout(loaded.config.start), ContextLengths(encoder, decoder, runs)


def with_kernel(
    config: ConfigDict,
    model: Model,
    mesh: jax.sharding.Mesh,
    *,
    context: int,
    tokens: int | None = None,
) -> Model:
    """The model with the attention kernel of `compute.attention`.

    Row shapes that the kernel does not support use the reference attention when they are traced.

    Args:
        config: has `compute.attention`.
        model: with the reference attention.
        mesh: the devices.
        context: tokens before a row.
        tokens: length of rows that the kernel must support; None if it need not.

    Raises:
        UserError: the kernel does not support such rows.
    """
    if isinstance(model, T5):
        case = Case(model.dtype.name, model.config.head_size, bias=True)
    else:
        case = attention_case(model.config, model.dtype, context=context, tokens=tokens)
    name = choose(config.compute.attention, case, device_of(mesh))
    if name == "reference":
        return model
    return model.clone(attention=Kernel(name, mesh if mesh.size > 1 else None))
