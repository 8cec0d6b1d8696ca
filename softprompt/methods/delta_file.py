"""A delta as one safetensors file, with where it came from in the header."""

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

KEY = "softprompt"  # of the header's one metadata entry


def save_delta(file: epath.PathLike, delta: Any, provenance: Mapping[str, Any]) -> None:
    """Writes a delta whole or not at all. Of several processes all call it, and the first writes.

    Args:
        file: local or gs://.
        delta: a tree of dicts; leaf "a/b" is named by its path.
        provenance: small JSON: the model's name and fingerprint, the method, the trial.
    """
    leaves = sorted(flatten_dict(delta, sep="/").items())
    arrays = {path: np.ascontiguousarray(_on_host(leaf)) for path, leaf in leaves}
    if jax.process_index() == 0:
        write_bytes(file, save(arrays, {KEY: json.dumps(provenance, sort_keys=True)}))


def _on_host(array: Any) -> np.ndarray:
    """The whole array in the host's memory; of several processes all must ask."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def load_delta(file: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a delta and its provenance, {} where another program wrote the file.

    Raises:
        UserError: no such file, or not a whole safetensors file.
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
    except Exception as error:  # safetensors raises its own kinds
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
