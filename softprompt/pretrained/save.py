"""Saving a model as a Hugging Face folder, the inverse of loading, after full fine-tuning."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file
from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from softprompt.errors import UserError
from softprompt.files import read_json
from softprompt.models import ModelConfig
from softprompt.models.quantize import VALUES
from softprompt.pretrained import hf
from softprompt.pretrained.families import find_family
from softprompt.pretrained.name_tables import Table, tensor_names
from softprompt.pretrained.tokenizer import Tokenizer

BESIDE = ("generation_config.json", "chat_template.jinja", "chat_template.json")
COPIED = (*hf.TOKENIZER_FILES[1:], *BESIDE)


def save_folder(
    folder: str | os.PathLike[str],
    config: ModelConfig,
    weights: Mapping[str, Any],
    tokenizer: Tokenizer,
    *,
    original: str | os.PathLike[str] | None = None,
    shard_bytes: int = 5 * 10**9,
) -> Path:
    """Writes config.json, safetensors and the tokenizer, which transformers and `load_model` read.

    Args:
        folder: a local folder, new or empty.
        config: of the model.
        weights: a tree like that of `load_model`, not quantised.
        tokenizer: of the model.
        original: the Hugging Face folder that the model was loaded from, if any. Its config.json
            and the files of its tokenizer are copied.
        shard_bytes: largest size of a file of weights. One such file at a time is in memory.

    Returns:
        The folder.

    Raises:
        UserError: the folder is not empty, the weights do not match the config, transformers has no
            architecture for the config, `original` is another model, the weights are quantised, or
            the folder cannot be written. A partly written folder is removed.
    """
    folder = Path(folder).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: not an empty folder; a model is saved into a new one")
    leaves = flatten_dict(weights, sep="/")
    if any(path.endswith(VALUES) for path in leaves):
        raise UserError("quantised weights cannot be saved; load the model with quantize none")
    raw, table = _describe(config, tokenizer, original)
    _check(leaves, table)
    raw["dtype"] = str(leaves["embed/embedding"].dtype)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        _save_weights(partial, leaves, table, shard_bytes)
        if original is None or not _copy_tokenizer(Path(original), partial):
            _save_tokenizer(partial, tokenizer)
        os.replace(partial, folder)
    except (OSError, SafetensorError) as e:
        raise UserError(f"{folder}: cannot be written ({e})") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _describe(
    config: ModelConfig, tokenizer: Tokenizer, original: str | os.PathLike[str] | None
) -> tuple[dict[str, Any], Table]:
    """The content of config.json, and the name table that goes with it."""
    if original is not None:
        found, table, _ = hf.open_folder(original)
        if found != config:
            raise UserError(f"{original}: its config.json is not that of the model to be saved")
        raw = read_json(Path(original) / "config.json")
        if "text_config" not in raw:  # otherwise only its text part, without images, is saved
            return {k: v for k, v in raw.items() if k not in ("torch_dtype", "dtype")}, table
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    architecture, family = find_family(config)
    raw = {"architectures": [architecture], **ids, **family.raw(config)}
    return raw, family.table(config)


def _check(leaves: Mapping[str, Any], table: Table) -> None:
    """Raises if leaves are missing, unexpected, or of another shape."""
    expected = {path: rule.shape for path, rule in table.items()}
    found = {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    wrong = sorted(
        path for path in expected.keys() | found.keys() if expected.get(path) != found.get(path)
    )
    if wrong:
        raise UserError(f"weights do not match the config: {', '.join(wrong)}")


def _save_weights(folder: Path, leaves: Mapping[str, Any], table: Table, shard_bytes: int) -> None:
    """Writes model.safetensors, or shards and their index."""
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import

    pieces: dict[str, list[tuple[str, int | None]]] = {}
    for path, rule in table.items():
        for layer, name in enumerate(tensor_names(rule)):
            pieces.setdefault(name, []).append((path, None if rule.layers is None else layer))
    sizes = {
        name: int(np.prod(table[path].source)) * leaves[path].dtype.itemsize
        for name, ((path, _), *_) in pieces.items()
    }
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        tensors = {name: _tensor(pieces[name], leaves, table) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        del tensors  # frees the memory before the next shard
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _tensor(
    pieces: list[tuple[str, int | None]], leaves: Mapping[str, Any], table: Table
) -> np.ndarray:
    """One tensor of the file; each leaf that it holds is written through the view of its rule."""
    first = table[pieces[0][0]]
    tensor = np.empty(first.source, leaves[pieces[0][0]].dtype)
    for path, layer in pieces:
        leaf, rule = leaves[path] if layer is None else leaves[path][layer], table[path]
        values, view = np.asarray(jax.device_get(leaf)), rule.convert(tensor)
        assert np.may_share_memory(view, tensor), f"{rule.name}: convert gives a copy"
        view[...] = values - values.dtype.type(rule.offset) if rule.offset else values
    return tensor


def _save_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Writes a tokenizer in the format of transformers' fast tokenizers."""
    backend = Backend.from_str(tokenizer.backend.to_str())
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    names = {role: tokenizer.token(i) for role, i in ids.items() if i is not None}
    around = [
        names.get("bos_token", "") if tokenizer.add_bos else "",
        "$A",
        names.get("eos_token", "") if tokenizer.add_eos else "",
    ]
    if any(around[::2]):
        backend.post_processor = TemplateProcessing(
            single=" ".join(filter(None, around)),
            special_tokens=[(names[role], ids[role]) for role in names],
        )
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _copy_tokenizer(original: Path, folder: Path) -> bool:
    """Copies the files of `COPIED`; returns whether a tokenizer is among them."""
    files = {file for pattern in COPIED for file in original.glob(pattern) if file.is_file()}
    for file in files:
        shutil.copyfile(file, folder / file.name)
    return any(file.name not in BESIDE for file in files)
