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
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config
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
PYTORCH_FILES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def read_config(folder: str | os.PathLike[str]) -> DecoderConfig | T5Config:
    """The model that config.json describes.

    Raises:
        UserError: no readable config.json, or one that `read_family` refuses.
    """
    return _read_family(Path(folder))[1]


def open_folder(folder: str | os.PathLike[str]) -> tuple[DecoderConfig | T5Config, Table, Source]:
    """The folder's model, the rules that fill its leaves, and its tensors; reads headers only.

    Raises:
        UserError: what `read_config` and `open_source` raise.
    """
    folder = Path(folder)
    family, config = _read_family(folder)
    table = family.table(config)
    source = open_source(
        folder,
        original=table["embed/embedding"].name,
        copies=[*family.copies, *([_head_name(family, config)] if config.tied else [])],
        harmless=family.harmless,
        spellings=family.spellings,
    )
    return config, table, source


def open_source(
    folder: str | os.PathLike[str],
    *,
    original: str,
    copies: Sequence[str],
    harmless: str,
    spellings: Sequence[tuple[str, str]] = (),
) -> Source:
    """The folder's tensors as a source of weights; reads headers, and tensors named in `copies`.

    Args:
        folder: holds model.safetensors, or an index and shards, or the same of pytorch_model.bin.
        original: the name of the embeddings.
        copies: names of tensors that may repeat the embeddings; if present they must equal them.
        harmless: pattern of other tensors that fill no leaf and may be ignored.
        spellings: as in `Family`.

    Raises:
        UserError: no weights, an absent shard that the index names, a file that cannot be read, or
            a copy that differs.
    """
    folder = Path(folder)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    where: dict[str, tuple[Path, TensorFile, str]] = {}
    for file in _weight_files(folder):
        opened = open_file(file)
        for stored, kind in opened.tensors.items():
            name = canonical(stored, spellings)
            if name in where:
                raise UserError(f"{file}: tensor {stored} is also in {where[name][0].name}")
            tensors[name] = kind
            where[name] = file, opened, stored

    for copy in copies:
        if {original, copy} <= set(where):
            _check_copy(where[original], where[copy])

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        _, opened, stored = where[name]
        values = opened.read(stored, ALL)
        return values, values

    def ignorable(name: str) -> bool:
        return bool(re.fullmatch(harmless, name)) or name in copies

    return Source(str(folder), tensors, read, ignorable)


def download(repo: str, *, revision: str | None = None, patterns: Sequence[str] = FILES) -> Path:
    """Downloads files of a hub repository into the cache, with progress.

    Args:
        repo: its name.
        revision: branch, tag or commit; None for the default branch.
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


def _snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download  # slow to import: only for hub names

    where = f"{repo}@{revision}" if revision else repo
    try:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
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


def _read_family(folder: Path) -> tuple[Family, DecoderConfig | T5Config]:
    file = folder / "config.json"
    return read_family(read_json(file), file=str(file))


def canonical(stored: str, spellings: Sequence[tuple[str, str]]) -> str:
    """The name that the family's table has for a stored tensor."""
    for pattern, replacement in spellings:
        name, found = re.subn(f"^{pattern}", replacement, stored)
        if found:
            return name
    return stored


def _head_name(family: Family, config: DecoderConfig | T5Config) -> str:
    """The name that the head would have if it were not tied."""
    return family.table(dataclasses.replace(config, tied=False))["head/kernel"].name


def _check_copy(original: tuple[Path, TensorFile, str], copy: tuple[Path, TensorFile, str]) -> None:
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
