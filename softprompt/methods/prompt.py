"""Prompt tuning: P trained vectors before the text; the model is frozen.

The delta is "prompt" [P, D]; an encoder-decoder has one under "encoder", "decoder" or both. With a
`reparam`, the delta also has "net", the networks that compute the prompt during training.

Source: Lester et al. 2021 (arXiv 2104.08691), section 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.methods import reparametrize
from softprompt.methods.base import (
    ContextShape,
    Setup,
    TrainedContextSettings,
    bos_setting,
    wants_bos,
)
from softprompt.methods.initializers import Initializer
from softprompt.models import Model
from softprompt.models.dropout import Probability, masked
from softprompt.models.quantize import embedding
from softprompt.settings import setting


@dataclasses.dataclass(frozen=True)
class Settings(TrainedContextSettings):
    """Trained vectors before the text."""

    name = "prompt"
    is_prompt = True
    drops = "prompt"

    bos: str = bos_setting("after", "before", "none")
    reparam: str = setting(
        "none",
        "a network that computes the prompt during training: none, residual (one network), "
        "residual_rows (one for each vector) or mlp (P-tuning)",
        choices=("none", "residual", "residual_rows", "mlp"),
    )
    bottleneck: int = setting(64, "width of reparam's hidden layers", low=1, needs=("reparam",))
    dropout: float = setting(
        0.0,
        "dropout rate of the prompt's entries, with one mask a step; 0 is off",
        low=0,
        high=0.999999,
    )

    @property
    def begins_with_bos(self) -> bool:
        """Whether BOS comes before the prompt."""
        return self.bos == "before"


PEFT = {"peft_type": "PROMPT_TUNING"}


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The static configuration.

    Attributes:
        length: P. 0 is the base model.
        bos_before: id of a BOS token at position 0, before the prompt; None if BOS, where the
            tokenizer has one, begins the text, after the prompt (the default, as in PEFT).
        initializer: of the prompt. Only `init` uses it, so that trials which differ in nothing else
            share a compiled step.
        embed_scale: the model's. A prompt enters after the scaling of embeddings, so the initial
            prompt, and BOS before it, are scaled embeddings.
        stacks: the stacks of an encoder-decoder, "encoder", "decoder" or both, that each have their
            own prompt; () for a decoder.
        reparam: none, residual, residual_rows or mlp (see `reparametrize`).
        bottleneck: of the reparametrisation's networks.
    """

    length: int
    bos_before: int | None = None
    initializer: Initializer | None = dataclasses.field(default=None, compare=False)
    embed_scale: float = 1.0
    stacks: tuple[str, ...] = ()
    reparam: str = "none"
    bottleneck: int = 0


def resolve(settings: Settings, setup: Setup) -> PromptConfig:
    """The static configuration for a trial.

    Raises:
        UserError: the model has no room for the prompt, or lacks the stack; the tokenizer lacks
            BOS; see `Setup.initializer`.
    """
    settings.check_room(setup)
    tokenizer = setup.loaded.tokenizer if setup.loaded else None
    before = settings.begins_with_bos and tokenizer and wants_bos(settings.bos, tokenizer)
    return PromptConfig(
        settings.length,
        tokenizer.bos_id if tokenizer and before else None,
        setup.initializer(settings.place),
        setup.sizes.embed_scale,
        settings.stacks(setup),
        settings.reparam,
        settings.bottleneck,
    )


def context(cfg: PromptConfig) -> ContextShape:
    """The shape of the prompt's context."""
    return ContextShape(cfg.length + (cfg.bos_before is not None), cfg.stacks)


def init(key: jax.Array, model: Model, weights: Any, cfg: PromptConfig) -> dict[str, Any]:
    """Returns {"prompt": [P, D]} for each stack, float32 (float64 for float64 weights).

    D is the width of the embeddings. With a `reparam` there is also "net".
    """
    if not cfg.stacks:
        return _initial(key, weights, cfg)
    keys = [key if n == 0 else jax.random.fold_in(key, n) for n in range(len(cfg.stacks))]
    return {stack: _initial(k, weights, cfg) for stack, k in zip(cfg.stacks, keys, strict=True)}


def _initial(key: jax.Array, weights: Any, cfg: PromptConfig) -> dict[str, Any]:
    embedding_VD = _scaled(embedding(weights["embed"]), cfg)
    dtype = jnp.promote_types(embedding_VD.dtype, jnp.float32)
    if cfg.length == 0:
        return {"prompt": jnp.zeros((0, embedding_VD.shape[1]), dtype)}
    assert cfg.initializer is not None, "a prompt of positive length needs an initializer"
    prompt_PD = cfg.initializer(key, embedding_VD, cfg.length).astype(dtype)
    if cfg.reparam == "none":
        return {"prompt": prompt_PD}
    key = jax.random.fold_in(key, 7)  # independent of the initialiser's draws
    net = reparametrize.init(key, prompt_PD, kind=cfg.reparam, bottleneck=cfg.bottleneck)
    return {"prompt": prompt_PD, "net": net}


def variables(
    delta: dict[str, Any], weights: Any, cfg: PromptConfig, task_ids: jax.Array | None
) -> dict[str, Any]:
    """The prompt, with the embedding of BOS before it if `bos_before` is set."""
    delta = fold(delta, cfg)
    if cfg.bos_before is None:
        return delta
    bos_D = _scaled(embedding(weights["embed"])[cfg.bos_before], cfg)
    prompt_PD = delta["prompt"]
    return {"prompt": jnp.concatenate([bos_D[None].astype(prompt_PD.dtype), prompt_PD])}


def dropped(
    delta: dict[str, Any], cfg: PromptConfig, key: jax.Array, keep: Probability
) -> dict[str, Any]:
    """The folded delta with dropped entries; the others are scaled to keep the mean.

    All rows see the same prompt, so a step has one mask. A BOS before the prompt is not dropped.
    """

    def drop(prompt_PD: jax.Array, key: jax.Array) -> jax.Array:
        return masked(jax.random.bernoulli(key, keep, prompt_PD.shape), prompt_PD, keep)

    leaves, tree = jax.tree.flatten(fold(delta, cfg))
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, map(drop, leaves, keys))


def _scaled(x: jax.Array, cfg: PromptConfig) -> jax.Array:
    return x if cfg.embed_scale == 1.0 else x * jnp.asarray(cfg.embed_scale, x.dtype)


def fold(delta: dict[str, Any], cfg: PromptConfig) -> dict[str, Any]:
    """Returns the prompts that the networks compute; the delta unchanged if there are none."""
    if cfg.stacks:
        return {stack: _folded(part) for stack, part in delta.items()}
    return _folded(delta)


def _folded(part: dict[str, Any]) -> dict[str, Any]:
    if "net" not in part:
        return part
    return {"prompt": reparametrize.apply(part["prompt"], part["net"])}
