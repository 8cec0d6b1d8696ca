"""Hugging Face folders, local or from the hub: config.json, and weights in one file or shards."""

import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from softprompt.downloads import cache_dir
from softprompt.errors import UserError
from softprompt.files import read_json
from softprompt.models import ModelConfig
from softprompt.pretrained.families import Family, read_family
from softprompt.pretrained.name_tables import Source, Table
from softprompt.pretrained.tensor_files import ALL, TensorFile, open_file

TOKENIZER_FILES = (
    "config.json",
    "tokenizer*",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
)
FILES = (*TOKENIZER_FILES, "model*.safetensors", "model.safetensors.index.json")
Stored = tuple[Path, TensorFile, str]  # a tensor: its file, and its name in it
PYTORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def open_folder(folder: str | os.PathLike[str]) -> tuple[ModelConfig, Table, Source]:
    """The folder's model, the rules that fill its leaves, and its tensors.

    Reads headers, and the tensors that may repeat the embeddings, such as a tied head.

    Raises:
        UserError: no readable config.json, or one that `read_family` refuses; no weights, an absent
            shard that the index names, or a file that cannot be read; a tensor that should repeat
            the embeddings and differs.
    """
    folder = Path(folder)
    file = folder / "config.json"
    family, config = read_family(read_json(file), file=str(file))
    table, stored = family.table(config), _stored_tensors(folder, family.key_mapping)
    original = table["embed/embedding"].name
    copies = [*family.copies, *([_head_name(family, config)] if config.tied else [])]
    for copy in copies:
        if {original, copy} <= stored.keys():
            _check_copy(stored[original], stored[copy])

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        _, opened, name_in_file = stored[name]
        values = opened.read(name_in_file, ALL)
        return values, values

    def harmless(name: str) -> bool:
        return bool(re.fullmatch(family.ignored_tensors, name)) or name in copies

    tensors = {name: opened.tensors[theirs] for name, (_, opened, theirs) in stored.items()}
    return config, table, Source(str(folder), tensors, read, harmless)


def _stored_tensors(folder: Path, key_mapping: Sequence[tuple[str, str]]) -> dict[str, Stored]:
    """The folder's tensors, by the names that the family's table has for them."""
    found: dict[str, Stored] = {}
    for file in _weight_files(folder):
        opened = open_file(file)
        for name_in_file in opened.tensors:
            name = canonical(name_in_file, key_mapping)
            if name in found:
                raise UserError(f"{file}: tensor {name_in_file} is also in {found[name][0].name}")
            found[name] = file, opened, name_in_file
    return found


def download(repo: str, *, revision: str = "", patterns: Sequence[str] = FILES) -> Path:
    """Downloads files of a hub repository into the cache, with progress.

    Args:
        repo: its name.
        revision: branch, tag or commit; "" for the default branch.
        patterns: of the files. With `FILES`, PyTorch's own files are downloaded where a repository
            has no safetensors.

    Raises:
        UserError: the hub cannot be reached and the cache lacks the files, no such repository or
            revision, or no access.
    """
    folder = _snapshot(repo, revision, patterns)
    if patterns == FILES and not any(folder.glob("model*.safetensors")):
        folder = _snapshot(repo, revision, PYTORCH_FILES)
    return folder


def _snapshot(repo: str, revision: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import: only for hub names

    where = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision or None,
                cache_dir=cache_dir() / "hub",
                allow_patterns=list(patterns),
            )
        )
    except Exception as e:  # httpx, OS and hub errors alike: the user's remedy is the same
        reason = next((line for line in str(e).splitlines() if line.strip()), "no reason given")
        raise UserError(
            f"could not fetch model {where} from the hub ({type(e).__name__}: {reason[:200]}); "
            "check the name and the network, or give a local folder"
        ) from e


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index, single = folder / f"{name}.index.json", folder / name
        if single.exists():  # as transformers, which prefers it to shards beside it
            return [single]
        if index.exists():
            return _shards(index)
    raise UserError(
        f"{folder}: no model.safetensors and no model.safetensors.index.json "
        "(nor pytorch_model.bin and its index)"
    )


def _shards(index: Path) -> list[Path]:
    shards: Any = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index}: no weight_map")
    files = [index.parent / str(name) for name in sorted(set(map(str, shards.values())))]
    absent = [file.name for file in files if not file.exists()]
    if absent:
        raise UserError(f"{index}: names shards that are not there: {', '.join(absent)}")
    return files


def canonical(stored: str, key_mapping: Sequence[tuple[str, str]]) -> str:
    """The name that the family's table has for a stored tensor."""
    for pattern, replacement in key_mapping:
        name, found = re.subn(f"^{pattern}", replacement, stored)
        if found:
            return name
    return stored


def _head_name(family: Family, config: ModelConfig) -> str:
    """The name that the head would have if it were not tied."""
    return family.table(dataclasses.replace(config, tied=False))["head/kernel"].name


def _check_copy(original: Stored, copy: Stored) -> None:
    """Raises where a tensor that should repeat the embeddings, such as a tied head, differs."""
    (_, ours, name), (file, theirs, other) = original, copy
    shape, step = ours.tensors[name][1], 4096  # in pieces: the matrix may be the largest tensor
    pieces = [slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)]
    same = shape == theirs.tensors[other][1] and all(
        np.array_equal(ours.read(name, piece), theirs.read(other, piece)) for piece in pieces
    )
    if not same:
        raise UserError(
            f"{file}: {other} differs from {name}, but config.json ties them; "
            "set tie_word_embeddings to false there if it is a head of its own"
        )
