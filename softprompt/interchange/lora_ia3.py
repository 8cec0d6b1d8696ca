"""PEFT's adapters of linear modules: LoRA and IA3.

A LoRA's A is [r, in] and its B [out, r]; IA3's vector is [out, 1], or [1, in] on a feed-forward.
Where transformers has queries, keys and values in one module (GPT-2, GPT-NeoX), that module has one
A, and its B and its vector hold the three in the module's own order. A method may have vectors of
the module's outputs beside A and B, such as DoRA's magnitudes: `PEFT_VECTORS` of its module names
them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.interchange.adapter_config import number, pattern_value, refuse, whole_number
from softprompt.interchange.adapter_files import Adapter
from softprompt.interchange.module_names import (
    PREFIX,
    LinearModule,
    ModelConfig,
    is_targeted,
    key_mapping,
    linear_modules,
    stored_transposed,
    target_modules,
    tensor_name,
)
from softprompt.interchange.prompts import Leaves, check_tensors, some
from softprompt.methods.lora import LoraConfig
from softprompt.pretrained.hf import canonical

ORDER = ("q", "k", "v", "qkv", "o", "gate", "up", "down")

NO_VECTORS: Mapping[str, str] = {}

# A module, and its name in each layer as the file spells it: None where the layer has no adapter.
AdaptedModule = tuple[LinearModule, list[str | None]]


def lora_to(
    leaves: Leaves,
    config: ModelConfig,
    method: Mapping[str, Any],
    *,
    vectors: Mapping[str, str] = NO_VECTORS,
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and config fields of a LoRA; takes what it reads out of `leaves`.

    Args:
        leaves: of the delta, by path.
        config: of the model.
        method: the method section of the config that trained the delta.
        vectors: leaf -> tensor of vectors that each projection has beside A and B.

    Raises:
        UserError: queries, keys and values with an A each where the module has one, or another
            rank than the method says.
    """
    tensors: Leaves = {}
    chosen, used = [], set()
    for module in linear_modules(config):
        factors = {path: _factors(path, leaves) for path in module.projections}
        (a, *others) = sorted({a for a, _ in factors.values()})
        if others and any(name in leaves for name in (a, *others)):
            raise UserError(
                f"{', '.join(name for name in (a, *others) if name in leaves)}: PEFT has one A for "
                f"queries, keys and values of {module.name}; only method.targets=qkv can be "
                "exported"
            )
        if a not in leaves:
            continue
        chosen.append(module.name)
        b = {path: leaves[name] for path, (_, name) in factors.items() if name in leaves}
        tensors |= _factor_tensors(module, leaves[a], b, rank=method["rank"], name=a)
        used |= {a, *(name for _, name in factors.values() if name in leaves)}
        for leaf, kind in vectors.items():
            parts = {path: leaves.pop(f"{path}/{leaf}")[:, None] for path in module.projections}
            tensors |= module.tensors(kind, module.join(parts, rows=1, fill=0)[:, 0])
    for name in used:  # several modules may share an A
        del leaves[name]
    alpha = float(method["alpha"])
    return tensors, {
        "fan_in_fan_out": stored_transposed(config),
        "r": int(method["rank"]),
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": float(method["dropout"]),
        "use_rslora": bool(method["rslora"]),
        "target_modules": target_modules(chosen, config),
    }


def _factors(path: str, leaves: Leaves) -> tuple[str, str]:
    """The names of a projection's A and B: its own, or those that q, k and v share."""
    scope, name = path.rsplit("/", 1)
    if name in "qkv" and f"{path}/lora_a" not in leaves and f"{scope}/qkv/lora_a" in leaves:
        return f"{scope}/qkv/lora_a", f"{scope}/qkv/{name}"
    return f"{path}/lora_a", f"{path}/lora_b"


def _factor_tensors(
    module: LinearModule, a: np.ndarray, b: Mapping[str, np.ndarray], *, rank: int, name: str
) -> Leaves:
    """A module's A and B in every layer; B is zero for a projection without one.

    Raises:
        UserError: another rank than `rank`; `name` is of the leaf `a`.
    """
    for found in (a.shape[-1], *(leaf.shape[1] for leaf in b.values())):
        if found != rank:
            raise UserError(
                f"{name} has rank {found}; config key 'method.rank' is {rank}: the scale of its "
                "update is unknown"
            )
    a_LZI = a.reshape(module.layers, -1, rank).swapaxes(1, 2)
    b_LOZ = module.join(b, rows=rank, fill=0).swapaxes(1, 2)
    return module.tensors("lora_A.weight", a_LZI) | module.tensors("lora_B.weight", b_LOZ)


def ia3_to(
    leaves: Leaves, config: ModelConfig, method: Mapping[str, Any]
) -> tuple[Leaves, dict[str, Any]]:
    """Tensors and config fields of an IA3; takes what it reads out of `leaves`."""
    tensors: Leaves = {}
    chosen, feed_forward = [], []
    for module in linear_modules(config):
        paths = [path for path in module.projections if f"{path}/ia3" in leaves]
        parts = {path: leaves.pop(f"{path}/ia3")[:, None] for path in paths}
        if not parts:
            continue
        chosen.append(module.name)
        if _is_feed_forward(module):
            feed_forward.append(module.name)
            tensors |= module.tensors("ia3_l", parts[paths[0]])
        else:
            factors_L1O = module.join(parts, rows=1, fill=1)
            tensors |= module.tensors("ia3_l", factors_L1O.swapaxes(1, 2))
    return tensors, {
        "fan_in_fan_out": stored_transposed(config),
        "target_modules": target_modules(chosen, config),
        "feedforward_modules": target_modules(feed_forward, config),
    }


def lora_from(
    adapter: Adapter, config: ModelConfig, *, vectors: Mapping[str, str] = NO_VECTORS
) -> tuple[Leaves, dict[str, Any]]:
    """The leaves of a LoRA, and its keys of a config's method section.

    All modules get one rank and one scale. Zeros fill up a smaller rank and a layer without an
    adapter, and B is multiplied by the ratio of another scale to the common one.

    Args:
        adapter: PEFT's.
        config: of the model.
        vectors: as in `lora_to`.

    Raises:
        UserError: tensors that are not those of its config for this model, trained biases, or a
            layer without an adapter where the method has vectors.
    """
    fields, file = {"r": 8, "lora_alpha": 8} | adapter.config, adapter.file
    adapted = _adapted_modules(adapter, config)
    names = [name for _, layers in adapted for name in layers if name]
    scales = {name: _scale(name, fields, file=file) for name in names}
    rank = max((one.rank for one in scales.values()), default=1)
    common = LoraConfig(rank, fields["lora_alpha"], bool(fields.get("use_rslora")))
    _check_lora_tensors(adapter, adapted, scales, vectors)
    leaves: Leaves = {}
    for module, layers in adapted:
        leaves |= _factor_leaves(module, *_filled(adapter, module, layers, scales, common))
        for leaf, kind in vectors.items():
            rows = [adapter.tensors[tensor_name(name, kind)] for name in layers if name]
            parts = module.split(np.stack(rows)[:, None])
            leaves |= {f"{path}/{leaf}": part[:, 0] for path, part in parts.items()}
    return leaves, {
        "rank": rank,
        "alpha": common.alpha,
        "dropout": number(fields, "lora_dropout", 0.0, file=file),
        "rslora": common.rslora,
        "targets": _target_names(path for path in leaves if path.endswith("/lora_a")),
    }


def _filled(
    adapter: Adapter,
    module: LinearModule,
    layers: list[str | None],
    scales: Mapping[str, LoraConfig],
    common: LoraConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """A module's A [L, Z, I] and B [L, Z, O] of the common rank and scale."""
    a_LZI = np.zeros((module.layers, common.rank, math.prod(module.inputs)), np.float32)
    b_LZO = np.zeros((module.layers, common.rank, module.outputs), np.float32)
    for layer, name in enumerate(layers):
        if name is not None:
            rank, ratio = scales[name].rank, scales[name].scale / common.scale
            a_LZI[layer, :rank] = adapter.tensors[tensor_name(name, "lora_A.weight")]
            b_OZ = adapter.tensors[tensor_name(name, "lora_B.weight")]
            b_LZO[layer, :rank] = b_OZ.T * np.float32(ratio)
    return a_LZI, b_LZO


def _scale(name: str, fields: Mapping[str, Any], *, file: str) -> LoraConfig:
    """Rank and scale of the module of this name.

    Raises:
        UserError: a rank or alpha that is not above zero.
    """
    alpha = number(fields, "lora_alpha", 8, file=file)
    if alpha <= 0:
        raise refuse(file, "lora_alpha", alpha, "a number above 0")
    return LoraConfig(
        pattern_value(name, fields.get("rank_pattern") or {}, whole_number(fields, "r", file=file)),
        pattern_value(name, fields.get("alpha_pattern") or {}, alpha),
        bool(fields.get("use_rslora")),
    )


def _check_lora_tensors(
    adapter: Adapter,
    adapted: list[AdaptedModule],
    scales: Mapping[str, LoraConfig],
    vectors: Mapping[str, str],
) -> None:
    """Checks that a file has the tensors of its config, and no others.

    Raises:
        UserError: names those that differ, trained biases, or a module whose vectors some layers
            lack.
    """
    bias = adapter.config.get("bias") or "none"
    if bias != "none" and (trained := [x for x in adapter.tensors if x.endswith(".bias")]):
        raise refuse(adapter.file, "bias", bias, f"'none', for it trains biases: {some(trained)}")
    wanted: dict[str, tuple[int, ...]] = {}
    for module, layers in adapted:
        if vectors and None in layers:
            raise UserError(
                f"{adapter.file}: it adapts {module.name} in some layers only; allowed: in all, "
                f"where there is {', '.join(vectors.values())}"
            )
        for name in filter(None, layers):
            rank = scales[name].rank
            wanted[tensor_name(name, "lora_A.weight")] = rank, math.prod(module.inputs)
            wanted[tensor_name(name, "lora_B.weight")] = module.outputs, rank
            wanted |= {tensor_name(name, kind): (module.outputs,) for kind in vectors.values()}
    check_tensors(adapter, wanted)


def _factor_leaves(module: LinearModule, a_LZI: np.ndarray, b_LZO: np.ndarray) -> Leaves:
    """The leaves of one module's A and B."""
    a = a_LZI.swapaxes(1, 2).reshape(module.layers, *module.inputs, -1)
    b = module.split(b_LZO)
    path = next(iter(b))
    if len(b) == 1:
        return {f"{path}/lora_a": a, f"{path}/lora_b": b[path]}
    shared = f"{path.rsplit('/', 1)[0]}/qkv"
    return {f"{shared}/lora_a": a} | {
        f"{shared}/{path.rsplit('/', 1)[1]}": part for path, part in b.items()
    }


def ia3_from(adapter: Adapter, config: ModelConfig) -> tuple[Leaves, dict[str, Any]]:
    """The same for an IA3, whose factors are one in a layer without an adapter."""
    adapted = _adapted_modules(adapter, config)
    shapes = {module.name: _factors_shape(module) for module, _ in adapted}
    names = [(name, module.name) for module, layers in adapted for name in layers if name]
    check_tensors(adapter, {tensor_name(name, "ia3_l"): shapes[module] for name, module in names})
    leaves: Leaves = {}
    for module, layers in adapted:
        one = np.ones(shapes[module.name], np.float32)
        tensors = [adapter.tensors.get(tensor_name(name or "", "ia3_l"), one) for name in layers]
        factors_L1O = np.stack(tensors).reshape(module.layers, 1, -1)
        own = _is_feed_forward(module)
        parts = dict.fromkeys(module.projections, factors_L1O) if own else module.split(factors_L1O)
        leaves |= {f"{path}/ia3": part[:, 0] for path, part in parts.items()}
    return leaves, {"targets": _target_names(leaves)}


def _factors_shape(module: LinearModule) -> tuple[int, int]:
    """The shape of a module's `ia3_l`."""
    inputs = math.prod(module.inputs)
    return (1, inputs) if _is_feed_forward(module) else (module.outputs, 1)


def _is_feed_forward(module: LinearModule) -> bool:
    """Whether IA3 scales the inputs of a module: the feed-forward's last."""
    return next(iter(module.projections)).endswith("mlp/down")


def _target_names(leaves: Iterable[str]) -> str:
    """The projections that have leaves, as `method.targets` lists them."""
    found = {name.rsplit("/", 2)[1] for name in leaves}
    return ",".join(name for name in ORDER if name in found)


def _adapted_modules(adapter: Adapter, config: ModelConfig) -> list[AdaptedModule]:
    """The modules that an adapter's config selects or, where it selects none, that have tensors."""
    spelled = _spelling(adapter, config)

    def selected(name: str) -> bool:
        if adapter.config.get("target_modules") is None:
            return any(key.startswith(tensor_name(name, "")) for key in adapter.tensors)
        return is_targeted(name, adapter.config)

    adapted: list[AdaptedModule] = []
    for module in linear_modules(config):
        names = [spelled(name) for name in module.layer_names()]
        layers = [name if selected(name) else None for name in names]
        if any(layers):
            adapted.append((module, layers))
    return adapted


def _spelling(adapter: Adapter, config: ModelConfig) -> Callable[[str], str]:
    """How an adapter's file spells a module's name (see `key_mapping`)."""
    for tensor in adapter.tensors:
        theirs = tensor.removeprefix(PREFIX)
        ours = canonical(theirs, key_mapping(config))
        if theirs != ours and theirs.endswith(ours):
            more = theirs.removesuffix(ours)
            return lambda name: more + name
        if theirs != ours and ours.endswith(theirs):
            less = ours.removesuffix(theirs)
            return lambda name: name.removeprefix(less)
    return lambda name: name
