"""GPT-NeoX (Pythia): partial rotary positions, parallel layers, one matrix for q, k and v.

That matrix has the rows of the first head's queries, keys and values, then the second head's, ...
"""

import dataclasses
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base, rope
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.keys import Raw, count, flag, number, refuse
from softprompt.pretrained.name_tables import Table, TensorRule, decoder_table, fused_qkv

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


SECTIONS = ("rope_scaling", "rope_parameters", "original_max_position_embeddings")
KEYS = base.decoder_keys(
    "gpt_neox",
    vocab_size=count(50432, "vocab"),
    hidden_size=count(6144, "width"),
    num_hidden_layers=count(44, "layers"),
    num_attention_heads=count(64, "heads"),
    head_dim=count(None),
    intermediate_size=count(24576, "ffn"),
    max_position_embeddings=count(2048, "context_length"),
    hidden_act=base.activation("gelu"),
    layer_norm_eps=number(1e-5, "norm_eps"),
    rotary_pct=number(0.25),
    rotary_emb_base=number(1e4, "rope_base"),
    use_parallel_residual=flag(True, "parallel"),
    attention_bias=flag(True, "qkv_bias"),
    tie_word_embeddings=flag(False, "tied"),
    **{key: rope.KEYS[key] for key in SECTIONS},
)


def _config(values: Raw, found: Raw) -> DecoderConfig:
    heads, section = values["num_attention_heads"], rope.read(values)
    size = values["hidden_size"] // heads
    if values["head_dim"] not in (None, size):  # transformers lets it change the frequencies alone
        raise refuse("head_dim", values["head_dim"], size)
    theta = section["rope_theta"] or values["rotary_emb_base"]
    return DecoderConfig(
        **{**found, "rope_base": float(theta)},
        kv_heads=heads,
        head_size=size,
        rope_scaling=rope.scaling(section, values),
        rotary_size=_rotary_size(size, section["partial_rotary_factor"] or values["rotary_pct"]),
        out_bias=values["attention_bias"],
        mlp_bias=True,
        gated=False,
        norm="layer",
    )


def _rotary_size(size: int, fraction: float) -> int:
    """Number of a head's entries that are rotated."""
    rotated = int(size * fraction)
    if not 0 < rotated <= size:
        raise UserError(
            f"rotary_pct {fraction} rotates {rotated} of the {size} entries of a head; "
            f"allowed: 1 to {size}"
        )
    return rotated


def _table(config: DecoderConfig) -> Table:
    return fused_qkv(decoder_table(config, NAMES), _interleaved)


def _interleaved(rule: TensorRule, nth: int) -> TensorRule:
    """The rule of queries, keys or values: one of three blocks in the tensor's rows [H, 3, K]."""
    out, *inputs = rule.source
    heads, size = rule.leaf[-2:]

    def convert(x: np.ndarray) -> np.ndarray:
        own = x.reshape(heads, 3, size, *inputs)[:, nth]
        return own if not inputs else np.moveaxis(own, -1, 0)

    return dataclasses.replace(rule, source=(3 * out, *inputs), convert=convert)


def _others(config: DecoderConfig) -> dict[str, Any]:
    found = rope.raw_fields(config)
    del found["rope_theta"]  # here it is called rotary_emb_base
    return {**found, "rotary_pct": config.rotary_size / config.head_size}


GPT_NEOX = Family(
    KEYS,
    _config,
    _table,
    _others,
    ignored_tensors=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    key_mapping=(
        (r"lm_head\.", "embed_out."),
        (r"(?=(embed_in|layers|final_layer_norm)\.)", "gpt_neox."),
    ),
)
