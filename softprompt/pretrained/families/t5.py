"""T5 1.0 and 1.1, Flan-T5, ByT5, mT5, and UMT5, whose every layer has a relative bias."""

import functools
import re
from typing import Any

from softprompt.models.shapes import ATTENTIONS
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families.base import ACTIVATIONS, NAMED, Family
from softprompt.pretrained.families.keys import COMMON, Key, Raw, count, flag, number, one_of
from softprompt.pretrained.name_tables import Table, encoder_decoder_table

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# Early conversions wrote this table, which no version of transformers reads.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"

FEED_FORWARDS = [*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS)]


def t5_table(config: T5Config) -> Table:
    """The rules that fill the leaves from the tensors of a Hugging Face folder."""
    return encoder_decoder_table(config, _names(config))


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


def _keys(
    model_type: str, *, vocab: int, layers: int, heads: int, ffn: int, feed_forward: str
) -> dict[str, Key]:
    feed_forwards = (name for name in FEED_FORWARDS if name != feed_forward)
    return {
        **COMMON,
        "model_type": one_of(model_type),
        "is_encoder_decoder": one_of(True),
        "vocab_size": count(vocab, "vocab"),
        "d_model": count(512, "width"),
        "num_layers": count(layers, "encoder_layers"),
        "num_decoder_layers": count(None, "decoder_layers"),
        "num_heads": count(heads, "heads"),
        "d_kv": count(64, "head_size"),
        "d_ff": count(ffn, "ffn"),
        "n_positions": count(512, "context_length"),
        "relative_attention_num_buckets": count(32, "buckets", least=4),
        "relative_attention_max_distance": count(128, "max_distance"),
        "layer_norm_epsilon": number(1e-6, "norm_eps"),
        "feed_forward_proj": one_of(feed_forward, *feed_forwards),
        "dense_act_fn": one_of(None, *ACTIVATIONS),
        "is_gated_act": flag(None, "gated"),
        "decoder_start_token_id": count(0, "start", least=0),
        "tie_word_embeddings": one_of(True, False, None, field="tied"),
        "scale_decoder_outputs": flag(None),
    }


def _config(values: Raw, found: Raw, *, tied: bool, **more: Any) -> T5Config:
    """The T5 of a config.json.

    transformers derives `dense_act_fn` and `is_gated_act` from `feed_forward_proj` unless they are
    present. "gated-gelu" is the tanh approximation, "gelu" the exact function.
    """
    kind, gated = values["feed_forward_proj"], values["is_gated_act"]
    act = "gelu_new" if kind == "gated-gelu" else kind.removeprefix("gated-")
    fields = {
        **found,
        "decoder_layers": values["num_decoder_layers"] or values["num_layers"],
        "gated": kind.startswith("gated-") if gated is None else gated,
        "activation": ACTIVATIONS[values["dense_act_fn"] or act],
        "tied": tied,
    }
    return T5Config(**fields, **more)


def _t5(values: Raw, found: Raw) -> T5Config:
    """A T5, whose head is tied if its input is scaled.

    transformers 5 writes `tie_word_embeddings: true` for every T5; its `scale_decoder_outputs` says
    whether the head is tied.
    """
    scaled = values["scale_decoder_outputs"]
    tied = values["tie_word_embeddings"] is not False if scaled is None else scaled
    return _config(values, found, tied=tied)


def _umt5(values: Raw, found: Raw) -> T5Config:
    """A UMT5, whose head is untied if the config says so, as it was trained.

    transformers 5 scales the input of every UMT5's head, tied or not.
    """
    tied = values["tie_word_embeddings"] is not False
    return _config(values, found, tied=tied, bias_per_layer=True)


def _others(config: T5Config) -> dict[str, Any]:
    function = "gelu" if config.activation.startswith("gelu") else config.activation
    return {
        "feed_forward_proj": f"gated-{function}" if config.gated else function,
        "dense_act_fn": NAMED[config.activation],
        "pad_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
    }


SMALL: dict[str, Any] = {
    "vocab": 250112,
    "layers": 8,
    "heads": 6,
    "ffn": 1024,
    "feed_forward": "gated-gelu",
}

T5 = Family(
    _keys("t5", vocab=32128, layers=6, heads=8, ffn=2048, feed_forward="relu"),
    _t5,
    t5_table,
    lambda config: {**_others(config), "scale_decoder_outputs": config.tied},
    ignored_tensors=re.escape(UNUSED),
    copies=COPIES,
)
MT5 = Family(
    _keys("mt5", **SMALL),
    functools.partial(_config, tied=False),  # transformers does not scale the head's input
    t5_table,
    _others,
    ignored_tensors=re.escape(UNUSED),
    copies=COPIES,
)
UMT5 = Family(
    _keys("umt5", **SMALL),
    _umt5,
    t5_table,
    _others,
    ignored=frozenset({"scalable_attention"}),
    copies=COPIES,
)
