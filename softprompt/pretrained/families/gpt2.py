"""GPT-2: learned positions; matrices are [in, out], and one holds queries, keys and values."""

from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families import base
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.keys import Raw, count, flag, number
from softprompt.pretrained.name_tables import Table, decoder_table, fused_qkv, input_major, third

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


KEYS = base.decoder_keys(
    "gpt2",
    vocab_size=count(50257, "vocab"),
    n_positions=count(1024, "context_length"),
    n_embd=count(768, "width"),
    n_layer=count(12, "layers"),
    n_head=count(12, "heads"),
    n_inner=count(None, "ffn"),
    activation_function=base.activation("gelu_new"),
    layer_norm_epsilon=number(1e-5, "norm_eps"),
    scale_attn_weights=flag(True),
    scale_attn_by_inverse_layer_idx=flag(False, "scale_by_depth"),
    tie_word_embeddings=flag(True, "tied"),
)


def _config(values: Raw, found: Raw) -> DecoderConfig:
    width, heads = values["n_embd"], values["n_head"]
    return DecoderConfig(
        **{**found, "ffn": values["n_inner"] or 4 * width},
        kv_heads=heads,
        head_size=width // heads,
        positions="learned",
        query_scale=0.0 if values["scale_attn_weights"] else 1.0,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        norm="layer",
    )


def _table(config: DecoderConfig) -> Table:
    rules = fused_qkv(decoder_table(config, NAMES), third)
    matrices = [path for path in rules if path.startswith("layers/") and path.endswith("/kernel")]
    return rules | {path: input_major(rules[path]) for path in matrices}


GPT2 = Family(
    KEYS,
    _config,
    _table,
    lambda config: {"scale_attn_weights": config.query_scale == 0.0},
    ignored=frozenset(
        "n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation"
        " summary_proj_to_labels summary_first_dropout".split()
    ),
    ignored_tensors=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    key_mapping=((r"(?=(wte|wpe|h\.\d+|ln_f)\.)", "transformer."),),
)
