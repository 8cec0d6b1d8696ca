"""Llama 1 to 3, SmolLM2 and Mistral: the names and the keys that Qwen and Gemma use too."""

from collections.abc import Mapping
from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family, Raw, only
from softprompt.pretrained.name_tables import Table, decoder_table

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

# Saved by older versions of transformers.
ROTARY_BUFFERS = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"


def sizes(raw: Raw) -> dict[str, Any]:
    """What Llama, Mistral, Qwen and Gemma configs call alike."""
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    return {
        "vocab": raw["vocab_size"],
        "width": width,
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_size": raw.get("head_dim") or width // heads,
        "ffn": raw["intermediate_size"],
        "context_length": raw["max_position_embeddings"],
        "norm_eps": raw["rms_norm_eps"],
    }


def raw_sizes(config: DecoderConfig) -> dict[str, Any]:
    """The same keys of a config.json."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
    }


def table(config: DecoderConfig) -> Table:
    """Every leaf apart, under Llama's names."""
    return decoder_table(config, NAMES)


def _llama(raw: Raw) -> DecoderConfig:
    bias = only(raw, "attention_bias", False, True)
    return DecoderConfig(
        **sizes(raw),
        **base.rope(raw),
        tied=raw.get("tie_word_embeddings", False),
        activation=base.activation(raw, "hidden_act", "silu"),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=only(raw, "mlp_bias", False, True),
    )


def _mistral(raw: Raw) -> DecoderConfig:
    window = raw.get("sliding_window", 4096)
    return DecoderConfig(
        **sizes(raw),
        **base.rope(raw),
        tied=raw.get("tie_word_embeddings", False),
        activation=base.activation(raw, "hidden_act", "silu"),
        windows=(int(window),) * raw["num_hidden_layers"] if window else (),
    )


def _raw(config: DecoderConfig) -> dict[str, Any]:
    sizes, act = raw_sizes(config), base.activation_name(config)
    return {**sizes, **base.raw_rope(config), "hidden_act": act}


def _raw_llama(config: DecoderConfig) -> dict[str, Any]:
    biases = {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    return {"model_type": "llama", **_raw(config), **biases}


def _raw_mistral(config: DecoderConfig) -> dict[str, Any]:
    window = max(config.windows, default=0) or None
    return {"model_type": "mistral", **_raw(config), "sliding_window": window}


LLAMA = Family(_llama, table, _raw_llama, ROTARY_BUFFERS)
MISTRAL = Family(_mistral, table, _raw_mistral, ROTARY_BUFFERS)
