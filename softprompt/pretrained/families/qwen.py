"""Qwen2 and Qwen2.5 (biases before attention) and Qwen3 (normalised queries and keys)."""

from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family, Raw, only
from softprompt.pretrained.families.llama import ROTARY_BUFFERS, raw_sizes, sizes, table


def _shared(raw: Raw) -> dict[str, Any]:
    window = raw.get("sliding_window", 4096) if raw.get("use_sliding_window", False) else None
    first = raw.get("max_window_layers", 28)
    return {
        **sizes(raw),
        **base.rope(raw),
        "tied": raw.get("tie_word_embeddings", False),
        "activation": base.activation(raw, "hidden_act", "silu"),
        "windows": base.windows(
            {**raw, "sliding_window": window}, lambda n: bool(window) and n >= first
        ),
    }


def _qwen2(raw: Raw) -> DecoderConfig:
    return DecoderConfig(**_shared(raw), qkv_bias=True)


def _qwen3(raw: Raw) -> DecoderConfig:
    bias = only(raw, "attention_bias", False, True)
    return DecoderConfig(**_shared(raw), qk_norm=True, qkv_bias=bias, out_bias=bias)


def _raw(config: DecoderConfig) -> dict[str, Any]:
    windows = base.raw_windows(config)
    return {
        **raw_sizes(config),
        **base.raw_rope(config),
        "hidden_act": base.activation_name(config),
        "use_sliding_window": bool(windows),
        **windows,
    }


def _raw_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "qwen2", **_raw(config)}


def _raw_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "qwen3", **_raw(config), "attention_bias": config.qkv_bias}


QWEN2 = Family(_qwen2, table, _raw_qwen2, ROTARY_BUFFERS)
QWEN3 = Family(_qwen3, table, _raw_qwen3, ROTARY_BUFFERS)
