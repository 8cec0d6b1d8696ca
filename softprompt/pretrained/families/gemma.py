"""Gemma 1, 2 and 3 (text).

Their norms multiply by 1 + w; the 1 is added when w is read. Embeddings are scaled by the root of
the width.
"""

import dataclasses
from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base, llama, rope
from softprompt.pretrained.families import keys as json_keys
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.keys import Key, Raw, count, flag, number, one_of, refuse
from softprompt.pretrained.families.llama import BARE, NAMES, ROTARY_BUFFERS
from softprompt.pretrained.name_tables import Table, decoder_table

SANDWICH = {
    **NAMES,
    "layers/attn_post_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp_norm": "model.layers.{}.pre_feedforward_layernorm",
    "layers/mlp_post_norm": "model.layers.{}.post_feedforward_layernorm",
}


def _keys(model_type: str, **keys: Key) -> dict[str, Key]:
    bias = flag(False, "qkv_bias")
    causal = one_of(None, False)
    found = llama.family_keys(
        model_type, attention_bias=bias, use_bidirectional_attention=causal, **keys
    )
    return found | {"tie_word_embeddings": flag(True, "tied")}


def _sandwich_keys(model_type: str, **keys: Key) -> dict[str, Key]:
    """The keys that Gemma 2 and 3 share."""
    return _keys(
        model_type,
        hidden_activation=base.activation("gelu_pytorch_tanh"),
        query_pre_attn_scalar=number(256),
        sliding_window=count(4096, null=True),
        layer_types=base.LAYER_TYPES,
        **keys,
    )


def table(config: DecoderConfig) -> Table:
    """Llama's names, except for the norms around attention and feed-forward."""
    rules = decoder_table(config, SANDWICH if config.norms == "both" else NAMES)
    for path, rule in rules.items():
        if path.endswith("/scale"):
            rules[path] = dataclasses.replace(rule, offset=1.0)
    return rules


def _common_fields(values: Raw, found: Raw) -> dict[str, Any]:
    scale, bias = values["hidden_size"] ** 0.5, values["attention_bias"]
    return {**llama.common_fields(values, found), "embed_scale": scale, "out_bias": bias}


def _sandwich(values: Raw, found: Raw) -> dict[str, Any]:
    return {
        **_common_fields(values, found),
        "norms": "both",
        "query_scale": values["query_pre_attn_scalar"] ** -0.5,
        "attn_softcap": values["attn_logit_softcapping"] or 0.0,
        "final_softcap": values["final_logit_softcapping"] or 0.0,
    }


def _gemma(values: Raw, found: Raw) -> DecoderConfig:
    fields = _common_fields(values, found) | rope.fields(values)
    if values["hidden_act"] == "gelu":  # an old way to say tanh
        fields["activation"] = "gelu_tanh"
    return DecoderConfig(**fields)


def _gemma2(values: Raw, found: Raw) -> DecoderConfig:
    windows = base.windows(values, lambda n: n % 2 == 0)
    return DecoderConfig(**_sandwich(values, found), **rope.fields(values), windows=windows)


def _gemma3(values: Raw, found: Raw) -> DecoderConfig:
    pattern, said = values["sliding_window_pattern"], values["_sliding_window_pattern"]
    if values["layer_types"] is None and said not in (None, pattern):
        raise refuse("_sliding_window_pattern", said, pattern)  # transformers does not read it
    windows = base.windows(values, lambda n: (n + 1) % pattern > 0)
    fields = _sandwich(values, found) | _two_ropes(values)
    return DecoderConfig(**fields, qk_norm=True, windows=windows)


def _two_ropes(values: Raw) -> dict[str, Any]:
    """Rotary positions of layers without and with a window, from a config of either generation."""
    given = json_keys.read_keys(
        values["rope_parameters"] or {},
        {f"{kind}_attention": json_keys.section() for kind in ("full", "sliding")},
        prefix="rope_parameters.",
    )
    plain = {"rope_type": "default"}  # "type", the old word for it, does not override this
    whole = {**plain, **(given["full_attention"] or {}), **(values["rope_scaling"] or {})}
    if not whole.get("truncate", True):  # transformers looks for it elsewhere
        raise refuse("truncate", whole["truncate"], True)
    whole = rope.read_section(whole, "rope_parameters.full_attention")
    local = rope.read_section(
        given["sliding_attention"] or {}, "rope_parameters.sliding_attention", kinds=["default"]
    )
    for found in (whole, local):
        if found["partial_rotary_factor"] not in (1.0, None):
            raise refuse("partial_rotary_factor", found["partial_rotary_factor"], 1.0)
    return {
        "rope_base": float(whole["rope_theta"] or values["rope_theta"] or 1e6),
        "rope_base_local": float(local["rope_theta"] or values["rope_local_base_freq"]),
        "rope_scaling": rope.scaling(whole, values),
    }


def _gemma3_with_images(values: Raw, found: Raw) -> DecoderConfig:
    """The text part alone; without an image it is a Gemma 3 whose logits are not capped."""
    text = json_keys.read_keys(
        values["text_config"] or {},
        GEMMA3.keys,
        ignored=json_keys.IGNORED | GEMMA3.ignored,
        prefix="text_config.",
    )
    config = GEMMA3.read(text)
    return dataclasses.replace(config, final_softcap=0.0, tied=values["tie_word_embeddings"])


def _sandwich_others(config: DecoderConfig) -> dict[str, Any]:
    scalar = round(config.query_scale**-2, 9) if config.query_scale else config.head_size
    return {
        **rope.raw_fields(config),
        **base.raw_windows(config),
        "query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar,
        "attn_logit_softcapping": config.attn_softcap or None,
        "final_logit_softcapping": config.final_softcap or None,
    }


GEMMA = Family(
    _keys("gemma", hidden_act=base.activation("gelu_pytorch_tanh")),
    _gemma,
    table,
    rope.raw_fields,
    ignored=frozenset({"hidden_activation"}),
    ignored_tensors=ROTARY_BUFFERS,
    key_mapping=BARE,
)
GEMMA2 = Family(
    _sandwich_keys(
        "gemma2",
        attn_logit_softcapping=number(50.0, null=True),
        final_logit_softcapping=number(30.0, null=True),
    ),
    _gemma2,
    table,
    _sandwich_others,
    ignored=frozenset({"hidden_act"}),
    ignored_tensors=ROTARY_BUFFERS,
    key_mapping=BARE,
)
GEMMA3 = Family(
    _sandwich_keys(
        "gemma3_text",
        attn_logit_softcapping=one_of(None),
        final_logit_softcapping=number(None),
        rope_local_base_freq=number(1e4, "rope_base_local"),
        sliding_window_pattern=count(6),
        _sliding_window_pattern=count(None),
    ),
    _gemma3,
    table,
    _sandwich_others,
    ignored=frozenset({"hidden_act"}),
    ignored_tensors=ROTARY_BUFFERS,
    key_mapping=BARE,
)
GEMMA3_WITH_IMAGES = Family(
    base.decoder_keys("gemma3", text_config=json_keys.section(), tie_word_embeddings=flag(True)),
    _gemma3_with_images,
    table,
    lambda config: {"text_config": GEMMA3.raw(config)},
    ignored=frozenset(
        {
            "vision_config",
            "mm_tokens_per_image",
            "boi_token_index",
            "eoi_token_index",
            "image_token_index",
        }
    ),
    ignored_tensors=rf"{ROTARY_BUFFERS}|(model\.)?(vision_tower|multi_modal_projector)\..*",
    key_mapping=(
        (r"language_model\.model\.", "model."),
        (r"model\.language_model\.", "model."),
        (r"language_model\.lm_head\.", "lm_head."),
    ),
)
