"""PEFT's prompt learning: prompt tuning, P-tuning, multitask prompt tuning and prefix tuning.

A file has one tensor, `prompt_embeddings`, and for a multitask prompt two more. P-tuning's file
holds the prompt that its network made.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.interchange.adapter_config import refuse, whole_number
from softprompt.interchange.adapter_files import Adapter
from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.name_tables import mismatches

Leaves = dict[str, np.ndarray]
ROWS, COLS, TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


def prompt_scope(config: ModelConfig) -> str:
    """The path of the one prompt that PEFT has, up to its name: an encoder's, or a decoder's."""
    return "encoder/" if isinstance(config, T5Config) else ""


def prompt_to(
    leaves: Leaves, config: ModelConfig, method: Mapping[str, Any]
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and config fields of a prompt [P, D]; takes what it reads out of `leaves`."""
    prompt_PD = leaves.pop(f"{prompt_scope(config)}prompt")
    fields = _sizes(config, len(prompt_PD))
    if method.get("reparam") == "mlp":
        fields |= {"peft_type": "P_TUNING", "encoder_hidden_size": method["bottleneck"]}
    return {ROWS: prompt_PD}, fields


def multitask_to(
    leaves: Leaves, config: ModelConfig, method: Mapping[str, Any]
) -> tuple[Leaves, dict[str, Any]]:
    """The same for a shared prompt [P, D] with its tasks' factors [N, P, Z] and [N, Z, D]."""
    scope = prompt_scope(config)
    cols_NPZ, rows_NZD = leaves.pop(f"{scope}task_cols"), leaves.pop(f"{scope}task_rows")
    tensors, fields = prompt_to(leaves, config, method)
    fields |= {"num_tasks": cols_NPZ.shape[0], "num_ranks": cols_NPZ.shape[2]}
    return tensors | {COLS: cols_NPZ, TASK_ROWS: rows_NZD}, fields


def prefix_to(
    leaves: Leaves, config: DecoderConfig, method: Mapping[str, Any]
) -> tuple[Leaves, dict[str, Any]]:
    """The same for a prefix's keys and values [L, P, G, K] in a decoder."""
    k_LPGK, v_LPGK = leaves.pop("prefix/k"), leaves.pop("prefix/v")
    _, length, heads, size = k_LPGK.shape
    both_PL2GK = np.stack([k_LPGK, v_LPGK]).transpose(2, 1, 0, 3, 4)
    sizes = {"num_attention_heads": heads, "token_dim": heads * size}
    return {ROWS: both_PL2GK.reshape(length, -1)}, _sizes(config, length) | sizes


def _sizes(config: ModelConfig, length: int) -> dict[str, Any]:
    layers = config.encoder_layers if isinstance(config, T5Config) else config.layers
    return {
        "num_attention_heads": config.heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "token_dim": config.prompt_width,
    }


def prompt_from(adapter: Adapter, config: ModelConfig) -> tuple[Leaves, dict[str, Any]]:
    """The leaves of a prompt, and its keys of a config's method section.

    A file for an encoder-decoder may have rows for both stacks; PEFT reads the first half, the
    encoder's, and so does this function.

    Raises:
        UserError: tensors that are not those of such a prompt for this model.
    """
    length = whole_number(adapter.config, "num_virtual_tokens", file=adapter.file)
    stacks = _submodules(adapter, config)
    check_tensors(adapter, {ROWS: (stacks * length, config.prompt_width)})
    method = {"length": length, "place": "encoder"}
    return {f"{prompt_scope(config)}prompt": adapter.tensors[ROWS][:length]}, method


def multitask_from(adapter: Adapter, config: ModelConfig) -> tuple[Leaves, dict[str, Any]]:
    """The same for a multitask prompt."""
    fields, file = {"num_tasks": 1, "num_ranks": 1} | adapter.config, adapter.file
    length = whole_number(fields, "num_virtual_tokens", file=file)
    tasks = whole_number(fields, "num_tasks", file=file)
    rank = whole_number(fields, "num_ranks", file=file)
    if _submodules(adapter, config) == 2:
        raise refuse(file, "num_transformer_submodules", 2, "1 for a multitask prompt")
    shapes = {
        ROWS: (length, config.prompt_width),
        COLS: (tasks, length, rank),
        TASK_ROWS: (tasks, rank, config.prompt_width),
    }
    check_tensors(adapter, shapes)
    names = {ROWS: "prompt", COLS: "task_cols", TASK_ROWS: "task_rows"}
    leaves = {prompt_scope(config) + ours: adapter.tensors[name] for name, ours in names.items()}
    return leaves, {"length": length, "rank": rank, "place": "encoder"}


def prefix_from(adapter: Adapter, config: ModelConfig) -> tuple[Leaves, dict[str, Any]]:
    """The same for a prefix.

    In an encoder-decoder PEFT puts it into the decoder's self-attention. It repeats the file's
    pairs of keys and values and takes every second one, so that layer n gets those of layer 2n
    modulo L; the leaves are what it computes with.
    """
    length = whole_number(adapter.config, "num_virtual_tokens", file=adapter.file)
    if isinstance(config, T5Config):
        scope, layers, heads = "decoder/prefix/", config.decoder_layers, config.heads
        if _submodules(adapter, config) != 2:
            raise refuse(
                adapter.file,
                "num_transformer_submodules",
                1,
                "2 for a prefix, since with 1 PEFT breaks cross-attention",
            )
    else:
        scope, layers, heads = "prefix/", config.layers, config.kv_heads
    shape = (length, layers, 2, heads, config.head_size)
    check_tensors(adapter, {ROWS: (length, math.prod(shape[1:]))})
    both_2LPGK = adapter.tensors[ROWS].reshape(shape).transpose(2, 1, 0, 3, 4)
    if isinstance(config, T5Config):
        both_2LPGK = both_2LPGK[:, 2 * np.arange(layers) % layers]
    leaves = {f"{scope}k": both_2LPGK[0], f"{scope}v": both_2LPGK[1]}
    return leaves, {"length": length, "place": "decoder"}


def _submodules(adapter: Adapter, config: ModelConfig) -> int:
    """How many stacks the file has rows for; PEFT's default is all that the model has."""
    stacks = 2 if isinstance(config, T5Config) else 1
    found = adapter.config.get("num_transformer_submodules") or stacks
    if found not in (1, stacks):
        allowed = " or ".join(map(str, sorted({1, stacks})))
        raise refuse(adapter.file, "num_transformer_submodules", found, allowed)
    return found


def check_tensors(adapter: Adapter, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that a file has tensors of these names and shapes, and no others.

    Raises:
        UserError: lists the missing, unexpected and misshapen tensors.
    """
    found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    kinds = mismatches(found, wanted).items()
    if problems := [f"{kind}: {some(names)}" for kind, names in kinds]:
        raise UserError(
            f"{adapter.file}: tensors do not match its config and the model; {'; '.join(problems)}"
        )


def some(names: list[str]) -> str:
    """The first four of a list of names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
