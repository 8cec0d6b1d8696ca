"""Writes tiny random models as GGUF files, as llama.cpp's converter does.

Names of tensors and keys come from the package `gguf`, whose tables that converter uses.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from tests.tiny import hf_config, tiny_config, tiny_tensors, tiny_tokenizer

Quant = gguf.GGMLQuantizationType
Types = gguf.TokenType

# model_type of config.json -> architecture of a GGUF file.
ARCHITECTURES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3_text": gguf.MODEL_ARCH.GEMMA3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
    "t5": gguf.MODEL_ARCH.T5,
}


# Variants of tests/families.py, with what a GGUF file cannot say otherwise: how Gemma scales its
# queries, which layers have a window, the rotary base of these.
LLAMA3 = {
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
}
CASES = {
    "llama": {},
    "llama-biases": {},
    "llama-linear": {},
    "llama3": {**LLAMA3, "rope_theta": 500000.0},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 20, "attn_logit_softcapping": 50.0, "rope_theta": 10000.0},
    "gemma3": {
        "query_pre_attn_scalar": 20,
        "num_hidden_layers": 8,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
    },
    "gemma3-scaled": {
        "query_pre_attn_scalar": 20,
        "num_hidden_layers": 8,
        "sliding_window_pattern": 6,
        "rope_local_base_freq": 10000.0,
    },
    "gpt2": {},
}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Source: `permute` in llama.cpp's convert_hf_to_gguf.py."""
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    *,
    seed: int = 0,
    quant: Quant = Quant.F32,
    architecture: str = "",
    model: tuple[Mapping[str, Any], Mapping[str, np.ndarray]] | None = None,
    metadata: Mapping[str, Any] | None = None,
    without: str = "",
    extra: Mapping[str, np.ndarray] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
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
        quant: type of the matrices; the rest stays float32.
        architecture: general.architecture, where it is not that of the model.
        model: content of config.json and tensors of a Hugging Face folder, instead of the tiny
            Llama of `sizes`.
        metadata: further metadata.
        without: a metadata key to leave out.
        extra: further tensors.
        tokenizer: the tokenizer's metadata, without "tokenizer.ggml.", instead of the tiny one.
        pre: tokenizer.ggml.pre.
        tokenizer_model: tokenizer.ggml.model.
        kinds: types of the special tokens; CONTROL by default.
        extra_merge: one more merge.
        **sizes: those of `tiny_config`.
    """
    if model is None:
        config = tiny_config(**sizes)
        model = hf_config(config), tiny_tensors(config, seed)
    raw, stored = model
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCHITECTURES[raw["model_type"]]])
    _add_sizes(writer, raw)
    tokens = tokenizer or _tokens(raw, pre, tokenizer_model, kinds or {}, extra_merge)
    fields = {f"tokenizer.ggml.{key}": value for key, value in tokens.items()} | (metadata or {})
    for key, value in fields.items():
        writer.kv_data[0].pop(key, None)
        _add(writer, key, value)
    writer.kv_data[0].pop(without, None)
    if architecture:
        writer.kv_data[0]["general.architecture"].value = architecture
    for name, tensor in {**_tensors(raw, stored), **(extra or {})}.items():
        kind = quant if tensor.ndim == 2 and "rel_b" not in name else Quant.F32
        tensor = np.ascontiguousarray(tensor, np.float32)
        writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_sizes(writer: gguf.GGUFWriter, raw: Mapping[str, Any]) -> None:
    def first(*keys: str) -> Any:
        return next((raw[key] for key in keys if raw.get(key) is not None), None)

    writer.add_vocab_size(raw["vocab_size"])
    writer.add_context_length(first("max_position_embeddings", "n_positions"))
    width, heads = first("hidden_size", "n_embd", "d_model"), first("num_attention_heads", "n_head")
    writer.add_embedding_length(width)
    writer.add_block_count(first("num_hidden_layers", "n_layer", "num_layers"))
    writer.add_feed_forward_length(first("intermediate_size", "n_inner", "d_ff") or 4 * width)
    writer.add_head_count(heads or raw["num_heads"])
    if raw["model_type"] == "gpt2":
        writer.add_layer_norm_eps(raw["layer_norm_epsilon"])
        return
    writer.add_layer_norm_rms_eps(first("rms_norm_eps", "layer_norm_epsilon"))
    writer.add_key_length(first("head_dim", "d_kv") or width // heads)
    if raw["model_type"] == "t5":
        writer.add_decoder_block_count(raw["num_decoder_layers"])
        writer.add_relative_attn_buckets_count(raw["relative_attention_num_buckets"])
        return
    writer.add_head_count_kv(raw["num_key_value_heads"])
    if raw["model_type"] == "llama":
        writer.add_rope_dimension_count(first("head_dim") or width // heads)
    if raw["model_type"] != "gemma2":
        writer.add_rope_freq_base(raw["rope_theta"])
    if (scaling := raw.get("rope_scaling")) and "linear" in scaling.values():
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling["factor"])
    if raw["model_type"] in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(raw["sliding_window"])
    if cap := raw.get("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(cap)
    if cap := raw.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(cap)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


def _tokens(
    raw: Mapping[str, Any], pre: str, model: str, kinds: Mapping[str, int], extra_merge: str
) -> dict[str, Any]:
    """The tiny tokenizer; what the model embeds beyond it is padding, as the converter has it."""
    state = json.loads(tiny_tokenizer(min(raw["vocab_size"], 320)).to_str())
    special = {token["content"] for token in state["added_tokens"]}
    vocab = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    types = [int(kinds.get(t, Types.CONTROL) if t in special else Types.NORMAL) for t in vocab]
    padding = [f"[PAD{i}]" for i in range(len(vocab), raw["vocab_size"])]
    merges = [" ".join(pair) for pair in state["model"]["merges"]]
    return {
        "model": model,
        "pre": pre,
        "tokens": vocab + padding,
        "token_type": types + [int(Types.UNUSED)] * len(padding),
        "merges": merges + ([extra_merge] if extra_merge else []),
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _tensors(raw: Mapping[str, Any], stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the converter's names and in its layouts."""
    kind = raw["model_type"]
    layers = raw.get("num_hidden_layers") or raw.get("n_layer") or raw["num_layers"]
    names = gguf.get_tensor_name_map(ARCHITECTURES[kind], layers)
    tensors = {}
    for name, tensor in stored.items():
        if kind == "llama" and name.split(".")[-2] == "q_proj":
            tensor = permute(tensor, raw["num_attention_heads"])
        if kind == "llama" and name.split(".")[-2] == "k_proj":
            tensor = permute(tensor, raw["num_key_value_heads"])
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            tensor = tensor.astype(np.float32) + 1
        if kind == "gpt2" and name.split(".")[-2] in ("c_attn", "c_proj", "c_fc"):
            tensor = tensor.T
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        tensors[theirs] = tensor
    if (raw.get("rope_scaling") or {}).get("rope_type") == "llama3":
        tensors["rope_freqs.weight"] = _rope_factors(raw)
    return tensors


def _rope_factors(raw: Mapping[str, Any]) -> np.ndarray:
    """What Llama 3's frequencies are divided by."""
    scaling, size = raw["rope_scaling"], raw["head_dim"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    factors = []
    for i in range(0, size, 2):
        length = 2 * math.pi * raw["rope_theta"] ** (i / size)
        turns = scaling["original_max_position_embeddings"] / length
        smooth = min(max((turns - low) / (high - low), 0), 1)
        factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.array(factors, np.float32)
