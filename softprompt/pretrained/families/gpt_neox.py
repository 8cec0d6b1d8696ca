"""GPT-NeoX (Pythia): partial rotary positions, parallel layers, one matrix for q, k and v.

In it the rows of a head's queries, keys and values follow one another, head after head.
"""

import dataclasses
from typing import Any

import numpy as np

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family, Raw, only
from softprompt.pretrained.name_tables import Table, TensorRule, decoder_table

NAMES = {
    "embed": "gpt_neox.embed_in",
    "layers/attn_norm": "gpt_neox.layers.{}.input_layernorm",
    "layers/attn/q": "gpt_neox.layers.{}.attention.query_key_value",
    "layers/attn/k": "gpt_neox.layers.{}.attention.query_key_value",
    "layers/attn/v": "gpt_neox.layers.{}.attention.query_key_value",
    "layers/attn/o": "gpt_neox.layers.{}.attention.dense",
    "layers/mlp_norm": "gpt_neox.layers.{}.post_attention_layernorm",
    "layers/mlp/up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
    "layers/mlp/down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
    "final_norm": "gpt_neox.final_layer_norm",
    "head": "embed_out",
}


def _config(raw: Raw) -> DecoderConfig:
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    fraction = rope.get("partial_rotary_factor", raw.get("rotary_pct", 0.25))
    bias = only(raw, "attention_bias", True, False)
    return DecoderConfig(
        vocab=raw["vocab_size"],
        width=width,
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn=raw["intermediate_size"],
        context_length=raw["max_position_embeddings"],
        tied=raw.get("tie_word_embeddings", False),
        rope_base=float(rope.get("rope_theta") or raw.get("rotary_emb_base") or 10000.0),
        rope_scaling=base.rope_scaling(rope),
        rotary_size=int(width // heads * fraction),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        gated=False,
        activation=base.activation(raw, "hidden_act", "gelu"),
        norm="layer",
        norm_eps=raw["layer_norm_eps"],
        parallel=only(raw, "use_parallel_residual", True, False),
    )


def _table(config: DecoderConfig) -> Table:
    rules = decoder_table(config, NAMES)
    for nth, name in enumerate("qkv"):
        for kind in ("kernel", "bias"):
            path = f"layers/attn/{name}/{kind}"
            if path in rules:
                rules[path] = _interleaved(rules[path], nth)
    return rules


def _interleaved(rule: TensorRule, nth: int) -> TensorRule:
    """One of queries, keys and values: rows [H, 3, K] of the fused tensor."""
    out, *inputs = rule.source
    heads, size = rule.leaf[-2:]

    def convert(x: np.ndarray) -> np.ndarray:
        own = x.reshape(heads, 3, size, *inputs)[:, nth]
        return own if not inputs else np.moveaxis(own, -1, 0)

    return dataclasses.replace(rule, source=(3 * out, *inputs), convert=convert)


def _raw(config: DecoderConfig) -> dict[str, Any]:
    rope = base.raw_rope(config)
    return {
        "model_type": "gpt_neox",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied,
        "rotary_emb_base": rope.pop("rope_theta"),
        "rotary_pct": config.rotary_size / config.head_size,
        **rope,
        "attention_bias": config.qkv_bias,
        "hidden_act": base.activation_name(config),
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel,
    }


GPT_NEOX = Family(
    _config,
    _table,
    _raw,
    harmless=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    spellings=((r"lm_head\.", "embed_out."),),
)
