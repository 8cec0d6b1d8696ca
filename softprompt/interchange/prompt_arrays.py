"""Prompts as plain arrays [P, D]: what google-research/prompt-tuning saves and loads.

It writes .npy files: the released prompts under that ending, and in training, beside its T5X
checkpoints, `numpy_checkpoints/checkpoint_STEP/encoder.prompt.prompt.prompt` without one, perhaps
in bfloat16, which numpy stores as two bytes without a meaning.

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
from softprompt.interchange.adapter import check_finite
from softprompt.interchange.module_names import Config
from softprompt.interchange.peft import Facts, check_contexts
from softprompt.interchange.prompts import prompt_place

MAGIC = b"\x93NUMPY"


def is_array(file: Path) -> bool:
    """Whether a file is an array of numpy's, whatever its ending."""
    with file.open("rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


def to_npy(delta: Mapping[str, Any], facts: Facts) -> bytes:
    """The bytes of a prompt's .npy file, float32.

    Raises:
        UserError: the delta is no single prompt, or one that would be read as another.
    """
    leaves = flatten_dict(delta, sep="/")
    check_contexts(leaves, facts, reader="google-research/prompt-tuning")
    name = f"{prompt_place(facts.model)}prompt"
    if list(leaves) != [name]:
        raise UserError(
            f"method {facts.method['name']!r} cannot be exported as an array, which is one prompt: "
            f"the delta has the leaves {', '.join(leaves) or 'of none'}"
        )
    written = io.BytesIO()
    np.save(written, np.ascontiguousarray(leaves[name], np.float32), allow_pickle=False)
    return written.getvalue()


def from_npy(file: Path, model: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The delta of a prompt's array, and its keys of a config's method section.

    Raises:
        UserError: not an array, one of other things than finite numbers, or of another shape than
            [P, D] for this model.
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
    place = prompt_place(model)
    prompt: dict[str, Any] = {"prompt": np.ascontiguousarray(array, np.float32)}
    method = {"name": "prompt", "length": len(array)}
    return ({"encoder": prompt}, method | {"place": "encoder"}) if place else (prompt, method)
