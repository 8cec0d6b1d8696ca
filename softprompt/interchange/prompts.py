"""PEFT's prompt learning: prompts, P-tuning's final prompt, multitask prompts, prefixes.

All of them are one tensor `prompt_embeddings`, multitask prompts with two more beside it.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.interchange.adapter import Adapter
from softprompt.interchange.fields import whole_number
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config

Config = DecoderConfig | T5Config
Leaves = dict[str, np.ndarray]
ROWS, COLS, TASK_ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"


def prompt_place(config: Config) -> str:
    """Where the prompt that PEFT reads stands in a delta: an encoder-decoder's is the encoder's."""
    return "encoder/" if isinstance(config, T5Config) else ""


def prompt_to(leaves: Leaves, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and config fields of a prompt [P, D]; takes what it reads out of `leaves`."""
    prompt_PD = leaves.pop(f"{prompt_place(config)}prompt")
    return {ROWS: prompt_PD}, _sizes(config, len(prompt_PD))


def multitask_to(leaves: Leaves, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """The same of a shared prompt [P, D] with its tasks' factors [N, P, Z] and [N, Z, D]."""
    place = prompt_place(config)
    cols_NPZ, rows_NZD = leaves.pop(f"{place}task_cols"), leaves.pop(f"{place}task_rows")
    tensors, fields = prompt_to(leaves, config)
    fields |= {"num_tasks": cols_NPZ.shape[0], "num_ranks": cols_NPZ.shape[2]}
    return tensors | {COLS: cols_NPZ, TASK_ROWS: rows_NZD}, fields


def prefix_to(leaves: Leaves, config: DecoderConfig) -> tuple[Leaves, dict[str, Any]]:
    """The same of a prefix's keys and values [L, P, G, K]."""
    k_LPGK, v_LPGK = leaves.pop("prefix/k"), leaves.pop("prefix/v")
    _, length, heads, size = k_LPGK.shape
    both_PL2GK = np.stack([k_LPGK, v_LPGK]).transpose(2, 1, 0, 3, 4)
    sizes = {"num_attention_heads": heads, "token_dim": heads * size}
    return {ROWS: both_PL2GK.reshape(length, -1)}, _sizes(config, length) | sizes


def _sizes(config: Config, length: int) -> dict[str, Any]:
    layers = config.encoder_layers if isinstance(config, T5Config) else config.layers
    return {
        "num_attention_heads": config.heads,
        "num_layers": layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": length,
        "token_dim": config.prompt_width,
    }


def prompt_from(adapter: Adapter, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """The leaves of a prompt, and its keys of a config's method section.

    Of PEFT's prompt for both stacks of an encoder-decoder, which it reads the first half of, the
    other half is left out.

    Raises:
        UserError: tensors that are not those of such a prompt for this model.
    """
    length = whole_number(adapter.config, "num_virtual_tokens", file=adapter.file)
    both = _submodules(adapter, config)
    check_tensors(adapter, {ROWS: (both * length, config.prompt_width)})
    method = {"name": "prompt", "length": length, "place": "encoder"}
    return {f"{prompt_place(config)}prompt": adapter.tensors[ROWS][:length]}, method


def multitask_from(adapter: Adapter, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """The same for a multitask prompt."""
    fields, file = adapter.config, adapter.file
    length = whole_number(fields, "num_virtual_tokens", file=file)
    tasks = whole_number({"num_tasks": 1} | fields, "num_tasks", file=file)
    rank = whole_number({"num_ranks": 1} | fields, "num_ranks", file=file)
    if _submodules(adapter, config) == 2:
        raise UserError(
            f"{file}: num_transformer_submodules of its config is 2, a multitask prompt for the "
            "decoder too; allowed: 1"
        )
    shapes = {
        ROWS: (length, config.prompt_width),
        COLS: (tasks, length, rank),
        TASK_ROWS: (tasks, rank, config.prompt_width),
    }
    check_tensors(adapter, shapes)
    names = {ROWS: "prompt", COLS: "task_cols", TASK_ROWS: "task_rows"}
    leaves = {prompt_place(config) + ours: adapter.tensors[name] for name, ours in names.items()}
    return leaves, {"name": "multitask", "length": length, "rank": rank, "place": "encoder"}


def prefix_from(adapter: Adapter, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """The same for a prefix.

    An encoder-decoder's stands in its decoder's self-attention, and is what PEFT makes of the file:
    it lays the layers' pairs of keys and values out twice and reads every second one, so that layer
    n gets those of layer 2n modulo L.
    """
    length = whole_number(adapter.config, "num_virtual_tokens", file=adapter.file)
    if isinstance(config, T5Config):
        place, layers, heads = "decoder/prefix/", config.decoder_layers, config.heads
        if _submodules(adapter, config) != 2:
            raise UserError(
                f"{adapter.file}: num_transformer_submodules of its config is 1, with which PEFT "
                "spoils cross-attention; allowed: 2"
            )
    else:
        place, layers, heads = "prefix/", config.layers, config.kv_heads
    shape = (length, layers, 2, heads, config.head_size)
    check_tensors(adapter, {ROWS: (length, math.prod(shape[1:]))})
    both_2LPGK = adapter.tensors[ROWS].reshape(shape).transpose(2, 1, 0, 3, 4)
    if isinstance(config, T5Config):
        both_2LPGK = both_2LPGK[:, 2 * np.arange(layers) % layers]
    leaves = {f"{place}k": both_2LPGK[0], f"{place}v": both_2LPGK[1]}
    return leaves, {"name": "prefix", "length": length, "place": "decoder"}


def _submodules(adapter: Adapter, config: Config) -> int:
    """For how many stacks there are rows: PEFT's default for an encoder-decoder is two."""
    stacks = 2 if isinstance(config, T5Config) else 1
    found = adapter.config.get("num_transformer_submodules") or stacks
    if found not in (1, stacks):
        raise UserError(
            f"{adapter.file}: num_transformer_submodules of its config is {found!r}; allowed: "
            f"{' or '.join(map(str, sorted({1, stacks})))}"
        )
    return found


def check_tensors(adapter: Adapter, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one error that lists every missing, unexpected and misshapen tensor."""
    found = {name: tensor.shape for name, tensor in adapter.tensors.items()}
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "misshapen": [
            f"{name} {list(found[name])} (expected {list(shape)})"
            for name, shape in sorted(wanted.items())
            if name in found and found[name] != shape
        ],
    }
    problems = [f"{kind}: {_some(names)}" for kind, names in kinds.items() if names]
    if problems:
        raise UserError(
            f"{adapter.file}: tensors do not match its config and the model; {'; '.join(problems)}"
        )


def _some(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
