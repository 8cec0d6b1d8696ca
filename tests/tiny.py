"""Tiny random Llama models: a complete Hugging Face folder, and a decoder for algebra tests."""

import json
import zlib
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE

from softprompt.models.decoder import Decoder, DecoderConfig
from softprompt.pretrained.families.llama import table
from softprompt.pretrained.name_tables import Source, read_weights, tensor_names

BOS, EOS = "<|bos|>", "<|eos|>"

# What the tokenizer's merges are learned from; the words of the tiny tasks of the tests.
SENTENCES = (
    "Review: a warm, funny and moving film that never loses its way.",
    "Sentiment: positive",
    "Review: the plot is thin, the jokes are old and the ending is a mess.",
    "Sentiment: negative",
    "Review: nothing in this movie is as good as the actors who try to save it.",
    "Question: how many people live in the city, and where is the river?",
    "Answer: the number of people in the city is not known to the author.",
    "There was something in the story that made the whole audience laugh out loud.",
)


def tiny_config(
    *,
    width: int = 48,
    layers: int = 3,
    heads: int = 4,
    kv_heads: int = 2,
    head_size: int | None = None,
    ffn: int = 64,
    vocab: int = 320,
    tied: bool = True,
    context: int = 512,
) -> DecoderConfig:
    """Sizes of a tiny decoder; `head_size` defaults to width / heads."""
    return DecoderConfig(
        vocab=vocab,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size or width // heads,
        ffn=ffn,
        context_length=context,
        tied=tied,
    )


def tiny_tensors(config: DecoderConfig, seed: int) -> dict[str, np.ndarray]:
    """Random tensors under their Hugging Face names, scaled so that logits are of order 1 to 10."""
    tensors = {}
    for path, part in table(config).items():
        for name in tensor_names(part):
            rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
            x = rng.standard_normal(part.source)
            if path.endswith("scale"):
                x = 1 + 0.1 * x
            elif path in ("embed/embedding", "head/kernel"):
                x = x * 0.5
            else:
                x = x / np.sqrt(part.source[1])
            tensors[name] = x
    return tensors


def tiny_decoder(
    *, seed: int = 0, dtype: str = "float64", **sizes: Any
) -> tuple[Decoder, dict[str, Any]]:
    """A decoder and its weights for algebra tests; float64 needs `jax.enable_x64` around the call.

    The weights equal those of `write_llama_folder` with the same arguments, before rounding.
    """
    config = tiny_config(**sizes)
    tensors = tiny_tensors(config, seed)
    source = Source(
        file="tiny",
        tensors={name: ("F64", x.shape) for name, x in tensors.items()},
        read=lambda name: (tensors[name], tensors[name]),
    )
    weights, _ = read_weights(
        source,
        table(config),
        dtype=np.dtype(jnp.dtype(dtype)),
        put=lambda path, leaf: jnp.asarray(leaf),
    )
    assert weights["embed"]["embedding"].dtype == jnp.dtype(dtype), "enable x64 around the call"
    return Decoder(config, dtype=jnp.dtype(dtype)), weights


def write_llama_folder(path: str | Path, *, seed: int = 0, **sizes: Any) -> Path:
    """Writes config.json, model.safetensors (float32) and the tokenizer's files; returns the path.

    `load_model` and transformers read it. `sizes` are those of `tiny_config`.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(**sizes)
    (path / "config.json").write_text(json.dumps(hf_config(config), indent=1))
    tensors = {n: x.astype(np.float32) for n, x in tiny_tensors(config, seed).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(path, config)
    return path


def hf_config(config: DecoderConfig) -> dict[str, Any]:
    """The content of config.json for a decoder's sizes."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "intermediate_size": config.ffn,
        "max_position_embeddings": config.context_length,
        "rope_theta": config.rope_base,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "torch_dtype": "float32",
    }


def tiny_tokenizer(vocab: int = 320) -> Tokenizer:
    """A byte-level BPE: two special tokens, 256 bytes, and merges up to `vocab` tokens."""
    assert vocab >= 258, "two special tokens and 256 bytes"
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel()  # as GPT-2 has: trims spaces off the offsets
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def write_tokenizer(path: Path, config: DecoderConfig) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tiny_tokenizer(config.vocab).save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": config.context_length,
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
