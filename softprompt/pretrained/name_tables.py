"""Name tables: which source tensor fills which leaf, each matched exactly once.

A source (a GGUF file, a Hugging Face folder) gives tensors in a layout of its own, mostly that of
`torch.nn.Linear`, [out, in]. A table has for every leaf of the weights tree a `Part`: what its
tensors are called there, and how one of them is turned into the leaf's own layout. Layers are
stacked: leaf `layers/attn/q/kernel` [L, D, H, K] is filled in place, one layer at a time, from L
tensors.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.models.quantize import VALUES, input_axes, storage
from softprompt.models.quantize import quantize as quantized
from softprompt.models.shapes import decoder_shapes, leaf_dtype

Storage = Mapping[str, tuple[tuple[int, ...], np.dtype]]
Put = Callable[[str, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """Opened weights: what is in them, and how to read one tensor.

    Args:
        file: what to call them in an error.
        tensors: name -> (stored type, shape).
        read: name -> (values in that shape, the raw bytes as stored).
        harmless: whether a tensor that no leaf asks for may be left out without a word.
    """

    file: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], tuple[np.ndarray, np.ndarray]]
    harmless: Callable[[str], bool] = lambda name: False


@dataclasses.dataclass(frozen=True)
class Part:
    """How the tensor `name`, of shape `source`, becomes a leaf (or its layer) of shape `leaf`.

    `layers`: how many tensors are stacked in the leaf, None where it is one tensor; `name` has `{}`
    for the layer. Several leaves may each take their part of one fused tensor. `convert` gives a
    view of a Hugging Face tensor, so that what is written into the view is written into the tensor
    (`save.py`). `offset` is then added.
    """

    name: str
    source: tuple[int, ...]
    leaf: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    layers: int | None = None
    offset: float = 0.0

    def values(self, x: np.ndarray) -> np.ndarray:
        """What the tensor's values are in the leaf."""
        part = self.convert(x)
        if self.offset:
            part = part.astype(np.promote_types(part.dtype, np.float32)) + self.offset
        return part

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole leaf's shape."""
        return self.leaf if self.layers is None else (self.layers, *self.leaf)


Table = Mapping[str, Part]


def decoder_table(config: DecoderConfig, names: Mapping[str, str]) -> dict[str, Part]:
    """The table of a source that stores every leaf apart, matrices as [out, in].

    Args:
        config: which leaves there are.
        names: module path -> name, `{}` for the layer. The module's `bias` is NAME.bias; its
            `kernel`, `scale` or `embedding` is NAME.weight.
    """
    table = {}
    for path, leaf in decoder_shapes(config).items():
        module, _, kind = path.rpartition("/")
        name = f"{names[module]}.{'bias' if kind == 'bias' else 'weight'}"
        layers = config.layers if path.startswith("layers/") else None
        table[path] = torch_part(path, name, leaf, layers=layers)
    return table


def torch_part(path: str, name: str, leaf: tuple[int, ...], *, layers: int | None) -> Part:
    """A leaf as `torch.nn` stores it: a kernel is [out, in], each axis flat; the rest as it is."""
    if path.endswith("/embedding"):
        return Part(name, leaf, leaf, lambda x: x, layers)
    if not path.endswith("/kernel"):
        return Part(name, (math.prod(leaf),), leaf, lambda x: x.reshape(leaf), layers)
    inputs = 2 if path.endswith("/o/kernel") else 1
    source = (math.prod(leaf[inputs:]), math.prod(leaf[:inputs]))
    return Part(name, source, leaf, lambda x: x.T.reshape(leaf), layers)


def straight(part: Part) -> Part:
    """The part of a kernel that its source stores as [in, out]."""
    source = part.source[::-1]
    return dataclasses.replace(part, source=source, convert=lambda x: x.reshape(part.leaf))


def read_weights(
    source: Source, table: Table, *, dtype: np.dtype, put: Put, quantize: str = "none"
) -> tuple[dict[str, Any], str]:
    """Reads every leaf of the weights tree, one tensor at a time.

    Memory stays near the size of what was read so far plus one stacked leaf.

    Args:
        source: opened weights.
        table: leaf path -> part, for every leaf.
        dtype: dtype of the matrices. Scales and biases are at least float32.
        put: called as `put(path, array)` on each finished leaf; what it returns is kept.
        quantize: "none", "int8" or "int4" (see `softprompt.models.quantize`).

    Returns:
        The weights tree and its fingerprint: 16 hex digits over name, type, shape and raw bytes of
        every tensor used.

    Raises:
        UserError: listing every missing, unexpected and misshapen tensor.
    """
    tensors = {path: tensor_names(part) for path, part in table.items()}
    _check(source, {name: table[path].source for path in table for name in tensors[path]})
    digests: dict[str, str] = {}
    weights: dict[str, Any] = {}
    for path, part in table.items():
        stored = storage(path, part.leaf, leaf_dtype(path, dtype), quantize)
        leaves = _fill(source, tensors[path], part, stored, digests)
        for name in stored:
            _insert(weights, name, put(name, leaves.pop(name)))  # then it is not kept here
    fingerprint = hashlib.sha256("\n".join(sorted(digests.values())).encode()).hexdigest()[:16]
    return weights, fingerprint


def _fill(
    source: Source, tensors: list[str], part: Part, stored: Storage, digests: dict[str, str]
) -> dict[str, np.ndarray]:
    """A leaf as it is `stored`, stacked where it has layers; adds its tensors' digests by name."""
    stack = () if part.layers is None else (part.layers,)
    leaves = {path: np.empty((*stack, *shape), dtype) for path, (shape, dtype) in stored.items()}
    for layer, name in enumerate(tensors):
        values, raw = source.read(name)
        made: tuple[np.ndarray, ...] = (part.values(values),)
        if len(stored) > 1:
            path = next(iter(stored)).removesuffix(VALUES)
            packed = next(iter(leaves.values())).dtype == np.uint8
            made = quantized(made[0], input_axes(path), "int4" if packed else "int8")
        for leaf, one in zip(leaves.values(), made, strict=True):
            leaf[... if part.layers is None else layer] = one
        if name not in digests:
            digests[name] = _digest(name, source.tensors[name], raw)
    return leaves


def tensor_names(part: Part) -> list[str]:
    """The names of a leaf's tensors, one a layer where it has layers."""
    return [part.name] if part.layers is None else [part.name.format(i) for i in range(part.layers)]


def _check(source: Source, wanted: dict[str, tuple[int, ...]]) -> None:
    """Raises one error that lists everything in which source and table differ."""
    found = source.tensors
    missing = sorted(set(wanted) - set(found))
    extra = sorted(n for n in set(found) - set(wanted) if not source.harmless(n))
    misshapen = [
        f"{name} {list(found[name][1])} (expected {list(shape)})"
        for name, shape in sorted(wanted.items())
        if name in found and found[name][1] != shape
    ]
    kinds = {"missing": missing, "unexpected": extra, "misshapen": misshapen}
    problems = [f"{kind}: {', '.join(items)}" for kind, items in kinds.items() if items]
    if problems:
        raise UserError(f"{source.file}: tensors do not match the config; {'; '.join(problems)}")


def _digest(name: str, stored: tuple[str, tuple[int, ...]], raw: np.ndarray) -> str:
    data = np.ascontiguousarray(raw).reshape(-1).view(np.uint8)
    return f"{name} {stored[0]} {list(stored[1])} {hashlib.sha256(data).hexdigest()}"


def _insert(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *folders, last = path.split("/")
    for folder in folders:
        tree = tree.setdefault(folder, {})
    tree[last] = leaf
