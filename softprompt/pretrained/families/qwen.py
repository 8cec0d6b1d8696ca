"""Qwen2 and 2.5 (biases of queries, keys and values) and Qwen3 (normalised queries and keys)."""

from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families.base import (
    ACTIVATIONS,
    LAYER_TYPES,
    NAMED,
    Family,
    activation,
    raw_windows,
    windows,
)
from softprompt.pretrained.families.keys import Key, Raw, count, flag
from softprompt.pretrained.families.llama import (
    BARE,
    ROTARY_BUFFERS,
    llama_keys,
    raw_sizes,
    sizes,
    table,
)
from softprompt.pretrained.families.rope import raw_rope, rope


def _keys(model_type: str, **keys: Key) -> dict[str, Key]:
    return llama_keys(
        model_type,
        hidden_act=activation("silu"),
        use_sliding_window=flag(False),
        sliding_window=count(4096, null=True),
        max_window_layers=count(28, least=0),
        layer_types=LAYER_TYPES,
        **keys,
    )


def _shared(values: Raw) -> dict[str, Any]:
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    return {
        **sizes(values),
        **rope(values),
        "activation": ACTIVATIONS[values["hidden_act"]],
        "windows": windows(
            {**values, "sliding_window": window}, lambda n: bool(window) and n >= first
        ),
    }


def _qwen2(values: Raw) -> DecoderConfig:
    return DecoderConfig(**_shared(values), qkv_bias=True)


def _qwen3(values: Raw) -> DecoderConfig:
    bias = values["attention_bias"]
    return DecoderConfig(**_shared(values), qk_norm=True, qkv_bias=bias, out_bias=bias)


def _raw(config: DecoderConfig) -> dict[str, Any]:
    return {
        **raw_sizes(config),
        **raw_rope(config),
        "hidden_act": NAMED[config.activation],
        "use_sliding_window": any(config.windows),
        **raw_windows(config),
    }


def _raw_qwen2(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "qwen2", **_raw(config)}


def _raw_qwen3(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "qwen3", **_raw(config), "attention_bias": config.qkv_bias}


QWEN2 = Family(_keys("qwen2"), _qwen2, table, _raw_qwen2, harmless=ROTARY_BUFFERS, spellings=BARE)
QWEN3 = Family(
    _keys("qwen3", attention_bias=flag(False)),
    _qwen3,
    table,
    _raw_qwen3,
    harmless=ROTARY_BUFFERS,
    spellings=BARE,
)
