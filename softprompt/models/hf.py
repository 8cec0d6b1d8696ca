"""Hugging Face folders: config.json, safetensors (single or sharded), and the hub."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from softprompt.cache import cache_dir
from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.models.names import Source
from softprompt.models.t5_layers import T5Config

ARCHITECTURES = ("LlamaForCausalLM",)

LLAMA_NAMES = {
    "embed/embedding": "model.embed_tokens.weight",
    "layers/attn_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attn/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attn/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attn/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attn/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "final_norm/scale": "model.norm.weight",
    "head/kernel": "lm_head.weight",
}

# Buffers that older versions of transformers saved; they follow from the config.
ROTARY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")

FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig:
    """The decoder's sizes, from config.json.

    Raises:
        UserError: no readable config.json, another architecture, a variant that the decoder does
            not have, or a missing key.
    """
    file = Path(folder) / "config.json"
    raw = read_json(file)
    (architecture,) = (raw.get("architectures") or ["(none)"])[:1]
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    _refuse_variants(file, raw, rope)
    try:
        return DecoderConfig(
            vocab=raw["vocab_size"],
            width=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            kv_heads=raw.get("num_key_value_heads") or raw["num_attention_heads"],
            head_size=raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"],
            ffn=raw["intermediate_size"],
            context_length=raw["max_position_embeddings"],
            rope_base=rope.get("rope_theta") or raw.get("rope_theta", 10000.0),
            norm_eps=raw["rms_norm_eps"],
            tied=raw.get("tie_word_embeddings", False),
        )
    except KeyError as e:
        raise UserError(f"{file}: no key {e}") from e


def open_source(folder: str | os.PathLike[str], config: DecoderConfig | T5Config) -> Source:
    """The folder's tensors as a source of weights; reads headers only.

    Raises:
        UserError: no safetensors file, a shard named in the index that is absent, or a broken file.
    """
    folder = Path(folder)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    files: dict[str, Path] = {}
    for file in _weight_files(folder):
        with _open(file) as opened:
            for name in opened.keys():
                if name in files:
                    raise UserError(f"{file}: tensor {name} is also in {files[name].name}")
                part = opened.get_slice(name)
                tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
                files[name] = file

    if config.tied and {LLAMA_NAMES["embed/embedding"], "lm_head.weight"} <= set(files):
        _check_tied(files)

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        with _open(files[name]) as opened:
            values = opened.get_tensor(name)
        return values, values

    def harmless(name: str) -> bool:
        return bool(ROTARY_BUFFER.fullmatch(name)) or (config.tied and name == "lm_head.weight")

    return Source(file=str(folder), tensors=tensors, read=read, harmless=harmless)


def download(repo: str, *, revision: str | None = None) -> Path:
    """Fetches a hub repository's config, safetensors and tokenizer into the cache, with progress.

    Raises:
        UserError: not reachable and not in the cache, no such repository or revision, or no access.
    """
    from huggingface_hub import snapshot_download  # slow to import: only for hub names

    where = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                cache_dir=cache_dir() / "hub",
                allow_patterns=list(FILES),
            )
        )
    except Exception as e:  # httpx, OS and hub errors alike: the user's remedy is the same
        reason = next((line for line in str(e).splitlines() if line.strip()), "no reason given")
        raise UserError(
            f"could not fetch model {where} from the hub ({type(e).__name__}: {reason[:200]}); "
            "check the name and the network, or give a local folder"
        ) from e


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if not index.exists():
        if not single.exists():
            raise UserError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
        return [single]
    shards: Any = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: no weight_map")
    files = [folder / name for name in sorted(set(shards.values()))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise UserError(f"{index}: names shards that are not there: {', '.join(absent)}")
    return files


def _check_tied(files: dict[str, Path]) -> None:
    """Refuses a head that is stored beside the embeddings it is said to be tied to, yet differs."""
    embed, head = LLAMA_NAMES["embed/embedding"], "lm_head.weight"
    with _open(files[embed]) as a, _open(files[head]) as b:
        ours, theirs = a.get_slice(embed), b.get_slice(head)
        rows, step = ours.get_shape()[0], 4096  # in pieces: the matrix may be the largest tensor
        pieces = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        same = ours.get_shape() == theirs.get_shape() and all(
            np.array_equal(ours[piece], theirs[piece]) for piece in pieces
        )
    if not same:
        raise UserError(
            f"{files[head]}: {head} differs from {embed}, but config.json ties them; "
            "set tie_word_embeddings to false there"
        )


def _refuse_variants(file: Path, raw: dict[str, Any], rope: dict[str, Any]) -> None:
    """Refuses Llama variants that would load and then compute something else."""
    allowed = {
        "hidden_act": (raw.get("hidden_act", "silu"), "silu"),
        "attention_bias": (raw.get("attention_bias", False), False),
        "mlp_bias": (raw.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", 1.0), 1.0),
    }
    for key, (value, only) in allowed.items():
        if value != only:
            raise UserError(f"{file}: {key} {value!r} is not supported; allowed: {only!r}")


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{file}: no such file") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{file}: not readable as JSON ({e})") from e
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object")
    return value


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as e:
        raise UserError(f"{file}: not a complete safetensors file ({e})") from e
