"""Multitask prompt tuning: a prompt for all tasks, times a low-rank factor for each task.

The prompt of task n is prompt * (task_cols[n] @ task_rows[n]), element by element. The delta:
"prompt" [P, D], "task_cols" [N, P, Z] and "task_rows" [N, Z, D]; an encoder-decoder has them under
"encoder".

Source: Wang et al. 2023 (arXiv 2303.02861), section 3.1. The paper has Z = 1 and distils from a
teacher for each task; here, as in PEFT, Z is a setting and there are no teachers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.methods import prompt
from softprompt.methods.base import ContextShape, Setup, TrainedContextSettings, unchanged
from softprompt.methods.prompt import PromptConfig
from softprompt.models import Model
from softprompt.settings import setting

fold = unchanged


@dataclasses.dataclass(frozen=True)
class Settings(TrainedContextSettings):
    """A prompt for each task of data.mixture: a shared prompt times a low-rank factor."""

    name = "multitask"
    is_prompt = True
    per_task = True

    place: str = setting(
        "encoder", "encoder-decoders: before the encoder's input", choices=("encoder",)
    )
    rank: int = setting(8, "Z, the rank of a task's factor", low=1)


PEFT = {"peft_type": "MULTITASK_PROMPT_TUNING"}


@dataclasses.dataclass(frozen=True)
class MultitaskConfig(PromptConfig):
    """The static configuration; see `PromptConfig` for the other attributes.

    Attributes:
        tasks: N.
        rank: Z.
    """

    tasks: int = 1
    rank: int = 1


def resolve(settings: Settings, setup: Setup) -> MultitaskConfig:
    """The static configuration for a trial.

    Raises:
        UserError: see `prompt.resolve`; `prompt_to_input` is off in an encoder-decoder.
    """
    settings.check_room(setup)
    if setup.encoder_decoder and not settings.prompt_to_input:
        raise UserError(
            "config key 'method.prompt_to_input' is False; allowed for a multitask: True"
        )
    return MultitaskConfig(
        settings.length,
        initializer=setup.initializer(settings.place),
        embed_scale=setup.sizes.embed_scale,
        stacks=settings.stacks(setup),
        tasks=setup.tasks,
        rank=settings.rank,
    )


def context(cfg: MultitaskConfig) -> ContextShape:
    """The shape of the prompts' contexts."""
    return ContextShape(cfg.length, cfg.stacks, prompts=cfg.tasks)


def init(key: jax.Array, model: Model, weights: Any, cfg: MultitaskConfig) -> dict[str, Any]:
    """Returns the prompt of `prompt.init`, and factors whose product is 1 everywhere.

    Every task therefore starts with the shared prompt. (In PEFT the products start near zero,
    because both factors are drawn with a standard deviation of 0.02.) With a rank above 1, the
    other columns start as noise and the other rows at zero, so that their gradients differ.
    """
    first = prompt.init(key, model, weights, cfg)
    key = jax.random.fold_in(key, 8)  # independent of the initialiser's draws
    if cfg.stacks:
        return {stack: part | _factors(key, part["prompt"], cfg) for stack, part in first.items()}
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
    """The prompts [N, P, D] of the tasks `task_ids`, or of all tasks (None)."""
    if cfg.stacks:
        return {stack: _prompts(part, task_ids) for stack, part in delta.items()}
    return _prompts(delta, task_ids)


def _prompts(part: dict[str, jax.Array], task_ids: jax.Array | None) -> dict[str, jax.Array]:
    cols_NPZ, rows_NZD = part["task_cols"], part["task_rows"]
    if task_ids is not None:
        cols_NPZ, rows_NZD = cols_NPZ[task_ids], rows_NZD[task_ids]
    return {"prompt": part["prompt"] * jnp.einsum("npz,nzd->npd", cols_NPZ, rows_NZD)}
