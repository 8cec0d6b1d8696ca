"""Tiny variants of every decoder family: what their config.json says, and random weights.

Sizes are awkward on purpose: heads times head size is not the width where the family allows it,
some have one kv head, the vocabulary is odd, and windows end inside a row and inside its context.
"""

import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from softprompt.models.decoder import Decoder
from softprompt.pretrained.families import read_family
from softprompt.pretrained.name_tables import Source, read_weights, tensor_names
from tests.tiny import tiny_config, write_tokenizer

VOCAB = 331


def config_of_folder(folder):
    """The model that a folder's config.json describes."""
    file = Path(folder) / "config.json"
    return read_family(json.loads(file.read_text()), file=str(file))[1]


_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCAB,
    "n_embd": 36,
    "n_head": 3,
    "n_layer": 3,
    "n_positions": 128,
    "layer_norm_epsilon": 1e-5,
}
_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "layer_norm_eps": 1e-5,
}
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "ffn_dim": 56,
    "max_position_embeddings": 128,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "num_hidden_layers": 4,
    "head_dim": 20,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
}
_QWEN = {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
_QWEN2 = {
    **{key: value for key, value in _QWEN.items() if key != "head_dim"},
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 40,
}
_QWEN3 = {**_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_SLIDING = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}
_GEMMA = {
    **_LLAMA,
    "architectures": ["GemmaForCausalLM"],
    "model_type": "gemma",
    "hidden_act": "gelu",
}
_GEMMA2 = {
    **_LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 9,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 5.0,
    "sliding_window": 7,
}
_GEMMA3 = {
    **_LLAMA,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "num_hidden_layers": 5,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 9,
    "sliding_window": 7,
    "sliding_window_pattern": 3,
    "rope_theta": 5000.0,
    "rope_local_base_freq": 100.0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

_YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}

VARIANTS: dict[str, dict[str, Any]] = {
    "gpt2": _GPT2,
    "gpt2-untied": {
        **_GPT2,
        "n_inner": 50,
        "tie_word_embeddings": False,
        "activation_function": "gelu",
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "neox": {**_NEOX, "rotary_pct": 0.25, "rotary_emb_base": 100},
    "neox-sequential": {
        **_NEOX,
        "use_parallel_residual": False,
        "rotary_pct": 1.0,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "opt": _OPT,
    "opt-350m": {**_OPT, "word_embed_proj_dim": 20, "do_layer_norm_before": False},
    "opt-bare": {**_OPT, "enable_bias": False, "_remove_final_layer_norm": True},
    "llama": {**_LLAMA, "tie_word_embeddings": True},
    "llama-biases": {**_LLAMA, "attention_bias": True, "mlp_bias": True},
    "llama3": {**_LLAMA, "rope_scaling": _LLAMA3},
    "llama-linear": {**_LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "mistral": {
        **_LLAMA,
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 7,
    },
    "qwen2": {**_QWEN2, "tie_word_embeddings": True},
    "qwen2-sliding": {**_QWEN2, **_SLIDING, "rope_scaling": _YARN},
    "qwen3": {**_QWEN3, "tie_word_embeddings": True},
    "qwen3-sliding": {**_QWEN3, **_SLIDING, "attention_bias": True},
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3": _GEMMA3,
    "gemma3-scaled": {
        **_GEMMA3,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "final_logit_softcapping": 5.0,
    },
}

# What the golden values of tests/golden/families.json follow: longer than the windows.
FAMILY_IDS = [7, 300, 12, 45, 45, 2, 319, 81, 100, 263, 0, 64, 330, 5, 17]


def golden_prompt(width: int) -> np.ndarray:
    """The soft prompt [9, D] before them."""
    return np.random.default_rng(9).standard_normal((9, width)).astype(np.float32)


# One of each kind, for the contracts.
FAMILIES = (
    "gpt2",
    "neox",
    "opt",
    "opt-350m",
    "llama3",
    "mistral",
    "qwen2",
    "qwen3-sliding",
    "gemma",
    "gemma2",
    "gemma3",
)
SLIDING = ("mistral", "qwen2-sliding", "qwen3-sliding", "gemma2", "gemma3", "gemma3-scaled")


def family_tensors(
    name: str, seed: int = 0, raw: dict[str, Any] | None = None
) -> dict[str, np.ndarray]:
    """Random float64 tensors as the family stores them, scaled so that every part matters.

    `raw`: another config.json than the variant's.
    """
    family, config = read_family(raw or VARIANTS[name])
    tensors = {}
    for path, part in family.table(config).items():
        for tensor in tensor_names(part):
            rng = np.random.default_rng([seed, zlib.crc32(tensor.encode())])
            tensors[tensor] = _scaled(path, rng.standard_normal(part.source), name)
    return tensors


def _scaled(path: str, x: np.ndarray, name: str) -> np.ndarray:
    if path.endswith("/scale"):
        return 0.2 * x if name.startswith("gemma") else 1 + 0.2 * x
    if path.endswith("/bias"):
        return 0.3 * x
    if path.endswith("/embedding"):
        return 0.5 * x
    return 1.3 * x / np.sqrt(min(x.shape))


def family_decoder(name: str, *, seed: int = 0, dtype: str = "float64") -> tuple[Decoder, Any]:
    """A decoder and its weights for algebra tests; float64 needs x64 switched on."""
    family, config = read_family(VARIANTS[name])
    tensors = family_tensors(name, seed)
    shapes = {tensor: ("F64", x.shape) for tensor, x in tensors.items()}
    source = Source(name, shapes, lambda tensor: (tensors[tensor], tensors[tensor]))
    weights, _ = read_weights(
        source,
        family.table(config),
        dtype=np.dtype(jnp.dtype(dtype)),
        put=lambda path, leaf: jnp.asarray(leaf),
    )
    return Decoder(config, dtype=jnp.dtype(dtype)), weights


def write_family_folder(
    path: Path, name: str, *, seed: int = 0, raw: dict[str, Any] | None = None
) -> Path:
    """Writes config.json, model.safetensors (float32) and the tokenizer; returns the path."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw or VARIANTS[name]))
    tensors = {n: x.astype(np.float32) for n, x in family_tensors(name, seed, raw).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_small_tokenizer(path)
    return path


def write_small_tokenizer(path: Path) -> None:
    """A tokenizer of fewer tokens than the model embeds: transformers adds some families' own."""
    write_tokenizer(path, tiny_config(vocab=VOCAB - 11))
