"""OPT: learned positions that start at row 2, and OPT-350m's narrow embeddings and late norms."""

from typing import Any

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family, Raw, only
from softprompt.pretrained.name_tables import Table, decoder_table

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


def _config(raw: Raw) -> DecoderConfig:
    only(raw, "layer_norm_elementwise_affine", True)
    width, heads = raw["hidden_size"], raw["num_attention_heads"]
    narrow = raw.get("word_embed_proj_dim") or width
    before = only(raw, "do_layer_norm_before", True, False)
    bias = only(raw, "enable_bias", True, False)
    return DecoderConfig(
        vocab=raw["vocab_size"],
        width=width,
        layers=raw["num_hidden_layers"],
        heads=heads,
        kv_heads=heads,
        head_size=width // heads,
        ffn=raw["ffn_dim"],
        context_length=raw["max_position_embeddings"],
        tied=raw.get("tie_word_embeddings", True),
        embed_width=narrow if narrow != width else 0,
        positions="learned",
        position_offset=2,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        gated=False,
        activation=base.activation(raw, "activation_function", "relu"),
        norm="layer",
        norm_eps=1e-5,
        norms="before" if before else "after",
        final_norm=before and not raw.get("_remove_final_layer_norm", False),
    )


def _table(config: DecoderConfig) -> Table:
    return decoder_table(config, NAMES)


def _raw(config: DecoderConfig) -> dict[str, Any]:
    before = config.norms == "before"
    return {
        "model_type": "opt",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "ffn_dim": config.ffn,
        "max_position_embeddings": config.context_length,
        "tie_word_embeddings": config.tied,
        "word_embed_proj_dim": config.prompt_width,
        "enable_bias": config.qkv_bias,
        "activation_function": base.activation_name(config),
        "do_layer_norm_before": before,
        "_remove_final_layer_norm": before and not config.final_norm,
    }


OPT = Family(_config, _table, _raw, spellings=((r"decoder\.", "model.decoder."),))
