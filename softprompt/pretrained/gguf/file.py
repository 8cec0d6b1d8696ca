"""The index of a GGUF file: header, metadata and tensors. Weights are read from a memory map.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Shapes
are stored in reverse. The package `gguf` dequantises the values. Its reader is not used: it makes
an array for every token and merge (160 MB and 1.7 s for the metadata of SmolLM2).
"""

import dataclasses
import math
import mmap
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from softprompt.errors import UserError, one_line

VERSIONS = (2, 3)
KINDS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)

# Types of metadata values. Numbers -> their format in `struct`.
TEXT, ARRAY = 8, 9
NUMBERS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i"},
    **{6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of the index: stored type, shape in numpy's order, first byte, number of bytes."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class File:
    """An opened GGUF file: `metadata` by key, `tensors` by name.

    Raises:
        UserError: the file is missing, truncated or not a GGUF file, or a tensor has a type that
            cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such GGUF file")
        try:
            with open(self.path, "rb") as opened:
                self._data = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            cursor = _Cursor(self._data)
            tensors, pairs = _header(cursor)
            self.metadata: dict[str, Any] = {}
            for _ in range(pairs):
                key = cursor.text()
                self.metadata[key] = cursor.value(cursor.number("I"))
            infos = [_info(cursor) for _ in range(tensors)]
            self.tensors = self._index(infos, cursor.at)
        except (ValueError, OSError, OverflowError, RecursionError, struct.error) as e:
            raise UserError(f"{self.path}: not a complete GGUF file ({one_line(e)})") from e

    @property
    def architecture(self) -> str:
        """The architecture, such as "llama", which is the prefix of most keys."""
        return self.need("general.architecture", str)

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of a key, or the default if the key is absent."""
        return self.metadata.get(key, default)

    def need(self, key: str, *kinds: type) -> Any:
        """The metadata value of a required key; `kinds` are its allowed types, if any are given.

        Raises:
            UserError: naming the file, the key and the value.
        """
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path}: metadata has no {key}")
        if kinds and not isinstance(value, kinds):
            allowed = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{self.path}: metadata {key} is {str(value)[:50]}, expected {allowed}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number: the metadata value of "ARCHITECTURE.key".

        Raises:
            UserError: no such key and no default, or another value.
        """
        value = self._of_architecture(key, default, int)
        if value < 1:
            key = f"{self.architecture}.{key}"
            raise UserError(f"{self.path}: metadata {key} is {value}, expected at least 1")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A number: the metadata value of "ARCHITECTURE.key".

        Raises:
            UserError: no such key and no default, or another value.
        """
        return float(self._of_architecture(key, default, float, int))

    def _of_architecture(self, key: str, default: float | None, *kinds: type) -> Any:
        key = f"{self.architecture}.{key}"
        absent = default is not None and key not in self.metadata
        return default if absent else self.need(key, *kinds)

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The values of a tensor in float32, and its stored bytes."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, tensor.size, tensor.start)
        rows = raw.reshape(*tensor.shape[:-1], -1)
        values = gguf.dequantize(rows, gguf.GGMLQuantizationType[tensor.kind])
        return values.reshape(tensor.shape), raw

    def _index(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], at: int
    ) -> dict[str, Tensor]:
        """The tensors by name, after a check that each lies inside the file."""
        alignment = self.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        begin = -(-at // alignment) * alignment
        tensors = {}
        for name, shape, number, offset in infos:
            kind = _kind(self.path, name, number)
            size = _bytes(kind, shape)
            if name in tensors:
                raise ValueError(f"tensor {name!r} is there twice")
            if begin + offset + size > len(self._data):
                raise ValueError(f"it ends before tensor {name!r} does")
            tensors[name] = Tensor(kind, shape, begin + offset, size)
        return tensors


class _Cursor:
    """Reads one value after another."""

    def __init__(self, data: mmap.mmap):
        self.data, self.at = data, 0

    def number(self, kind: str) -> Any:
        (value,) = struct.unpack_from(f"<{kind}", self.data, self.at)
        self.at += struct.calcsize(f"<{kind}")
        return value

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        data, at, end, texts = self.data, self.at, len(self.data), []
        for _ in range(count):  # up to 262,144 times: local names, few calls
            start = at + 8
            at = start + int.from_bytes(data[start - 8 : start], "little")
            if start > end or at > end:
                raise ValueError("it ends inside a text")
            texts.append(data[start:at].decode())
        self.at = at
        return texts

    def value(self, kind: int) -> Any:
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            return self.array(self.number("I"), self.number("Q"))
        if kind not in NUMBERS:
            raise ValueError(f"type {kind} of a metadata value is unknown")
        return self.number(NUMBERS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == TEXT:
            return self.texts(count)
        if kind in NUMBERS:
            values = np.frombuffer(self.data, np.dtype(NUMBERS[kind]), count, self.at)
            self.at += values.nbytes
            return values.tolist()
        return [self.value(kind) for _ in range(count)]


def _header(cursor: _Cursor) -> tuple[int, int]:
    """The numbers of tensors and of metadata pairs."""
    magic = bytes(cursor.data[:4])
    if magic != b"GGUF":
        raise ValueError(f"it begins with {magic!r}, not b'GGUF'")
    cursor.at = 4
    version = cursor.number("I")
    if version not in VERSIONS:
        # A file of the other byte order has its version in the upper half.
        raise ValueError(
            f"version {version}; known: {', '.join(map(str, VERSIONS))}, little-endian"
        )
    return cursor.number("Q"), cursor.number("Q")


def _info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape, number of the type, and offset of a tensor."""
    name, rank = cursor.text(), cursor.number("I")
    shape = tuple(cursor.number("Q") for _ in range(rank)) if rank <= 4 else ()
    if not shape or min(shape) < 1:
        raise ValueError(f"tensor {name!r} has rank {rank} and shape {list(shape)}")
    return name, shape[::-1], cursor.number("I"), cursor.number("Q")


def _kind(path: Path, name: str, number: int) -> str:
    """The name of a tensor's type; raises if it is not in `KINDS`."""
    try:
        kind = gguf.GGMLQuantizationType(number).name
    except ValueError:
        kind = str(number)
    if kind not in KINDS:
        raise UserError(
            f"{path}: tensor {name} has type {kind}, which cannot be read; known: "
            f"{', '.join(KINDS)}"
        )
    return kind


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    """Number of bytes of a tensor; its rows consist of whole blocks."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    if shape[-1] % block:
        raise ValueError(f"a row of {shape[-1]} values is no whole number of {kind} blocks")
    return math.prod(shape) // block * size
