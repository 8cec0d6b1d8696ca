"""Prompt tuning: P trained vectors before the text, everything else frozen.

Source: Lester et al. 2021 (arXiv 2104.08691), section 2.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.methods.initializers import Initializer
from softprompt.models.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """What the method needs to know.

    Attributes:
        length: P. 0 is the plain base model.
        bos_before: id of a BOS token that stands at position 0, before the prompt; None where BOS,
            if the tokenizer has one, belongs to the text, after the prompt (the default, and how
            PEFT reads a prompt).
        initializer: where the first prompt comes from. It only matters to `init`, so that trials
            which differ in nothing else share a compiled step.
        embed_scale: the model's. A prompt enters after the embeddings' scaling, so what it starts
            from, and BOS before it, are scaled embeddings.
    """

    length: int
    bos_before: int | None = None
    initializer: Initializer | None = dataclasses.field(default=None, compare=False)
    embed_scale: float = 1.0


def init(key: jax.Array, model: Decoder, weights: Any, cfg: PromptConfig) -> dict[str, jax.Array]:
    """Returns {"prompt": [P, D]} in float32 (float64 where the weights are).

    D is the width of the embeddings.
    """
    embedding_VD = _scaled(weights["embed"]["embedding"], cfg)
    dtype = jnp.promote_types(embedding_VD.dtype, jnp.float32)
    if cfg.length == 0:
        return {"prompt": jnp.zeros((0, embedding_VD.shape[1]), dtype)}
    assert cfg.initializer is not None, "a prompt of positive length needs an initializer"
    return {"prompt": cfg.initializer(key, embedding_VD, cfg.length).astype(dtype)}


def variables(
    delta: dict[str, jax.Array], weights: Any, cfg: PromptConfig, task_ids: jax.Array | None
) -> dict[str, jax.Array]:
    """What the context is computed from: the prompt, behind BOS where that comes first."""
    if cfg.bos_before is None:
        return delta
    bos_D = _scaled(weights["embed"]["embedding"][cfg.bos_before], cfg)
    prompt_PD = delta["prompt"]
    return {"prompt": jnp.concatenate([bos_D[None].astype(prompt_PD.dtype), prompt_PD])}


def _scaled(x: jax.Array, cfg: PromptConfig) -> jax.Array:
    return x if cfg.embed_scale == 1.0 else x * jnp.asarray(cfg.embed_scale, x.dtype)


def fold(delta: dict[str, jax.Array], cfg: PromptConfig) -> dict[str, jax.Array]:
    """Returns the delta as it is: a prompt has nothing that only training needs."""
    return delta
