"""GPT-2: learned positions, and matrices stored [in, out], queries, keys and values as one."""

import dataclasses
import math
from typing import Any

import numpy as np

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family, Raw, only
from softprompt.pretrained.name_tables import Table, TensorRule, decoder_table, input_major

NAMES = {
    "embed": "transformer.wte",
    "positions": "transformer.wpe",
    "layers/attn_norm": "transformer.h.{}.ln_1",
    "layers/attn/q": "transformer.h.{}.attn.c_attn",
    "layers/attn/k": "transformer.h.{}.attn.c_attn",
    "layers/attn/v": "transformer.h.{}.attn.c_attn",
    "layers/attn/o": "transformer.h.{}.attn.c_proj",
    "layers/mlp_norm": "transformer.h.{}.ln_2",
    "layers/mlp/up": "transformer.h.{}.mlp.c_fc",
    "layers/mlp/down": "transformer.h.{}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}


def _config(raw: Raw) -> DecoderConfig:
    only(raw, "scale_attn_by_inverse_layer_idx", False)
    only(raw, "add_cross_attention", False)
    width, heads = raw["n_embd"], raw["n_head"]
    return DecoderConfig(
        vocab=raw["vocab_size"],
        width=width,
        layers=raw["n_layer"],
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn=raw.get("n_inner") or 4 * width,
        context_length=raw["n_positions"],
        tied=raw.get("tie_word_embeddings", True),
        positions="learned",
        query_scale=0.0 if raw.get("scale_attn_weights", True) else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation=base.activation(raw, "activation_function", "gelu_new"),
        norm="layer",
        norm_eps=raw["layer_norm_epsilon"],
    )


def _table(config: DecoderConfig) -> Table:
    rules = decoder_table(config, NAMES)
    for path, rule in rules.items():
        if path.startswith("layers/attn/") and path.split("/")[2] in "qkv":
            rules[path] = _third(rule, "qkv".index(path.split("/")[2]))
        elif path.startswith("layers/") and path.endswith("/kernel"):
            rules[path] = input_major(rule)
    return rules


def _third(rule: TensorRule, nth: int) -> TensorRule:
    """One of queries, keys and values, which lie side by side along the last axis."""
    *inputs, out = rule.source[::-1]
    size = math.prod(rule.leaf[-2:])

    def convert(x: np.ndarray) -> np.ndarray:
        return x[..., nth * size : (nth + 1) * size].reshape(rule.leaf)

    return dataclasses.replace(rule, source=(*inputs, 3 * out), convert=convert)


def _raw(config: DecoderConfig) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "vocab_size": config.vocab,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.ffn,
        "n_positions": config.context_length,
        "tie_word_embeddings": config.tied,
        "scale_attn_weights": config.query_scale == 0.0,
        "activation_function": base.activation_name(config),
        "layer_norm_epsilon": config.norm_eps,
    }


GPT2 = Family(
    _config,
    _table,
    _raw,
    harmless=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    spellings=((r"(?=(wte|wpe|h\.\d+|ln_f)\.)", "transformer."),),
)
