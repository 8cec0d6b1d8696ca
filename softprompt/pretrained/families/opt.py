"""OPT: learned positions from row 2 on; OPT-350m has narrow embeddings and norms after the sum."""

import functools
from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.keys import Raw, count, flag, one_of
from softprompt.pretrained.name_tables import decoder_table

NAMES = {
    "embed": "model.decoder.embed_tokens",
    "positions": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "layers/attn_norm": "model.decoder.layers.{}.self_attn_layer_norm",
    "layers/attn/q": "model.decoder.layers.{}.self_attn.q_proj",
    "layers/attn/k": "model.decoder.layers.{}.self_attn.k_proj",
    "layers/attn/v": "model.decoder.layers.{}.self_attn.v_proj",
    "layers/attn/o": "model.decoder.layers.{}.self_attn.out_proj",
    "layers/mlp_norm": "model.decoder.layers.{}.final_layer_norm",
    "layers/mlp/up": "model.decoder.layers.{}.fc1",
    "layers/mlp/down": "model.decoder.layers.{}.fc2",
    "final_norm": "model.decoder.final_layer_norm",
    "project_out": "model.decoder.project_out",
    "head": "lm_head",
}


KEYS = base.decoder_keys(
    "opt",
    vocab_size=count(50272, "vocab"),
    hidden_size=count(768, "width"),
    num_hidden_layers=count(12, "layers"),
    num_attention_heads=count(12, "heads"),
    ffn_dim=count(3072, "ffn"),
    max_position_embeddings=count(2048, "context_length"),
    word_embed_proj_dim=count(None),
    do_layer_norm_before=flag(True),
    _remove_final_layer_norm=flag(False),
    activation_function=base.activation("relu"),
    enable_bias=flag(True, "qkv_bias"),
    layer_norm_elementwise_affine=one_of(True),
    tie_word_embeddings=flag(True, "tied"),
)


def _config(values: Raw, found: Raw) -> DecoderConfig:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    narrow = values["word_embed_proj_dim"] or width
    before, bias = values["do_layer_norm_before"], values["enable_bias"]
    return DecoderConfig(
        **found,
        kv_heads=heads,
        head_size=width // heads,
        embed_width=narrow if narrow != width else 0,
        positions="learned",
        position_offset=2,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        norm="layer",
        norm_eps=1e-5,
        norms="before" if before else "after",
        final_norm=before and not values["_remove_final_layer_norm"],
    )


def _others(config: DecoderConfig) -> dict[str, Any]:
    before = config.norms == "before"
    return {
        "word_embed_proj_dim": config.prompt_width,
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
    }


OPT = Family(
    KEYS,
    _config,
    functools.partial(decoder_table, names=NAMES),
    _others,
    key_mapping=((r"decoder\.", "model.decoder."),),
)
