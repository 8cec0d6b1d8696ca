"""Writes T5X checkpoints as published, from tensors under their Hugging Face names.

The names are those of the public conversion script of transformers, read backwards; nothing of the
loader is used.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from flax import serialization, traverse_util

PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "out"}
SUBLAYERS = {
    "encoder": ["attention", "mlp"],
    "decoder": ["self_attention", "cross_attention", "mlp"],
}
WHOLE = {
    "shared.weight": "token_embedder/embedding",
    "lm_head.weight": "decoder/logits_dense/kernel",
}


def t5x_name(name: str) -> str:
    """A Hugging Face name as T5X has it."""
    if name in WHOLE:
        return WHOLE[name]
    stack, _, rest = name.partition(".")
    if "relative_attention_bias" in rest:
        return f"{stack}/relpos_bias/rel_embedding"
    if rest == "final_layer_norm.weight":
        return f"{stack}/{stack}_norm/scale"
    match = re.fullmatch(r"block\.(\d+)\.layer\.(\d)\.(.+)\.weight", rest)
    assert match, name
    layer, kind = f"{stack}/layers_{match[1]}", SUBLAYERS[stack][int(match[2])]
    if match[3] == "layer_norm":
        return f"{layer}/pre_{kind}_layer_norm/scale"
    module, projection = match[3].split(".")
    if module == "DenseReluDense":
        return f"{layer}/mlp/{projection}/kernel"
    theirs = "encoder_decoder_attention" if module == "EncDecAttention" else kind
    return f"{layer}/{theirs}/{PROJECTIONS[projection]}/kernel"


def write_t5x(folder: Path, tensors: dict[str, np.ndarray], *, bucket: bool = False) -> Path:
    """Writes the checkpoint; scales lie in the index itself. `bucket`: as if it came from gs://."""
    target: dict[str, Any] = {}
    for name, x in tensors.items():
        theirs = t5x_name(name)
        x = np.ascontiguousarray(x if theirs.startswith("token_embedder") else x.T)
        target[theirs] = x if theirs.endswith("scale") else _zarr(folder, theirs, x, bucket)
    moments = {"token_embedder": {"embedding": {"v": np.zeros(3, np.float32), "m": None}}}
    state = {"target": traverse_util.unflatten_dict(target, sep="/")}
    state["state"] = {"step": np.int32(1100000), "param_states": moments}
    content = {"version": 3, "optimizer": state}
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(content))
    return folder


def _zarr(folder: Path, name: str, x: np.ndarray, bucket: bool) -> dict[str, Any]:
    """Writes an array beside the index, in several chunks, and returns its description."""
    path = "target." + name.replace("/", ".")
    metadata = {
        "compressor": {"id": "gzip"},
        "shape": list(x.shape),
        "chunks": [-(-n // 2) for n in x.shape],
    }
    where = {"driver": "file", "path": f"{folder}/{path}"}
    spec = {"driver": "zarr", "dtype": x.dtype.name, "metadata": metadata}
    ts.open(spec | {"kvstore": where}, create=True).result().write(x).result()
    dummy = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
    kvstore = dummy if bucket else {"driver": "file"}
    return ts.Spec(spec | {"kvstore": kvstore | {"path": path}}).to_json()
