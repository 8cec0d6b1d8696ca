"""Multitask prompt tuning: one prompt for all tasks, times a factor of low rank for each.

The prompt of task n is prompt * (task_cols[n] @ task_rows[n]), element by element. The delta:
"prompt" [P, D], "task_cols" [N, P, Z] and "task_rows" [N, Z, D]; an encoder-decoder has them under
"encoder".

Source: Wang et al. 2023 (arXiv 2303.02861), section 3.1, where Z is 1 and there is a teacher for
each task; here, as in PEFT, Z is free and the tasks are trained on directly.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.methods import prompt
from softprompt.methods.prompt import PromptConfig
from softprompt.models import Model

PEFT = {"peft_type": "MULTITASK_PROMPT_TUNING"}


@dataclasses.dataclass(frozen=True)
class MultitaskConfig(PromptConfig):
    """What the method needs to know besides what a prompt does.

    Attributes:
        tasks: N.
        rank: Z.
    """

    tasks: int = 1
    rank: int = 1


def init(key: jax.Array, model: Model, weights: Any, cfg: MultitaskConfig) -> dict[str, Any]:
    """Returns the prompt of `prompt.init`, and factors that are one everywhere.

    So every task begins where the shared prompt does, and no product begins near zero, as PEFT's
    do (both of its factors are drawn with a deviation of 0.02). Of a rank above one the further
    columns are noise and the further rows zero, so that they grow apart.
    """
    first = prompt.init(key, model, weights, cfg)
    key = jax.random.fold_in(key, 8)  # apart from what the initialiser drew
    if cfg.places:
        return {place: part | _factors(key, part["prompt"], cfg) for place, part in first.items()}
    return first | _factors(key, first["prompt"], cfg)


def _factors(key: jax.Array, prompt_PD: jax.Array, cfg: MultitaskConfig) -> dict[str, jax.Array]:
    length, width = prompt_PD.shape
    cols_NPZ = jax.random.normal(key, (cfg.tasks, length, cfg.rank), prompt_PD.dtype)
    rows_NZD = jnp.zeros((cfg.tasks, cfg.rank, width), prompt_PD.dtype)
    return {
        "task_cols": (cols_NPZ * cfg.rank**-0.5).at[:, :, 0].set(1.0),
        "task_rows": rows_NZD.at[:, 0].set(1.0),
    }


def variables(
    delta: dict[str, Any], weights: Any, cfg: MultitaskConfig, task_ids: jax.Array | None
) -> dict[str, Any]:
    """The prompts [N, P, D] of these tasks, None for all of them."""
    if cfg.places:
        return {place: _prompts(part, task_ids) for place, part in delta.items()}
    return _prompts(delta, task_ids)


def _prompts(part: dict[str, jax.Array], task_ids: jax.Array | None) -> dict[str, jax.Array]:
    cols_NPZ, rows_NZD = part["task_cols"], part["task_rows"]
    if task_ids is not None:
        cols_NPZ, rows_NZD = cols_NPZ[task_ids], rows_NZD[task_ids]
    return {"prompt": part["prompt"] * jnp.einsum("npz,nzd->npd", cols_NPZ, rows_NZD)}


def fold(delta: dict[str, Any], cfg: MultitaskConfig) -> dict[str, Any]:
    """Returns the delta as it is: the factors are what is stored."""
    return delta
