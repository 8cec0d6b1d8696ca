"""Gemma 1, 2 and 3 (text).

Their norms multiply by 1 + w; the 1 is added when w is read. Embeddings are scaled by the root of
the width.
"""

import dataclasses
from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families.base import (
    ACTIVATIONS,
    LAYER_TYPES,
    NAMED,
    Family,
    activation,
    decoder_keys,
    raw_windows,
    windows,
)
from softprompt.pretrained.families.keys import (
    IGNORED,
    Key,
    Raw,
    count,
    flag,
    number,
    one_of,
    read_keys,
    refuse,
    section,
)
from softprompt.pretrained.families.llama import (
    BARE,
    NAMES,
    ROTARY_BUFFERS,
    llama_keys,
    raw_sizes,
    sizes,
)
from softprompt.pretrained.families.rope import raw_rope, read_section, rope, rope_scaling
from softprompt.pretrained.name_tables import Table, decoder_table

SANDWICH = {
    **NAMES,
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}


def _keys(model_type: str, **keys: Key) -> dict[str, Key]:
    return llama_keys(
        model_type,
        attention_bias=flag(False),
        use_bidirectional_attention=one_of(None, False),
        **keys,
    ) | {"tie_word_embeddings": flag(True)}


def _sandwich_keys(model_type: str, **keys: Key) -> dict[str, Key]:
    """The keys that Gemma 2 and 3 share."""
    return _keys(
        model_type,
        hidden_activation=activation("gelu_pytorch_tanh"),
        query_pre_attn_scalar=number(256),
        sliding_window=count(4096, null=True),
        layer_types=LAYER_TYPES,
        **keys,
    )


def table(config: DecoderConfig) -> Table:
    """Llama's names, except for the norms around attention and feed-forward."""
    rules = decoder_table(config, SANDWICH if config.norms == "both" else NAMES)
    for path, rule in rules.items():
        if path.endswith("/scale"):
            rules[path] = dataclasses.replace(rule, offset=1.0)
    return rules


def _shared(values: Raw) -> dict[str, Any]:
    return {
        **sizes(values),
        "embed_scale": values["hidden_size"] ** 0.5,
        "qkv_bias": values["attention_bias"],
        "out_bias": values["attention_bias"],
    }


def _sandwich(values: Raw) -> dict[str, Any]:
    return {
        **_shared(values),
        "norms": "both",
        "activation": ACTIVATIONS[values["hidden_activation"]],
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
        "final_softcap": values["final_logit_softcapping"] or 0.0,
    }


def _gemma(values: Raw) -> DecoderConfig:
    act = values["hidden_act"]
    act = "gelu_tanh" if act == "gelu" else ACTIVATIONS[act]  # an old way to say tanh
    return DecoderConfig(**_shared(values), **rope(values), activation=act)


def _gemma2(values: Raw) -> DecoderConfig:
    return DecoderConfig(
        **_sandwich(values),
        **rope(values),
        attn_softcap=values["attn_logit_softcapping"] or 0.0,
        windows=windows(values, lambda n: n % 2 == 0),
    )


def _gemma3(values: Raw) -> DecoderConfig:
    pattern, said = values["sliding_window_pattern"], values["_sliding_window_pattern"]
    if values["layer_types"] is None and said not in (None, pattern):
        raise refuse("_sliding_window_pattern", said, pattern)  # transformers does not read it
    return DecoderConfig(
        **_sandwich(values),
        **_two_ropes(values),
        qk_norm=True,
        windows=windows(values, lambda n: (n + 1) % pattern > 0),
    )


def _two_ropes(values: Raw) -> dict[str, Any]:
    """Rotary positions of layers without and with a window, from a config of either generation."""
    given = read_keys(
        values["rope_parameters"] or {},
        {"full_attention": section(), "sliding_attention": section()},
        prefix="rope_parameters.",
    )
    plain = {"rope_type": "default"}  # "type", the old word for it, does not override this
    whole = {**plain, **(given["full_attention"] or {}), **(values["rope_scaling"] or {})}
    if not whole.get("truncate", True):  # transformers looks for it elsewhere
        raise refuse("truncate", whole["truncate"], True)
    whole = read_section(whole, "rope_parameters.full_attention")
    local = read_section(
        given["sliding_attention"] or {}, "rope_parameters.sliding_attention", kinds=["default"]
    )
    for found in (whole, local):
        if found["partial_rotary_factor"] not in (1.0, None):
            raise refuse("partial_rotary_factor", found["partial_rotary_factor"], 1.0)
    return {
        "rope_base": float(whole["rope_theta"] or values["rope_theta"] or 1e6),
        "rope_base_local": float(local["rope_theta"] or values["rope_local_base_freq"]),
        "rope_scaling": rope_scaling(whole, values),
    }


def _gemma3_with_images(values: Raw) -> DecoderConfig:
    """The text part alone; without an image it is a Gemma 3 whose logits are not capped."""
    text = read_keys(
        values["text_config"] or {},
        GEMMA3.keys,
        ignored=IGNORED | GEMMA3.ignored,
        prefix="text_config.",
    )
    return dataclasses.replace(_gemma3(text), final_softcap=0.0, tied=values["tie_word_embeddings"])


def _raw(config: DecoderConfig) -> dict[str, Any]:
    return {**raw_sizes(config), **raw_rope(config), "attention_bias": config.qkv_bias}


def _raw_gemma(config: DecoderConfig) -> dict[str, Any]:
    return {"model_type": "gemma", **_raw(config), "hidden_act": NAMED[config.activation]}


def _raw_sandwich(config: DecoderConfig) -> dict[str, Any]:
    scalar = round(config.query_scale**-2, 9) if config.query_scale else config.head_size
    return {
        **_raw(config),
        **raw_windows(config),
        "hidden_activation": NAMED[config.activation],
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "final_logit_softcapping": config.final_softcap or None,
    }


def _raw_gemma2(config: DecoderConfig) -> dict[str, Any]:
    softcap = {"attn_logit_softcapping": config.attn_softcap or None}
    return {"model_type": "gemma2", **_raw_sandwich(config), **softcap}


def _raw_gemma3(config: DecoderConfig) -> dict[str, Any]:
    local = {"rope_local_base_freq": config.rope_base_local}
    return {"model_type": "gemma3_text", **_raw_sandwich(config), **local}


GEMMA = Family(
    _keys("gemma", hidden_act=activation("gelu_pytorch_tanh")),
    _gemma,
    table,
    _raw_gemma,
    ignored=frozenset({"hidden_activation"}),
    harmless=ROTARY_BUFFERS,
    spellings=BARE,
)
GEMMA2 = Family(
    _sandwich_keys(
        "gemma2",
        attn_logit_softcapping=number(50.0, null=True),
        final_logit_softcapping=number(30.0, null=True),
    ),
    _gemma2,
    table,
    _raw_gemma2,
    ignored=frozenset({"hidden_act"}),
    harmless=ROTARY_BUFFERS,
    spellings=BARE,
)
GEMMA3 = Family(
    _sandwich_keys(
        "gemma3_text",
        attn_logit_softcapping=one_of(None),
        final_logit_softcapping=number(None),
        rope_local_base_freq=number(1e4),
        sliding_window_pattern=count(6),
        _sliding_window_pattern=count(None),
    ),
    _gemma3,
    table,
    _raw_gemma3,
    ignored=frozenset({"hidden_act"}),
    harmless=ROTARY_BUFFERS,
    spellings=BARE,
)
GEMMA3_WITH_IMAGES = Family(
    decoder_keys("gemma3", text_config=section(), tie_word_embeddings=flag(True)),
    _gemma3_with_images,
    table,
    lambda config: {"model_type": "gemma3", "text_config": _raw_gemma3(config)},
    ignored=frozenset(
        {
            "vision_config",
            "mm_tokens_per_image",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
        }
    ),
    harmless=rf"{ROTARY_BUFFERS}|(model\.)?(vision_tower|multi_modal_projector)\..*",
    spellings=(
        (r"language_model\.model\.", "model."),
        (r"model\.language_model\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
    ),
)
