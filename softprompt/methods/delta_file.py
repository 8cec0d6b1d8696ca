"""Saves and loads a delta as one safetensors file, with its provenance in the header."""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from safetensors.numpy import load, save

from softprompt.errors import UserError
from softprompt.files import write_bytes

DELTA = "delta.safetensors"  # in a trial's folder
KEY = "softprompt"  # of the only metadata entry in the header


def save_delta(file: epath.PathLike, delta: Any, provenance: Mapping[str, Any]) -> None:
    """Writes a delta atomically. All processes must call this; process 0 writes the file.

    Args:
        file: local or gs://.
        delta: a tree of dicts; the tensors' names are the leaves' paths, such as "a/b".
        provenance: JSON values: the model's name and fingerprint, the method, the trial.
    """
    leaves = sorted(flatten_dict(delta, sep="/").items())
    arrays = {path: np.ascontiguousarray(_on_host(leaf)) for path, leaf in leaves}
    if jax.process_index() == 0:
        write_bytes(file, save(arrays, {KEY: json.dumps(provenance, sort_keys=True)}))


def _on_host(array: Any) -> np.ndarray:
    """The full array as NumPy; all processes must call this."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def load_delta(file: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a delta and its provenance, which is {} if another program wrote the file.

    Raises:
        UserError: the file does not exist, or is not a complete safetensors file.
    """
    file = epath.Path(file)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    try:
        arrays = load(content)
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size]).get("__metadata__", {})
        provenance = json.loads(header.get(KEY, "{}"))
        return unflatten_dict(arrays, sep="/"), provenance
    except Exception as error:  # safetensors has its own exceptions
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
