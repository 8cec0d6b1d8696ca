"""Tiny random T5s: Hugging Face folders, and a model for algebra tests."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers.processors import TemplateProcessing

from softprompt.models.t5 import T5
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained import hf
from softprompt.pretrained.families.t5 import t5_table
from softprompt.pretrained.name_tables import Put, Source, read_weights, tensor_names
from tests.tiny import BOS, EOS, tiny_tokenizer

# The families, by what sets them apart; heads times their size is never the width.
FAMILIES: dict[str, dict[str, Any]] = {
    "T5 1.0": {"gated": False, "activation": "relu", "tied": True},
    "T5 1.1": {},
    "mT5": {"heads": 3, "head_size": 12, "vocab": 130},
    "ByT5": {"encoder_layers": 3, "decoder_layers": 1, "heads": 5, "buckets": 20},
}


# What files of the formats above do not hold: relative biases in every layer, other activations.
VARIANTS: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "UMT5": {"bias_per_layer": True, "tied": True, "buckets": 20, "decoder_layers": 3},
    "gated-silu": {"activation": "silu", "start": 5},
    "gelu": {"gated": False, "activation": "gelu", "tied": True},
}
FEED_FORWARDS = {
    (True, "gelu_tanh"): "gated-gelu",
    (True, "silu"): "gated-silu",
    (False, "relu"): "relu",
    (False, "gelu"): "gelu",
}


def tiny_t5_config(**sizes: Any) -> T5Config:
    """Sizes of a tiny T5."""
    base: dict[str, Any] = {
        "vocab": 99,
        "width": 20,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "heads": 3,
        "head_size": 8,
        "ffn": 28,
    }
    return T5Config(**base | sizes)


def tiny_t5_tensors(config: T5Config, seed: int) -> dict[str, np.ndarray]:
    """Random tensors under their Hugging Face names, scaled so that logits are of order 1 to 10."""
    tensors = {}
    for path, part in t5_table(config).items():
        for name in tensor_names(part):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            x = rng.standard_normal(part.source)
            if path.endswith("scale"):
                x = 1 + 0.1 * x
            elif path.endswith("kernel"):
                x = x / np.sqrt(part.source[1])  # [out, in]
            tensors[name] = x
    return tensors


def tiny_t5(
    *, seed: int = 0, dtype: str = "float64", prompt_to_input: bool = True, **sizes: Any
) -> tuple[T5, dict[str, Any]]:
    """A T5 and its weights for algebra tests; float64 needs `jax.enable_x64` around the call."""
    config = tiny_t5_config(**sizes)
    tensors = tiny_t5_tensors(config, seed)
    source = Source(
        file="tiny",
        tensors={name: ("F64", x.shape) for name, x in tensors.items()},
        read=lambda name: (tensors[name], tensors[name]),
    )
    weights, _ = read_weights(
        source,
        t5_table(config),
        dtype=np.dtype(jnp.dtype(dtype)),
        put=lambda path, leaf: jnp.asarray(leaf),
    )
    assert weights["embed"]["embedding"].dtype == jnp.dtype(dtype), "enable x64 around the call"
    return T5(config, dtype=jnp.dtype(dtype), prompt_to_input=prompt_to_input), weights


def write_t5_folder(path: str | Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Writes config.json and model.safetensors (float32) as transformers names them."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_t5_config(**sizes)
    (path / "config.json").write_text(json.dumps(hf_t5_config(config), indent=1))
    tensors = {
        n: np.ascontiguousarray(x, np.float32) for n, x in tiny_t5_tensors(config, seed).items()
    }
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def write_complete_t5(path: str | Path, *, seed: int = 0, **sizes: Any) -> Path:
    """The same with a tokenizer that ends every text with EOS, as T5's does: for whole trials."""
    path = write_t5_folder(path, seed=seed, vocab=330, **sizes)
    tokenizer = tiny_tokenizer(320)
    ending = {"single": f"$A {EOS}", "special_tokens": [(EOS, tokenizer.token_to_id(EOS))]}
    tokenizer.post_processor = TemplateProcessing(**ending)
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def hf_t5_config(config: T5Config) -> dict[str, Any]:
    """The content of config.json for a T5's sizes, as the published ones have it."""
    return {
        "architectures": [f"{'UMT5' if config.bias_per_layer else 'T5'}ForConditionalGeneration"],
        "model_type": "umt5" if config.bias_per_layer else "t5",
        "vocab_size": config.vocab,
        "d_model": config.width,
        "num_layers": config.encoder_layers,
        "num_decoder_layers": config.decoder_layers,
        "num_heads": config.heads,
        "d_kv": config.head_size,
        "d_ff": config.ffn,
        "feed_forward_proj": FEED_FORWARDS[config.gated, config.activation],
        "tie_word_embeddings": config.tied,
        "layer_norm_epsilon": config.norm_eps,
        "relative_attention_num_buckets": config.buckets,
        "relative_attention_max_distance": config.max_distance,
        "n_positions": config.context_length,
        "decoder_start_token_id": config.start,
        "pad_token_id": 0,
        "eos_token_id": 1,
    }


def load_weights(
    folder: str | Path, *, dtype: np.dtype, put: Put, open_folder: Any = hf.open_folder
) -> tuple[T5Config, dict[str, Any], str]:
    """Config, weights and fingerprint of a folder without a tokenizer."""
    config, table, source = open_folder(folder)
    weights, fingerprint = read_weights(source, table, dtype=dtype, put=put)
    return config, weights, fingerprint
