"""Gemma 1, 2 and 3 (text).

Their norms multiply by 1 + w: the 1 is added when w is read. Their embeddings are scaled by the
root of the width.
"""

import dataclasses
from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family, Raw, only, refuse
from softprompt.pretrained.families.llama import NAMES, ROTARY_BUFFERS, raw_sizes, sizes
from softprompt.pretrained.name_tables import Table, decoder_table

SANDWICH = {
    **NAMES,
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}
TANH = ("gelu_pytorch_tanh", "gelu", "gelu_new", "gelu_fast")  # "gelu" is an old way to say tanh


def table(config: DecoderConfig) -> Table:
    """Llama's names, but for the norms around attention and feed-forward."""
    rules = decoder_table(config, SANDWICH if config.norms == "both" else NAMES)
    for path, rule in rules.items():
        if path.endswith("/scale"):
            rules[path] = dataclasses.replace(rule, offset=1.0)
    return rules


def _shared(raw: Raw) -> dict[str, Any]:
    bias = only(raw, "attention_bias", False, True)
    only(raw, "use_bidirectional_attention", None, False)
    return {
        **sizes(raw),
        "tied": raw.get("tie_word_embeddings", True),
        "embed_scale": raw["hidden_size"] ** 0.5,
        "activation": "gelu_tanh",
        "qkv_bias": bias,
        "out_bias": bias,
    }


def _gemma(raw: Raw) -> DecoderConfig:
    only(raw, "hidden_act", *TANH)
    return DecoderConfig(**_shared(raw), **base.rope(raw))


def _gemma2(raw: Raw) -> DecoderConfig:
    only(raw, "hidden_activation", *TANH[:1], *TANH[2:])
    return DecoderConfig(
        **_shared(raw),
        **base.rope(raw),
        norms="both",
        query_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5,
        attn_softcap=raw.get("attn_logit_softcapping", 50.0) or 0.0,
        final_softcap=raw.get("final_logit_softcapping", 30.0) or 0.0,
        windows=base.windows({"sliding_window": 4096, **raw}, lambda n: n % 2 == 0),
    )


def _gemma3(raw: Raw) -> DecoderConfig:
    only(raw, "hidden_activation", *TANH[:1], *TANH[2:])
    only(raw, "attn_logit_softcapping", None)
    pattern = raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or 6
    return DecoderConfig(
        **_shared(raw),
        **_two_ropes(raw),
        norms="both",
        qk_norm=True,
        query_scale=raw.get("query_pre_attn_scalar", 256) ** -0.5,
        final_softcap=raw.get("final_logit_softcapping") or 0.0,
        windows=base.windows({"sliding_window": 4096, **raw}, lambda n: (n + 1) % pattern > 0),
    )


def _two_ropes(raw: Raw) -> dict[str, Any]:
    """Rotary bases of layers without and with a window, from a config of either generation."""
    ropes = raw.get("rope_parameters") or {}
    whole = ropes.get("full_attention") or {
        **(raw.get("rope_scaling") or {}),
        "rope_theta": raw.get("rope_theta", 1e6),
    }
    local = ropes.get("sliding_attention") or {"rope_theta": raw.get("rope_local_base_freq", 1e4)}
    if base.rope_scaling(local) is not None:
        raise refuse("rope_type of sliding_attention", local["rope_type"], "default")
    return {
        **base.rope({"rope_parameters": whole}, base=1e6),
        "rope_base_local": float(local.get("rope_theta", 1e4)),
    }


# What the config of a model that sees images leaves out of its text rule.
# Source: `Gemma3TextConfig` of transformers.
_TEXT_DEFAULTS: Raw = {
    "vocab_size": 262_208,
    "hidden_size": 2304,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "intermediate_size": 9216,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
}


def _gemma3_with_images(raw: Raw) -> DecoderConfig:
    """The text part alone; without an image it is a Gemma 3 like any other."""
    return _gemma3({**_TEXT_DEFAULTS, **raw["text_config"]})


def _raw(config: DecoderConfig) -> dict[str, Any]:
    return {**raw_sizes(config), **base.raw_rope(config), "attention_bias": config.qkv_bias}


def _raw_gemma(config: DecoderConfig) -> dict[str, Any]:
    act = "gelu_pytorch_tanh"
    return {"model_type": "gemma", **_raw(config), "hidden_act": act, "hidden_activation": act}


def _raw_sandwich(config: DecoderConfig) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    scalar = round(config.query_scale**-2, 9) if config.query_scale else config.head_size
    return {
        **_raw(config),
        **base.raw_windows(config),
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attn_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
    }


def _raw_gemma2(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "gemma2", **_raw_sandwich(config)}


def _raw_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = {"rope_local_base_freq": config.rope_base_local}
    return {"model_type": "gemma3_text", **_raw_sandwich(config), **local}


GEMMA = Family(_gemma, table, _raw_gemma, ROTARY_BUFFERS)
GEMMA2 = Family(_gemma2, table, _raw_gemma2, ROTARY_BUFFERS)
GEMMA3 = Family(_gemma3, table, _raw_gemma3, ROTARY_BUFFERS)
GEMMA3_WITH_IMAGES = Family(
    _gemma3_with_images,
    table,
    lambda config: {"model_type": "gemma3", "text_config": _raw_gemma3(config)},
    rf"{ROTARY_BUFFERS}|(model\.)?(vision_tower|multi_modal_projector)\..*",
    spellings=(
        (r"language_model\.model\.", "model."),
        (r"model\.language_model\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
    ),
)
