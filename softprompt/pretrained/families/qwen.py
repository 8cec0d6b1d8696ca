"""Qwen2 and 2.5 (biases of queries, keys and values) and Qwen3 (normalised queries and keys)."""

from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base, llama, rope
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.keys import Key, Raw, count, flag


def _keys(model_type: str, **keys: Key) -> dict[str, Key]:
    return llama.family_keys(
        model_type,
        hidden_act=base.activation("silu"),
        use_sliding_window=flag(False),
        sliding_window=count(4096, null=True),
        max_window_layers=count(28, least=0),
        layer_types=base.LAYER_TYPES,
        **keys,
    )


def _common_fields(values: Raw, found: Raw) -> dict[str, Any]:
    window = values["sliding_window"] if values["use_sliding_window"] else None
    first = values["max_window_layers"]
    windows = base.windows(
        {**values, "sliding_window": window}, lambda n: bool(window) and n >= first
    )
    return {**llama.common_fields(values, found), **rope.fields(values), "windows": windows}


def _qwen2(values: Raw, found: Raw) -> DecoderConfig:
    return DecoderConfig(**_common_fields(values, found), qkv_bias=True)


def _qwen3(values: Raw, found: Raw) -> DecoderConfig:
    bias = values["attention_bias"]
    return DecoderConfig(**_common_fields(values, found), qk_norm=True, out_bias=bias)


def _others(config: DecoderConfig) -> dict[str, Any]:
    windows = {"use_sliding_window": any(config.windows), **base.raw_windows(config)}
    return {**rope.raw_fields(config), **windows}


QWEN2 = Family(
    _keys("qwen2"),
    _qwen2,
    llama.table,
    _others,
    ignored_tensors=llama.ROTARY_BUFFERS,
    key_mapping=llama.BARE,
)
QWEN3 = Family(
    _keys("qwen3", attention_bias=flag(False, "qkv_bias")),
    _qwen3,
    llama.table,
    _others,
    ignored_tensors=llama.ROTARY_BUFFERS,
    key_mapping=llama.BARE,
)
