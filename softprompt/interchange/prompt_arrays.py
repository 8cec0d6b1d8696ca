"""Prompts as plain arrays [P, D]: what google-research/prompt-tuning saves and loads.

Its files are .npy files, of two kinds. Released prompts end in .npy; those that training writes
beside its T5X checkpoints, `numpy_checkpoints/checkpoint_STEP/encoder.prompt.prompt.prompt`, have
no such ending, and may be bfloat16, which numpy stores as two bytes of no type.

Source: `np_save`, `Checkpointer.save_numpy` and `np_load` of github.com/google-research/
prompt-tuning.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict

from softprompt.errors import UserError
from softprompt.interchange.adapter_files import check_finite
from softprompt.interchange.peft import check_context
from softprompt.interchange.prompts import prompt_scope
from softprompt.models import ModelConfig

MAGIC = b"\x93NUMPY"


def is_array(file: Path) -> bool:
    """Whether a file is a .npy file, whatever its name."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def to_npy(delta: Mapping[str, Any], model: ModelConfig, method: Mapping[str, Any]) -> bytes:
    """The bytes of a prompt's .npy file, float32; the arguments are as for `to_peft`.

    Raises:
        UserError: the delta is not one prompt, or it would be read as another.
    """
    leaves = flatten_dict(delta, sep="/")
    check_context(leaves, model, method, reader="google-research/prompt-tuning")
    path = f"{prompt_scope(model)}prompt"
    if list(leaves) != [path]:
        raise UserError(
            f"method {method['name']!r} cannot be exported as an array; allowed: prompt, whose "
            f"delta is {path} alone"
        )
    written = io.BytesIO()
    np.save(written, np.ascontiguousarray(leaves[path], np.float32), allow_pickle=False)
    return written.getvalue()


def from_npy(file: Path, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The delta of a prompt's .npy file, and its keys of a config's method section.

    Raises:
        UserError: not a .npy file, or an array of another type or shape than floating-point [P, D]
            for this model, or one with entries that are not finite.
    """
    try:
        array = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{file}: not a readable .npy file ({error})") from error
    if array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16)
    floating = array.dtype == ml_dtypes.bfloat16 or np.issubdtype(array.dtype, np.floating)
    width = model.prompt_width
    if not floating or array.ndim != 2 or array.shape[1] != width or not len(array):
        raise UserError(
            f"{file}: an array of {array.dtype} {list(array.shape)}; allowed for this model: "
            f"floating-point numbers of shape [length, {width}]"
        )
    check_finite(file, {"the array": array})
    prompt: dict[str, Any] = {"prompt": np.ascontiguousarray(array, np.float32)}
    method = {"name": "prompt", "length": len(array)}
    if not prompt_scope(model):
        return prompt, method
    return {"encoder": prompt}, method | {"place": "encoder"}
