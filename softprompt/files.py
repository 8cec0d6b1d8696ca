"""Atomic writes of files, local or gs://, and reads of JSON."""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from etils import epath

from softprompt.errors import UserError


def write_text(file: epath.PathLike, text: str) -> None:
    """Writes a text file atomically, and creates its folder; local or gs://."""
    write_bytes(file, text.encode())


def write_bytes(file: epath.PathLike, content: bytes) -> None:
    """Writes a file atomically, and creates its folder; local or gs://."""
    file = epath.Path(file)
    temporary = file.parent / f".{file.name}.{os.getpid()}.tmp"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror or error}") from error


def read_json(file: epath.PathLike) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, or no JSON object in it.
    """
    try:
        value = json.loads(epath.Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: expected a JSON object")
    return value


def check_reachable(path: epath.PathLike) -> None:
    """Checks that a file system for a path is installed, without touching it.

    From then on listings of buckets are not cached, also those of `epath`: other processes write
    there too.

    Raises:
        UserError: the path is at gs://, and gcsfs is not installed.
    """
    if not os.fspath(path).startswith("gs://"):
        return
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{path} needs gcsfs; install the extra gcs: softprompt[gcs]")
    from fsspec.config import conf  # with gcsfs

    conf["gs"] = {"use_listings_cache": False}  # "false", as from the environment, is true


def check_writable(folder: epath.PathLike) -> None:
    """Checks that a folder can be created or written to, without creating it.

    Raises:
        UserError: part of the path is not a folder, or is not writable, or see `check_reachable`.
    """
    check_reachable(folder)
    path = os.fspath(folder)
    if "://" in path:
        return  # a write to a bucket raises its own error
    existing = Path(path).absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{path}: {existing} is not a folder; give another --workdir")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path}: {existing} may not be written to; give another --workdir")
