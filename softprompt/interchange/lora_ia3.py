"""PEFT's adapters beside a projection: LoRA and IA3, as one module of transformers has them.

A LoRA's A is [r, in] and its B [out, r]; IA3's vector is [out, 1], or [1, in] on a feed-forward.
Where transformers has queries, keys and values in one module (GPT-2, GPT-NeoX), that module has one
A, and its B and its vector hold the three in the module's own order.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.interchange.adapter import Adapter
from softprompt.interchange.fields import number, whole_number
from softprompt.interchange.module_names import (
    PREFIX,
    Config,
    Projection,
    layer_names,
    modules,
    spellings,
    targeted,
    targets,
    transposed,
)
from softprompt.interchange.prompts import Leaves, check_tensors
from softprompt.pretrained.hf import canonical

ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down")
FEED_FORWARD = "mlp/down"


def lora_to(
    leaves: Leaves, config: Config, method: Mapping[str, Any]
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and config fields of a LoRA; takes what it reads out of `leaves`.

    Raises:
        UserError: queries, keys and values with an A each where the module has one, or another
            rank than the method says.
    """
    tensors: Leaves = {}
    chosen, used = [], set()
    for module, parts in modules(config).items():
        sites = {path: _site(path, leaves) for path in parts}
        (a, *others) = sorted({a for a, _ in sites.values()})
        if others and any(name in leaves for name in (a, *others)):
            raise UserError(
                f"{', '.join(name for name in (a, *others) if name in leaves)}: PEFT has one A for "
                f"queries, keys and values of {module}; only method.targets=qkv can be exported"
            )
        if a not in leaves:
            continue
        chosen.append(module)
        b = {path: leaves[b] for path, (_, b) in sites.items() if b in leaves}
        tensors |= _lora_module(module, parts, leaves[a], b)
        used |= {a, *(b for _, b in sites.values() if b in leaves)}
    for name in sorted(used):
        leaf = leaves.pop(name)
        rank = leaf.shape[-1] if name.endswith("lora_a") else leaf.shape[1]
        if rank != method["rank"]:
            raise UserError(
                f"{name} has rank {rank}; config key 'method.rank' is {method['rank']}: the scale "
                "of its update is unknown"
            )
    alpha = float(method["alpha"])
    return tensors, {
        "fan_in_fan_out": transposed(config),
        "r": int(method["rank"]),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": float(method["dropout"]),
        "use_rslora": bool(method["rslora"]),
        "target_modules": targets(chosen, config),
    }


def _site(path: str, leaves: Leaves) -> tuple[str, str]:
    """The names of a projection's A and B: its own, or those that q, k and v share."""
    scope, name = path.rsplit("/", 1)
    if name in "qkv" and f"{path}/lora_a" not in leaves and f"{scope}/qkv/lora_a" in leaves:
        return f"{scope}/qkv/lora_a", f"{scope}/qkv/{name}"
    return f"{path}/lora_a", f"{path}/lora_b"


def _lora_module(
    module: str, parts: Mapping[str, Projection], a: np.ndarray, b: Mapping[str, np.ndarray]
) -> Leaves:
    """A module's tensors in every layer; a part without a B of its own is not updated."""
    tensors = {}
    for layer, name in enumerate(layer_names(module, len(a))):
        rank, width = a.shape[-1], next(iter(parts.values())).width
        b_ZO = np.zeros((rank, width), np.float32)
        for path, values in b.items():
            for one, view in zip(values[layer], b_ZO, strict=True):
                parts[path].own(view)[...] = one
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a[layer].reshape(-1, rank).T
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b_ZO.T
    return tensors


def ia3_to(leaves: Leaves, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and config fields of an IA3; takes what it reads out of `leaves`."""
    tensors: Leaves = {}
    chosen, feed_forward = [], []
    for module, parts in modules(config).items():
        found = {path: leaves.pop(f"{path}/ia3") for path in parts if f"{path}/ia3" in leaves}
        if not found:
            continue
        chosen.append(module)
        first = next(iter(found))
        if first.endswith(FEED_FORWARD):
            feed_forward.append(module)
        for layer, name in enumerate(layer_names(module, parts[first].layers)):
            if first.endswith(FEED_FORWARD):
                tensors[f"{PREFIX}{name}.ia3_l"] = found[first][layer].reshape(1, -1)
                continue
            vector_O = np.ones(parts[first].width, np.float32)
            for path, values in found.items():
                parts[path].own(vector_O)[...] = values[layer]
            tensors[f"{PREFIX}{name}.ia3_l"] = vector_O[:, None]
    return tensors, {
        "fan_in_fan_out": transposed(config),
        "target_modules": targets(chosen, config),
        "feedforward_modules": targets(feed_forward, config),
    }


def lora_from(adapter: Adapter, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """The leaves of a LoRA, and its keys of a config's method section.

    Raises:
        UserError: tensors that are not those of its config for this model.
    """
    rank = whole_number({"r": 8} | adapter.config, "r", file=adapter.file)
    alpha = number(adapter.config, "lora_alpha", 8, file=adapter.file)
    adapter, chosen = _read_modules(adapter, config)
    wanted: dict[str, tuple[int, ...]] = {}
    for module, parts in chosen.items():
        one = next(iter(parts.values()))
        for name in layer_names(module, one.layers):
            wanted[f"{PREFIX}{name}.lora_A.weight"] = rank, math.prod(one.inputs)
            wanted[f"{PREFIX}{name}.lora_B.weight"] = one.width, rank
    check_tensors(adapter, wanted)
    leaves: Leaves = {}
    for module, parts in chosen.items():
        leaves |= _lora_leaves(module, parts, adapter.tensors, rank)
    return leaves, {
        "name": "lora",
        "rank": rank,
        "alpha": alpha,
        "dropout": number(adapter.config, "lora_dropout", 0.0, file=adapter.file),
        "rslora": bool(adapter.config.get("use_rslora", False)),
        "targets": _names(leaves),
    }


def _lora_leaves(
    module: str, parts: Mapping[str, Projection], tensors: Leaves, rank: int
) -> Leaves:
    """The leaves [L, ...] of one module."""
    one = next(iter(parts.values()))
    names = [f"{PREFIX}{name}" for name in layer_names(module, one.layers)]
    a = [tensors[f"{name}.lora_A.weight"].T.reshape(*one.inputs, rank) for name in names]
    b_LZO = np.stack([tensors[f"{name}.lora_B.weight"].T for name in names])
    b = {
        path: np.stack([[part.own(vector) for vector in layer] for layer in b_LZO])
        for path, part in parts.items()
    }
    if len(parts) == 1:
        (path,) = parts
        return {f"{path}/lora_a": np.stack(a), f"{path}/lora_b": b[path]}
    scope = next(iter(parts)).rsplit("/", 1)[0]
    leaves = {f"{scope}/qkv/{path.rsplit('/', 1)[1]}": values for path, values in b.items()}
    return {f"{scope}/qkv/lora_a": np.stack(a)} | leaves


def ia3_from(adapter: Adapter, config: Config) -> tuple[Leaves, dict[str, Any]]:
    """The same for an IA3."""
    adapter, chosen = _read_modules(adapter, config)
    wanted: dict[str, tuple[int, ...]] = {}
    for module, parts in chosen.items():
        path, one = next(iter(parts.items()))
        inner = path.endswith(FEED_FORWARD)
        shape = (1, math.prod(one.inputs)) if inner else (one.width, 1)
        wanted |= {f"{PREFIX}{name}.ia3_l": shape for name in layer_names(module, one.layers)}
    check_tensors(adapter, wanted)
    leaves: Leaves = {}
    for module, parts in chosen.items():
        for path, one in parts.items():
            names = layer_names(module, one.layers)
            vectors = [adapter.tensors[f"{PREFIX}{name}.ia3_l"].reshape(-1) for name in names]
            own = vectors if path.endswith(FEED_FORWARD) else [one.own(x) for x in vectors]
            leaves[f"{path}/ia3"] = np.stack(own)
    return leaves, {"name": "ia3", "targets": _names(leaves)}


def _names(leaves: Iterable[str]) -> str:
    """The projections that have leaves, as `method.targets` lists them."""
    found = {name.rsplit("/", 2)[1] for name in leaves}
    return ",".join(name for name in ORDER if name in found)


def _read_modules(
    adapter: Adapter, config: Config
) -> tuple[Adapter, dict[str, dict[str, Projection]]]:
    """The adapter with its tensors' names as the model's family has them, and its modules.

    Those are the modules that the config targets, or, where it says none, those with tensors.
    """
    renamed = {}
    for name, tensor in adapter.tensors.items():
        inner = canonical(name.removeprefix(PREFIX), spellings(config))
        renamed[PREFIX + inner if name.startswith(PREFIX) else name] = tensor
    wanted, without = (adapter.config.get(key) for key in ("target_modules", "exclude_modules"))

    def chosen(module: str, layers: int) -> bool:
        names = layer_names(module, layers)
        if wanted is None:
            return any(key.startswith(f"{PREFIX}{name}.") for key in renamed for name in names)
        return any(targeted(name, wanted) and not targeted(name, without) for name in names)

    found = {
        module: parts
        for module, parts in modules(config).items()
        if chosen(module, next(iter(parts.values())).layers)
    }
    return Adapter(adapter.config, renamed, adapter.provenance, adapter.file), found
