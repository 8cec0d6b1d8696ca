"""T5 1.0 and 1.1, Flan-T5, ByT5, mT5, and UMT5, whose every layer has a relative bias."""

import re
from typing import Any

from softprompt.models.shapes import ATTENTIONS, layer_count, t5_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families.base import ACTIVATIONS, NAMED, Family
from softprompt.pretrained.families.keys import COMMON, Key, Raw, count, flag, number, one_of
from softprompt.pretrained.name_tables import Table, torch_rule

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# Early conversions wrote this table, which no version of transformers reads.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

FEED_FORWARDS = [*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)]


def t5_table(config: T5Config) -> Table:
    """The rules that fill the leaves from the tensors of a Hugging Face folder."""
    names = _names(config)
    return {
        path: torch_rule(path, names[path], leaf, layers=layer_count(config, path))
        for path, leaf in t5_shapes(config).items()
    }


def _names(config: T5Config) -> dict[str, str]:
    """Path of a leaf -> name of its tensor, `{}` for the layer."""
    names = {"embed/embedding": "shared.weight", "head/kernel": "lm_head.weight"}
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    for stack, attentions in ATTENTIONS.items():
        names[f"{stack}/relative_bias/embedding"] = f"{stack}.block.0.{bias}"
        names[f"{stack}/layers/relative_bias/embedding"] = f"{stack}.block.{{}}.{bias}"
        names[f"{stack}/final_norm/scale"] = f"{stack}.final_layer_norm.weight"
        block, layers = f"{stack}.block.{{}}.layer", f"{stack}/layers"
        for i, (kind, module) in enumerate(attentions.items()):
            names[f"{layers}/{kind}_norm/scale"] = f"{block}.{i}.layer_norm.weight"
            for p in "qkvo":
                names[f"{layers}/{kind}/{p}/kernel"] = f"{block}.{i}.{module}.{p}.weight"
        last = f"{block}.{len(attentions)}"
        names[f"{layers}/mlp_norm/scale"] = f"{last}.layer_norm.weight"
        inner = {"gate": "wi_0", "up": "wi_1"} if config.gated else {"up": "wi"}
        for leaf, module in (inner | {"down": "wo"}).items():
            names[f"{layers}/mlp/{leaf}/kernel"] = f"{last}.DenseReluDense.{module}.weight"
    return names


def _keys(model_type: str, feed_forward: str, **sizes: int) -> dict[str, Key]:
    feed_forwards = (name for name in FEED_FORWARDS if name != feed_forward)
    return {
        **COMMON,
        "model_type": one_of(model_type),
        "is_encoder_decoder": one_of(True),
        **{key: count(default) for key, default in sizes.items()},
        "d_model": count(512),
        "d_kv": count(64),
        "num_decoder_layers": count(None),
        "n_positions": count(512),
        "relative_attention_num_buckets": count(32, least=4),
        "relative_attention_max_distance": count(128),
        "layer_norm_epsilon": number(1e-6),
        "feed_forward_proj": one_of(feed_forward, *feed_forwards),
        "dense_act_fn": one_of(None, *ACTIVATIONS),
        "is_gated_act": flag(None),
        "decoder_start_token_id": count(0, least=0),
        "tie_word_embeddings": one_of(True, False, None),
        "scale_decoder_outputs": flag(None),
    }


def _config(values: Raw) -> dict[str, Any]:
    """The fields of `T5Config` that all T5s read alike.

    transformers derives `dense_act_fn` and `is_gated_act` from `feed_forward_proj` unless they are
    present. "gated-gelu" is the tanh approximation, "gelu" the exact function.
    """
    kind = values["feed_forward_proj"]
    act = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    gated = values["is_gated_act"]
    return {
        "vocab": values["vocab_size"],
        "width": values["d_model"],
        "encoder_layers": values["num_layers"],
        "decoder_layers": values["num_decoder_layers"] or values["num_layers"],
        "heads": values["num_heads"],
        "head_size": values["d_kv"],
        "ffn": values["d_ff"],
        "gated": kind.startswith("gated-") if gated is None else gated,
        "activation": ACTIVATIONS[values["dense_act_fn"] or act],
        "norm_eps": values["layer_norm_epsilon"],
        "buckets": values["relative_attention_num_buckets"],
        "max_distance": values["relative_attention_max_distance"],
        "context_length": values["n_positions"],
        "start": values["decoder_start_token_id"],
    }


def _t5(values: Raw) -> T5Config:
    """A T5, whose head is tied if its input is scaled.

    transformers 5 writes `tie_word_embeddings: true` for every T5; its `scale_decoder_outputs` says
    whether the head is tied.
    """
    scaled = values["scale_decoder_outputs"]
    tied = values["tie_word_embeddings"] is not False if scaled is None else scaled
    return T5Config(**_config(values), tied=tied)


def _mt5(values: Raw) -> T5Config:
    """An mT5, whose head is never tied: transformers does not scale its input."""
    return T5Config(**_config(values), tied=False)


def _umt5(values: Raw) -> T5Config:
    """A UMT5, whose head is untied if the config says so, as it was trained.

    transformers 5 scales the input of every UMT5's head, tied or not.
    """
    tied = values["tie_word_embeddings"] is not False
    return T5Config(**_config(values), tied=tied, bias_per_layer=True)


def _raw(model_type: str, config: T5Config) -> dict[str, Any]:
    function = "gelu" if config.activation.startswith("gelu") else config.activation
    return {
        "model_type": model_type,
        "vocab_size": config.vocab,
        "d_model": config.width,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "d_kv": config.head_size,
        "d_ff": config.ffn,
        "feed_forward_proj": f"gated-{function}" if config.gated else function,
        "dense_act_fn": NAMED[config.activation],
        "is_gated_act": config.gated,
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "n_positions": config.context_length,
        "decoder_start_token_id": config.start,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
    }


SMALL = {"vocab_size": 250112, "num_layers": 8, "num_heads": 6, "d_ff": 1024}

T5 = Family(
    _keys("t5", "relu", vocab_size=32128, num_layers=6, num_heads=8, d_ff=2048),
    _t5,
    t5_table,
    lambda config: {**_raw("t5", config), "scale_decoder_outputs": config.tied},
    harmless=re.escape(UNUSED),
    copies=COPIES,
)
MT5 = Family(
    _keys("mt5", "gated-gelu", **SMALL),
    _mt5,
    t5_table,
    lambda config: _raw("mt5", config),
    harmless=re.escape(UNUSED),
    copies=COPIES,
)
UMT5 = Family(
    _keys("umt5", "gated-gelu", **SMALL),
    _umt5,
    t5_table,
    lambda config: _raw("umt5", config),
    ignored=frozenset({"scalable_attention"}),
    copies=COPIES,
)
