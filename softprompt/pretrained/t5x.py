"""T5X checkpoints, the format in which the LM-adapted T5s were released.

The folder of a step holds `checkpoint`, a msgpack file of the training state. Large arrays are
stored beside it as zarr folders (`target.encoder.layers_0.attention.query.kernel`), which the file
describes. Kernels are [in, out] with flattened heads, relative biases [H, buckets]. There is no
config: the sizes follow from the shapes.

Source: https://github.com/google-research/t5x, `checkpoints.py` (format version 3) and
`examples/t5/network.py`.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from flax.serialization import msgpack_restore

from softprompt.errors import UserError, one_line
from softprompt.models.shapes import ATTENTIONS
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.name_tables import Source, Table, encoder_decoder_table, input_major

# Stack -> its attentions and their norms, in the order of `ATTENTIONS`.
MODULES = {
    "encoder": (("attention", "pre_attention_layer_norm"),),
    "decoder": (
        ("self_attention", "pre_self_attention_layer_norm"),
        ("encoder_decoder_attention", "pre_cross_attention_layer_norm"),
    ),
}
PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}


def open_folder(folder: str) -> tuple[T5Config, Table, Source]:
    """The T5 of a checkpoint, the rules that fill its leaves, and its arrays; reads the index.

    Raises:
        UserError: no such checkpoint, or one that is not a T5's.
    """
    source = open_source(folder)
    config = read_config(source)
    return config, t5x_table(config), source


def t5x_table(config: T5Config) -> Table:
    """The rules that fill the leaves from the arrays of a checkpoint."""
    rules = encoder_decoder_table(config, _names(config))
    turned = [path for path in rules if path.endswith(("/kernel", "relative_bias/embedding"))]
    return rules | {path: input_major(rules[path]) for path in turned}


def _names(config: T5Config) -> dict[str, str]:
    """Path of a leaf -> name in the checkpoint's tree, `{}` for the layer."""
    names = {
        "embed/embedding": "token_embedder/embedding",
        "head/kernel": "decoder/logits_dense/kernel",
    }
    for stack, modules in MODULES.items():
        names[f"{stack}/relative_bias/embedding"] = f"{stack}/relpos_bias/rel_embedding"
        names[f"{stack}/final_norm/scale"] = f"{stack}/{stack}_norm/scale"
        layers, theirs = f"{stack}/layers", f"{stack}/layers_{{}}"
        for kind, (module, norm) in zip(ATTENTIONS[stack], modules, strict=True):
            names[f"{layers}/{kind}_norm/scale"] = f"{theirs}/{norm}/scale"
            for ours, projection in PROJECTIONS.items():
                names[f"{layers}/{kind}/{ours}/kernel"] = f"{theirs}/{module}/{projection}/kernel"
        names[f"{layers}/mlp_norm/scale"] = f"{theirs}/pre_mlp_layer_norm/scale"
        inner = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
        for leaf, module in (inner | {"down": "wo"}).items():
            names[f"{layers}/mlp/{leaf}/kernel"] = f"{theirs}/mlp/{module}/kernel"
    return names


def read_config(source: Source) -> T5Config:
    """The sizes of a T5, from the shapes of its arrays.

    Raises:
        UserError: an array that every T5 has is missing or has another rank.
    """

    def shape(name: str, rank: int = 2) -> tuple[int, ...]:
        found = source.tensors.get(name, ("", ()))[1]
        if len(found) != rank:
            raise UserError(f"{source.file}: no T5: {name} is not there as an array of rank {rank}")
        return found

    vocab, width = shape("token_embedder/embedding")
    heads, buckets = shape("encoder/relpos_bias/rel_embedding")
    gated = "encoder/layers_0/mlp/wi_0/kernel" in source.tensors
    return T5Config(
        vocab=vocab,
        width=width,
        encoder_layers=_layers(source, "encoder"),
        decoder_layers=_layers(source, "decoder"),
        heads=heads,
        head_size=shape("encoder/layers_0/attention/query/kernel")[1] // heads,
        ffn=shape("encoder/layers_0/mlp/wo/kernel")[0],
        gated=gated,
        activation="gelu_tanh" if gated else "relu",
        tied="decoder/logits_dense/kernel" not in source.tensors,
        buckets=buckets,
    )


def open_source(folder: str) -> Source:
    """The model's arrays in a checkpoint, without the optimizer's; reads only the index.

    Raises:
        UserError: no such folder, or no T5X checkpoint of version 3 in it.
    """
    store = _store(folder)
    try:
        index = ts.KvStore.open(store).result().read("checkpoint").result()
        content = msgpack_restore(index.value) if index.state == "value" else None
    except Exception as e:  # tensorstore's and msgpack's errors are of any type
        raise UserError(f"{folder}: no readable T5X checkpoint ({one_line(e)})") from e
    if content is None:
        raise UserError(
            f"{folder}: no file named checkpoint; name the folder of one step, "
            "such as gs://BUCKET/t5_1_1_lm100k_base/checkpoint_1100000"
        )
    target = content.get("optimizer", {}).get("target") if isinstance(content, dict) else None
    if not isinstance(target, dict) or content.get("version") != 3:
        raise UserError(f"{folder}: not a T5X checkpoint of format version 3")
    arrays = {name: _array(store, name, value) for name, value in _leaves(target)}

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        values = _read(folder, name, arrays[name])
        return values, values

    tensors = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    return Source(file=folder, tensors=tensors, read=read)


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the index: its values if the index holds them, else the store that does."""

    dtype: str
    shape: tuple[int, ...]
    values: np.ndarray | None = None
    store: Mapping[str, str] | None = None


def _store(folder: str) -> dict[str, str]:
    """The folder as a specification of tensorstore."""
    if match := re.fullmatch(r"gs://([^/]+)/(.+?)/*", folder):
        return {"driver": "gcs", "bucket": match[1], "path": f"{match[2]}/"}
    return {"driver": "file", "path": f"{folder.rstrip('/')}/"}


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of a tree's leaves. A dict with a driver is one: it describes an array."""
    for key, value in tree.items():
        if isinstance(value, dict) and "driver" not in value:
            yield from _leaves(value, f"{path}{key}/")
        else:
            yield f"{path}{key}", value


def _array(store: Mapping[str, str], name: str, value: Any) -> _Array:
    """An array from its entry in the index, whose path is relative and whose bucket is a dummy."""
    if isinstance(value, np.ndarray):
        return _Array(value.dtype.name, value.shape, values=value)
    try:
        path = value.get("path") or value["kvstore"]["path"]  # the former before tensorstore 0.1.14
        shape = tuple(value["metadata"]["shape"])
    except (AttributeError, KeyError, TypeError) as e:
        raise UserError(f"{store['path']}checkpoint: {name} is neither array nor zarr spec") from e
    where = dict(store) | {"path": f"{store['path']}{path.strip('/')}/"}
    return _Array(str(value.get("dtype", "")), shape, store=where)


def _read(folder: str, name: str, array: _Array) -> np.ndarray:
    if array.values is not None:
        return array.values
    try:
        opened = ts.open({"driver": "zarr", "kvstore": array.store}, open=True).result()
        values = opened.read().result()
    except Exception as e:  # tensorstore raises ValueError and OSError of many kinds
        raise UserError(f"{folder}: array {name} is not readable ({one_line(e)})") from e
    if values.shape != array.shape:
        raise UserError(f"{folder}: array {name} is {values.shape}, in the index {array.shape}")
    return values


def _layers(source: Source, stack: str) -> int:
    found = (re.match(rf"{stack}/layers_(\d+)/", name) for name in source.tensors)
    return 1 + max((int(match[1]) for match in found if match), default=-1)
