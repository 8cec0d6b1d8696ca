"""Files of named tensors: safetensors, and PyTorch's own format if PyTorch is installed."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from softprompt.errors import UserError, one_line

# PyTorch's types -> their names in safetensors.
TYPES = {
    "torch.float64": "F64",
    "torch.float32": "F32",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int64": "I64",
    "torch.int32": "I32",
    "torch.int16": "I16",
    "torch.int8": "I8",
    "torch.uint8": "U8",
    "torch.bool": "BOOL",
}


@dataclass(frozen=True)
class TensorFile:
    """An opened file: which tensors it holds, and how to read one or some of its rows.

    Attributes:
        tensors: name -> (stored type, shape).
        read: (name, rows) -> values.
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    read: Callable[[str, slice], np.ndarray]


ALL = slice(None)


def open_file(file: Path) -> TensorFile:
    """Opens a .safetensors or .bin file. Tensors stay on disk until they are read.

    Raises:
        UserError: the file has another format, is incomplete or holds code, or it needs PyTorch,
            which is not installed.
    """
    return _open_pytorch(file) if file.suffix == ".bin" else _open_safetensors(file)


def _open_safetensors(file: Path) -> TensorFile:
    def reopen() -> Any:
        try:
            return safe_open(file, framework="np")
        except (SafetensorError, OSError) as e:
            raise UserError(f"{file}: not a complete safetensors file ({e})") from e

    def read(name: str, rows: slice) -> np.ndarray:
        with reopen() as opened:  # closed again, or the memory map keeps what was read
            return opened.get_tensor(name) if rows == ALL else opened.get_slice(name)[rows]

    tensors = {}
    with reopen() as opened:
        for name in opened.keys():
            part = opened.get_slice(name)
            tensors[name] = (part.get_dtype(), tuple(part.get_shape()))
    return TensorFile(tensors, read)


def _open_pytorch(file: Path) -> TensorFile:
    """Opens a pickle with `weights_only`, which runs no code. Source: `torch.load`."""
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{file}: a PyTorch file can be read only if PyTorch is installed (pip install torch); "
            "safetensors need none"
        ) from e
    state = _load(torch, file)
    if not isinstance(state, dict) or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise UserError(f"{file}: expected a dict of tensors")

    def read(name: str, rows: slice) -> np.ndarray:
        values = state[name].detach()
        values = values if rows == ALL else values[rows]
        if values.dtype == torch.bfloat16:  # numpy has no bfloat16
            return values.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return values.numpy()

    tensors = {
        name: (TYPES.get(str(x.dtype), str(x.dtype)), tuple(x.shape)) for name, x in state.items()
    }
    return TensorFile(tensors, read)


def _load(torch: Any, file: Path) -> Any:
    options = {"map_location": "cpu", "weights_only": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols: the file is read or refused
            try:
                return torch.load(file, mmap=True, **options)
            except RuntimeError as e:
                if "mmap" not in str(e):
                    raise
                return torch.load(file, **options)  # the format before PyTorch 1.6 cannot be mapped
    except UnpicklingError as e:
        raise UserError(
            f"{file}: refused: it holds more than tensors, which may be code ({one_line(e)})"
        ) from e
    except Exception as e:  # a broken zip or pickle raises errors of many types
        raise UserError(f"{file}: not a complete PyTorch file ({one_line(e)})") from e
