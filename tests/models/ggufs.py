"""Writes the tiny random Llama of tests/tiny.py as a GGUF file, as llama.cpp's converter does."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from softprompt.models import gguf as ours
from softprompt.models.decoder import DecoderConfig
from softprompt.models.families import llama
from tests.tiny import tiny_config, tiny_tensors, tiny_tokenizer

Quant = gguf.GGMLQuantizationType


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Source: `permute` in llama.cpp's convert_hf_to_gguf.py."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    quant: Quant = Quant.F32,
    architecture: str = "llama",
    metadata: Mapping[str, Any] | None = None,
    without: str = "",
    extra: Mapping[str, np.ndarray] | None = None,
    pre: str = "smollm",
    tokenizer_model: str = "gpt2",
    kinds: Mapping[str, int] | None = None,
    extra_merge: str = "",
    **sizes: Any,
) -> Path:
    """Writes a complete file; each option spoils or varies one thing.

    Args:
        path: where to.
        seed: of the weights, as in `write_llama_folder`.
        quant: type of the matrices; norms stay float32.
        architecture: general.architecture.
        metadata: further metadata.
        without: a metadata key to leave out.
        extra: further tensors.
        pre: tokenizer.ggml.pre.
        tokenizer_model: tokenizer.ggml.model.
        kinds: types of the special tokens; CONTROL by default.
        extra_merge: one more merge.
        **sizes: those of `tiny_config`.
    """
    config = tiny_config(**sizes)
    writer = gguf.GGUFWriter(path, architecture)
    fields = {**_sizes(config), **(metadata or {})}
    for key, value in fields.items():
        if key != without:
            _add(writer, key, value)
    _add_tokenizer(writer, config, pre, tokenizer_model, kinds or {}, extra_merge)
    for name, tensor in {**_tensors(config, seed), **(extra or {})}.items():
        kind = quant if tensor.ndim == 2 else Quant.F32
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _sizes(config: DecoderConfig) -> dict[str, Any]:
    return {
        "llama.vocab_size": config.vocab,
        "llama.block_count": config.layers,
        "llama.context_length": config.context_length,
        "llama.embedding_length": config.width,
        "llama.feed_forward_length": config.ffn,
        "llama.attention.head_count": config.heads,
        "llama.attention.head_count_kv": config.kv_heads,
        "llama.attention.key_length": config.head_size,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
        "llama.rope.dimension_count": config.head_size,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[type(value)](key, value)


def _add_tokenizer(
    writer: gguf.GGUFWriter,
    config: DecoderConfig,
    pre: str,
    model: str,
    kinds: Mapping[str, int],
    extra_merge: str,
) -> None:
    state = json.loads(tiny_tokenizer(config.vocab).to_str())
    special = {token["content"] for token in state["added_tokens"]}
    vocab = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    normal, control = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocab)
    writer.add_token_types([kinds.get(t, control) if t in special else normal for t in vocab])
    writer.add_token_merges(merges + ([extra_merge] if extra_merge else []))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)


def _tensors(config: DecoderConfig, seed: int) -> dict[str, np.ndarray]:
    values = tiny_tensors(config, seed)
    heads = {"layers/attn/q/kernel": config.heads, "layers/attn/k/kernel": config.kv_heads}
    tensors = {}
    names = ours.table(config)
    for path, part in llama.table(config).items():
        for layer in range(config.layers if "{}" in part.name else 1):
            tensor = values[part.name.format(layer)].astype(np.float32)
            if path in heads:
                tensor = permute(tensor, heads[path])
            tensors[names[path].name.format(layer)] = tensor
    return tensors
