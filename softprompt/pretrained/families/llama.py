"""Llama 1 to 3, SmolLM2 and Mistral, and the names and keys that Qwen and Gemma share with them."""

import functools
from collections.abc import Mapping
from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base, rope
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.keys import Key, Raw, count, flag, number, one_of
from softprompt.pretrained.name_tables import decoder_table

NAMES: Mapping[str, str] = {
    "embed": "model.embed_tokens",
    "layers/attn_norm": "model.layers.{}.input_layernorm",
    "layers/attn/q": "model.layers.{}.self_attn.q_proj",
    "layers/attn/k": "model.layers.{}.self_attn.k_proj",
    "layers/attn/v": "model.layers.{}.self_attn.v_proj",
    "layers/attn/o": "model.layers.{}.self_attn.o_proj",
    "layers/attn/q_norm": "model.layers.{}.self_attn.q_norm",
    "layers/attn/k_norm": "model.layers.{}.self_attn.k_norm",
    "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

# transformers saves a model without its head under names without a prefix.
BARE = ((r"(?=(embed_tokens|layers|norm)\.)", "model."),)

# Tensors that older versions of transformers saved.
ROTARY_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


# The values that transformers gives absent keys, in the order of `SIZES`.
DEFAULTS = {
    "llama": (32000, 4096, 32, 32, None, None, 11008, 2048),
    "mistral": (32000, 4096, 32, 32, 8, None, 14336, 131072),
    "qwen2": (151936, 4096, 32, 32, 32, None, 22016, 32768),
    "qwen3": (151936, 4096, 32, 32, 32, 128, 22016, 32768),
    "gemma": (256000, 3072, 28, 16, 16, 256, 24576, 8192),
    "gemma2": (256000, 2304, 26, 8, 4, 256, 9216, 8192),
    "gemma3_text": (262208, 2304, 26, 8, 4, 256, 9216, 131072),
}
SIZES = {
    "vocab_size": "vocab",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_size",
    "intermediate_size": "ffn",
    "max_position_embeddings": "context_length",
}
DERIVED = ("num_key_value_heads", "head_dim")  # from other sizes, if null


def family_keys(model_type: str, **keys: Key) -> dict[str, Key]:
    """The keys of a family like Llama: those that such families share, and its own."""
    defaults = zip(SIZES.items(), DEFAULTS[model_type], strict=True)
    return {
        **{key: count(n, field, null=key in DERIVED) for (key, field), n in defaults},
        "rms_norm_eps": number(1e-6, "norm_eps"),
        "tie_word_embeddings": flag(False, "tied"),
        **rope.KEYS,
        **base.decoder_keys(model_type, **keys),
    }


def common_fields(values: Raw, found: Raw) -> dict[str, Any]:
    """The fields of a decoder's config that all these families read alike, but for positions."""
    heads = values["num_attention_heads"]
    return {
        **found,
        "kv_heads": values["num_key_value_heads"] or heads,
        "head_size": values["head_dim"] or values["hidden_size"] // heads,
    }


table = functools.partial(decoder_table, names=NAMES)  # a tensor for each leaf


def _llama(values: Raw, found: Raw) -> DecoderConfig:
    bias = values["attention_bias"]
    return DecoderConfig(**common_fields(values, found), **rope.fields(values), out_bias=bias)


def _mistral(values: Raw, found: Raw) -> DecoderConfig:
    window = values["sliding_window"]
    windows = (window,) * values["num_hidden_layers"] if window else ()
    return DecoderConfig(**common_fields(values, found), **rope.fields(values), windows=windows)


def _mistral_keys(config: DecoderConfig) -> dict[str, Any]:
    return {**rope.raw_fields(config), "sliding_window": max(config.windows, default=0) or None}


LLAMA = Family(
    family_keys(
        "llama",
        hidden_act=base.activation("silu"),
        attention_bias=flag(False, "qkv_bias"),
        mlp_bias=flag(False, "mlp_bias"),
        rope_interleaved=one_of(False),
    ),
    _llama,
    table,
    rope.raw_fields,
    ignored=frozenset({"max_sequence_length", "is_llama_config"}),
    ignored_tensors=ROTARY_BUFFERS,
    key_mapping=BARE,
)
MISTRAL = Family(
    family_keys(
        "mistral", hidden_act=base.activation("silu"), sliding_window=count(4096, null=True)
    ),
    _mistral,
    table,
    _mistral_keys,
    ignored_tensors=ROTARY_BUFFERS,
    key_mapping=BARE,
)
