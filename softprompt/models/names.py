"""Name tables: which source tensor fills which leaf, each matched exactly once.

A source (a GGUF file, a Hugging Face folder) gives tensors in the layout of `torch.nn.Linear`,
[out, in]. A table says for every leaf of the weights tree what its tensors are called there, and a
`Part` how one of them is turned into the leaf's own layout. Layers are stacked: leaf
`layers/attn/q/kernel` [L, D, H, K] is filled in place, one layer at a time, from L tensors.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig

Put = Callable[[str, np.ndarray], Any]


@dataclasses.dataclass(frozen=True)
class Source:
    """Opened weights: what is in them, and how to read one tensor.

    Args:
        file: what to call them in an error.
        tensors: name -> (stored type, shape [out, in]).
        read: name -> (values in that shape, the raw bytes as stored).
        harmless: whether a tensor that no leaf asks for may be left out without a word.
    """

    file: str
    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str], tuple[np.ndarray, np.ndarray]]
    harmless: Callable[[str], bool] = lambda name: False


@dataclasses.dataclass(frozen=True)
class Part:
    """How a tensor of shape `source` becomes a leaf (or its layer) of shape `leaf`.

    `layers`: how many tensors are stacked in the leaf, None where it is one tensor. `exact`: the
    leaf is at least float32, whatever dtype the others have.
    """

    source: tuple[int, ...]
    leaf: tuple[int, ...]
    convert: Callable[[np.ndarray], np.ndarray]
    layers: int | None = None
    exact: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole leaf's shape."""
        return self.leaf if self.layers is None else (self.layers, *self.leaf)


def parameter_count(parts: Mapping[str, Part]) -> int:
    """Exact number of parameters of a weights tree; a tied head counts once."""
    return sum(math.prod(part.shape) for part in parts.values())


def llama_parts(config: DecoderConfig) -> dict[str, Part]:
    """Leaf path -> part, for every leaf of a Llama-style decoder's weights."""
    c = config

    def same(*shape: int) -> Part:
        return Part(shape, shape, lambda x: x)

    def linear(n_in: int, n_out: int) -> Part:
        return Part((n_out, n_in), (n_in, n_out), np.transpose)

    def heads(count: int) -> Part:
        leaf = (c.width, count, c.head_size)
        return Part((count * c.head_size, c.width), leaf, lambda x: x.T.reshape(leaf))

    merged = (c.heads, c.head_size, c.width)
    parts = {
        "embed/embedding": same(c.vocab, c.width),
        "layers/attn_norm/scale": same(c.width),
        "layers/attn/q/kernel": heads(c.heads),
        "layers/attn/k/kernel": heads(c.kv_heads),
        "layers/attn/v/kernel": heads(c.kv_heads),
        "layers/attn/o/kernel": Part(
            (c.width, c.heads * c.head_size), merged, lambda x: x.T.reshape(merged)
        ),
        "layers/mlp_norm/scale": same(c.width),
        "layers/mlp/gate/kernel": linear(c.width, c.ffn),
        "layers/mlp/up/kernel": linear(c.width, c.ffn),
        "layers/mlp/down/kernel": linear(c.ffn, c.width),
        "final_norm/scale": same(c.width),
    }
    if not c.tied:
        parts["head/kernel"] = linear(c.width, c.vocab)
    return {
        path: dataclasses.replace(part, layers=c.layers) if path.startswith("layers/") else part
        for path, part in parts.items()
    }


def read_weights(
    source: Source,
    parts: Mapping[str, Part] | DecoderConfig,
    names: Mapping[str, str],
    *,
    dtype: np.dtype,
    put: Put,
) -> tuple[dict[str, Any], str]:
    """Reads every leaf of the weights tree, one tensor at a time.

    Memory stays near the size of what was read so far plus one stacked leaf.

    Args:
        source: opened weights.
        parts: leaf path -> how its tensors become the leaf; a decoder's config stands for
            `llama_parts` of it.
        names: leaf path -> tensor name in the source, with `{}` for the layer where stacked.
        dtype: dtype of the leaves; those that are `exact` are at least float32.
        put: called as `put(path, array)` on each finished leaf; what it returns is kept.

    Returns:
        The weights tree and its fingerprint: 16 hex digits over name, type, shape and raw bytes of
        every tensor used.

    Raises:
        UserError: listing every missing, unexpected and misshapen tensor.
    """
    if isinstance(parts, DecoderConfig):
        parts = llama_parts(parts)
    tensors = {path: _tensor_names(names[path], part.layers) for path, part in parts.items()}
    _check(source, {name: parts[path].source for path in parts for name in tensors[path]})
    digests: list[str] = []
    weights: dict[str, Any] = {}
    for path, part in parts.items():
        leaf = _fill(source, tensors[path], part, dtype=dtype, digests=digests)
        _insert(weights, path, put(path, leaf))
        del leaf  # the next one is allocated without this one beside it
    fingerprint = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()[:16]
    return weights, fingerprint


def _fill(
    source: Source, tensors: list[str], part: Part, *, dtype: np.dtype, digests: list[str]
) -> np.ndarray:
    """One leaf, stacked where it has layers; appends its tensors' digests."""
    wanted = np.promote_types(dtype, np.float32) if part.exact else dtype
    leaf = np.empty(part.shape, wanted)
    for layer, name in enumerate(tensors):
        values, raw = source.read(name)
        leaf[... if part.layers is None else layer] = part.convert(values)
        digests.append(_digest(name, source.tensors[name], raw))
    return leaf


def _tensor_names(pattern: str, layers: int | None) -> list[str]:
    return [pattern] if layers is None else [pattern.format(i) for i in range(layers)]


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
