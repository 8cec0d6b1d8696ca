"""T5 from Hugging Face folders: its config, its name table, and how its tensors become leaves."""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from softprompt.errors import UserError
from softprompt.models.shapes import ATTENTIONS, layer_count, t5_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained import hf
from softprompt.pretrained.families import T5_ARCHITECTURES
from softprompt.pretrained.name_tables import Put, Source, Table, read_weights, torch_rule

FEED_FORWARDS = {"relu": False, "gated-gelu": True}

EMBEDDING, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")

# A table that the first conversions gave every T5 and that no version has ever read.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def t5_table(config: T5Config) -> Table:
    """Which tensor of a Hugging Face folder fills which leaf."""
    names = _names(config)
    return {
        path: torch_rule(path, names[path], leaf, layers=layer_count(config, path))
        for path, leaf in t5_shapes(config).items()
    }


def _names(config: T5Config) -> dict[str, str]:
    """Leaf path -> name in a Hugging Face folder, `{}` for the layer."""
    names = {"embed/embedding": EMBEDDING, "head/kernel": HEAD}
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    for stack, attentions in ATTENTIONS.items():
        names[f"{stack}/relative_bias/embedding"] = f"{stack}.{table}"
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


def open_folder(folder: str | os.PathLike[str]) -> tuple[T5Config, Table, Source]:
    """The T5 of a Hugging Face folder, which tensors fill its leaves, and these tensors.

    Raises:
        UserError: an unsupported config, or a broken safetensors file.
    """
    config = read_config(folder)
    source = hf.open_source(
        folder,
        original=EMBEDDING,
        copies=(*COPIES, HEAD) if config.tied else COPIES,
        harmless=re.escape(UNUSED),
    )
    return config, t5_table(config), source


def load_weights(
    folder: str | os.PathLike[str], *, dtype: np.dtype, put: Put
) -> tuple[T5Config, dict[str, Any], str]:
    """Config, weights and fingerprint of a T5's Hugging Face folder.

    Raises:
        UserError: an unsupported config, or tensors that do not match it.
    """
    config, table, source = open_folder(folder)
    weights, fingerprint = read_weights(source, table, dtype=dtype, put=put)
    return config, weights, fingerprint


def read_config(folder: str | os.PathLike[str]) -> T5Config:
    """The sizes of a T5, from config.json.

    Whether the head is tied decides its input's scale, so the config must say it. transformers 5
    writes `tie_word_embeddings: true` whatever is true, and keeps the truth in
    `scale_decoder_outputs`; mT5 has neither, and no published one is tied.

    Raises:
        UserError: no readable config.json, another architecture or feed-forward, or a missing key.
    """
    file = Path(folder) / "config.json"
    raw = hf.read_json(file)
    (architecture,) = (raw.get("architectures") or ["(none)"])[:1]
    if architecture not in T5_ARCHITECTURES:
        known = ", ".join(T5_ARCHITECTURES)
        raise UserError(
            f"{file}: architecture {architecture!r} is not supported; supported: {known}"
        )
    kind = raw.get("feed_forward_proj", "relu")
    if kind not in FEED_FORWARDS:
        known = ", ".join(map(repr, FEED_FORWARDS))
        raise UserError(f"{file}: feed_forward_proj {kind!r} is not supported; allowed: {known}")
    tied = raw.get("scale_decoder_outputs", raw.get("tie_word_embeddings", True))
    try:
        return T5Config(
            vocab=raw["vocab_size"],
            width=raw["d_model"],
            encoder_layers=raw["num_layers"],
            decoder_layers=raw.get("num_decoder_layers") or raw["num_layers"],
            heads=raw["num_heads"],
            head_size=raw["d_kv"],
            ffn=raw["d_ff"],
            gated=FEED_FORWARDS[kind],
            tied=tied and not architecture.startswith("MT5"),
            norm_eps=raw.get("layer_norm_epsilon", 1e-6),
            buckets=raw.get("relative_attention_num_buckets", 32),
            max_distance=raw.get("relative_attention_max_distance", 128),
            context_length=raw.get("n_positions", 512),
        )
    except KeyError as e:
        raise UserError(f"{file}: no key {e}") from e


def raw_config(config: T5Config) -> dict[str, Any]:
    """The config.json that `read_config` reads as this T5, `architectures` left out."""
    kind = next(name for name, gated in FEED_FORWARDS.items() if gated == config.gated)
    return {
        "model_type": "t5",
        "vocab_size": config.vocab,
        "d_model": config.width,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "d_kv": config.head_size,
        "d_ff": config.ffn,
        "feed_forward_proj": kind,
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.tied,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "n_positions": config.context_length,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": True,
    }
