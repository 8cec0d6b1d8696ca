"""Name tables: the rule by which each leaf of the weights is filled from a source's tensors.

A source (a GGUF file, a Hugging Face folder) stores its tensors in its own layout, usually that of
`torch.nn.Linear`, [out, in]. A table maps every leaf of the weights tree to a `TensorRule`, which
names the tensors and converts each to the layout of the leaf. Layers are stacked: the leaf
`layers/attn/q/kernel` [L, D, H, K] is filled in place from L tensors, one at a time.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.models.quantize import VALUES, input_axes, storage
from softprompt.models.quantize import quantize as quantized
from softprompt.models.shapes import decoder_shapes, layer_count, leaf_dtype, t5_shapes
from softprompt.models.t5_layers import T5Config

Storage = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Put = Callable[[str, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """Opened weights: which tensors there are, and how to read one.

    Args:
        file: the name of the source in errors.
        tensors: name -> (stored type, shape).
        read: name -> (values in that shape, the raw bytes as stored).
        harmless: whether a tensor that fills no leaf may be ignored.
    """

    file: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], tuple[np.ndarray, np.ndarray]]
    harmless: Callable[[str], bool] = lambda name: False


@dataclasses.dataclass(frozen=True)
class TensorRule:
    """How a tensor becomes a leaf, or one layer of a leaf.

    Attributes:
        name: of the tensor; `{}` stands for the layer.
        source: shape of the tensor.
        leaf: shape of the leaf, without its axis of layers.
        convert: the tensor's values -> the leaf's. For a Hugging Face tensor it returns a view, so
            that `save.py` can write a leaf into a tensor. Several leaves may each take their
            share of one fused tensor.
        layers: how many tensors the leaf stacks; None where the leaf is one tensor.
        offset: is added to the converted values.
    """

    name: str
    source: tuple[int, ...]
    leaf: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    layers: int | None = None
    offset: float = 0.0

    def values(self, x: np.ndarray) -> np.ndarray:
        """The leaf's values, from the tensor's."""
        y = self.convert(x)
        return y.astype(np.promote_types(y.dtype, np.float32)) + self.offset if self.offset else y

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole leaf."""
        return self.leaf if self.layers is None else (self.layers, *self.leaf)


Table = Mapping[str, TensorRule]


def decoder_table(config: DecoderConfig, names: Mapping[str, str]) -> dict[str, TensorRule]:
    """The table of a source that has one tensor for each leaf, matrices as [out, in].

    Args:
        config: says which leaves there are.
        names: path of a module -> its name in the source, `{}` for the layer. The module's `bias`
            is NAME.bias; its `kernel`, `scale` or `embedding` is NAME.weight.
    """
    table = {}
    for path, leaf in decoder_shapes(config).items():
        module, _, kind = path.rpartition("/")
        name = f"{names[module]}.{'bias' if kind == 'bias' else 'weight'}"
        layers = config.layers if path.startswith("layers/") else None
        table[path] = torch_rule(path, name, leaf, layers=layers)
    return table


def encoder_decoder_table(config: T5Config, names: Mapping[str, str]) -> dict[str, TensorRule]:
    """The table of a T5 whose source names the tensor of each leaf so, `{}` for the layer."""
    return {
        path: torch_rule(path, names[path], leaf, layers=layer_count(config, path))
        for path, leaf in t5_shapes(config).items()
    }


def torch_rule(path: str, name: str, leaf: tuple[int, ...], *, layers: int | None) -> TensorRule:
    """The rule of a leaf that `torch.nn` stores: kernels are [out, in], with flattened heads."""
    if path.endswith("/embedding"):
        return TensorRule(name, leaf, leaf, lambda x: x, layers)
    if not path.endswith("/kernel"):
        return TensorRule(name, (math.prod(leaf),), leaf, lambda x: x.reshape(leaf), layers)
    inputs = 2 if path.endswith("/o/kernel") else 1
    source = (math.prod(leaf[inputs:]), math.prod(leaf[:inputs]))
    return TensorRule(name, source, leaf, lambda x: x.T.reshape(leaf), layers)


def input_major(rule: TensorRule) -> TensorRule:
    """The rule of the same kernel where the source stores it as [in, out]."""
    return dataclasses.replace(rule, source=rule.source[::-1], convert=lambda x: rule.convert(x.T))


def fused_qkv(
    rules: Mapping[str, TensorRule], part: Callable[[TensorRule, int], TensorRule]
) -> dict[str, TensorRule]:
    """The rules where one tensor holds queries, keys and values: `part(rule, n)` is the n-th's."""
    paths = {
        f"layers/attn/{p}/{kind}": n for n, p in enumerate("qkv") for kind in ("kernel", "bias")
    }
    return {path: part(x, paths[path]) if path in paths else x for path, x in rules.items()}


def third(rule: TensorRule, nth: int) -> TensorRule:
    """The rule of one of three equal blocks of a tensor's rows."""
    out, *inputs = rule.source

    def convert(x: np.ndarray) -> np.ndarray:
        return rule.convert(x[nth * out : (nth + 1) * out])

    return dataclasses.replace(rule, source=(3 * out, *inputs), convert=convert)


def read_weights(
    source: Source, table: Table, *, dtype: np.dtype, put: Put, quantize: str = "none"
) -> tuple[dict[str, Any], str]:
    """Reads every leaf of the weights tree, one tensor at a time.

    Peak memory is about the size of the leaves read so far plus one stacked leaf.

    Args:
        source: opened weights.
        table: path -> rule, for every leaf.
        dtype: dtype of the matrices. Scales and biases are at least float32.
        put: called as `put(path, array)` with each finished leaf; the tree holds what it returns.
        quantize: "none", "int8" or "int4" (see `softprompt.models.quantize`).

    Returns:
        The weights tree and its fingerprint: 16 hex digits over name, type, shape and raw bytes of
        every tensor used.

    Raises:
        UserError: listing every missing, unexpected and misshapen tensor.
    """
    tensors = {path: tensor_names(rule) for path, rule in table.items()}
    _check(source, {name: table[path].source for path in table for name in tensors[path]})
    digests: dict[str, str] = {}
    weights: dict[str, Any] = {}
    for path, rule in table.items():
        stored = storage(path, rule.leaf, leaf_dtype(path, dtype), quantize)
        leaves = _fill(source, tensors[path], rule, stored, digests)
        for name in stored:
            weights[name] = put(name, leaves.pop(name))  # popped, so that memory is freed
    fingerprint = hashlib.sha256("\n".join(sorted(digests.values())).encode()).hexdigest()[:16]
    return unflatten_dict(weights, sep="/"), fingerprint


def _fill(
    source: Source, tensors: list[str], rule: TensorRule, stored: Storage, digests: dict[str, str]
) -> dict[str, np.ndarray]:
    """The arrays that hold a leaf, as `stored` says; adds the tensors' digests to `digests`."""
    stack = () if rule.layers is None else (rule.layers,)
    leaves = {path: np.empty((*stack, *shape), dtype) for path, (shape, dtype) in stored.items()}
    for layer, name in enumerate(tensors):
        values, raw = source.read(name)
        made: tuple[np.ndarray, ...] = (rule.values(values),)
        if len(stored) > 1:
            path = next(iter(stored)).removesuffix(VALUES)
            packed = next(iter(leaves.values())).dtype == np.uint8
            made = quantized(made[0], input_axes(path), "int4" if packed else "int8")
        for leaf, one in zip(leaves.values(), made, strict=True):
            leaf[... if rule.layers is None else layer] = one
        if name not in digests:
            digests[name] = _digest(name, source.tensors[name], raw)
    return leaves


def tensor_names(rule: TensorRule) -> list[str]:
    """The names of a leaf's tensors: one, or one for each layer."""
    return [rule.name] if rule.layers is None else [rule.name.format(i) for i in range(rule.layers)]


def _check(source: Source, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises one error that lists every difference between source and table."""
    found = {
        name: shape
        for name, (_, shape) in source.tensors.items()
        if name in wanted or not source.harmless(name)
    }
    kinds = mismatches(found, wanted).items()
    if problems := [f"{kind}: {', '.join(names)}" for kind, names in kinds]:
        raise UserError(f"{source.file}: tensors do not match the config; {'; '.join(problems)}")


def mismatches(
    found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, list[str]]:
    """The names of "missing", "unexpected" and "misshapen" tensors, for the kinds with any."""
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "misshapen": [
            f"{name} {list(found[name])} (expected {list(shape)})"
            for name, shape in sorted(wanted.items())
            if name in found and found[name] != shape
        ],
    }
    return {kind: names for kind, names in kinds.items() if names}


def _digest(name: str, stored: tuple[str, tuple[int, ...]], raw: np.ndarray) -> str:
    data = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return f"{name} {stored[0]} {list(stored[1])} {hashlib.sha256(data).hexdigest()}"
