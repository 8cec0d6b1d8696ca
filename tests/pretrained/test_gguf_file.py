"""The index of GGUF files, held against the package's own reader; what is broken, in one line."""

import random
import struct

import gguf
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.pretrained.gguf import File
from softprompt.pretrained.gguf.file import KINDS
from softprompt.pretrained.loading import find
from tests.pretrained.ggufs import write_gguf

Quant = gguf.GGMLQuantizationType


def compare(path):
    """Metadata, index, bytes and values of a file equal what the package's reader says."""
    ours, theirs = File(path), gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in theirs.fields.items()}
    assert ours.metadata == {k: v for k, v in fields.items() if not k.startswith("GGUF.")}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.kind == tensor.tensor_type.name
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        values, raw = ours.read(tensor.name)
        np.testing.assert_array_equal(raw, tensor.data.reshape(-1).view(np.uint8))
        expected = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(values, expected.reshape(mine.shape))
        assert values.dtype == np.float32


@pytest.mark.matrix
@pytest.mark.real
def test_the_real_file():
    compare(find("smollm2-135m-instruct-q4"))


def blocks(kind, rows=3, columns=512):
    """A tensor's bytes as stored: random bits, whatever they mean."""
    block, size = gguf.GGML_QUANT_SIZES[Quant[kind]]
    rng = np.random.default_rng(0)
    if kind == "F32":
        return rng.standard_normal((rows, columns)).astype(np.float32)
    if kind == "F16":
        return rng.standard_normal((rows, columns)).astype(np.float16)
    # Small bytes only: no scale is a NaN.
    return rng.integers(0, 60, (rows, columns // block * size), dtype=np.uint8)


@pytest.mark.parametrize("alignment", [32, 64, 8])
def test_every_kind_of_metadata_and_tensor(tmp_path, alignment):
    # Breaks if: a type's width or sign is another, the alignment is not read, a shape not reversed.
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name, value in {"int8": -7, "uint8": 200, "int16": -300, "uint16": 60000}.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    for name, value in {
        "int32": -70000,
        "uint32": 2**31,
        "int64": -(2**40),
        "uint64": 2**63,
    }.items():
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "naïve ▁ 🙂")
    writer.add_array("a.texts", ["", "ab", "▁ü"])
    writer.add_array("a.floats", [0.5, -1.25])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.empty", [])
    for kind in KINDS:
        writer.add_tensor(f"t.{kind}", blocks(kind), raw_dtype=Quant[kind])
    writer.add_tensor("t.vector", np.arange(5, dtype=np.float32))
    writer.add_tensor("t.cube", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    compare(path)


@pytest.mark.parametrize("keep", [0, 3, 4, 10, 30, 100, 2000, 9000, -1, -4000])
def test_a_truncated_file_is_one_line_that_names_it(tmp_path, keep):
    # Breaks if: _index does not compare a tensor's end with the file's.
    path = write_gguf(tmp_path / "short.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"short\.gguf: not a complete GGUF file \(") as error:
        File(path)
    assert "\n" not in str(error.value)


def test_garbled_bytes_are_an_error_or_other_values_but_nothing_else(tmp_path):
    # Breaks if: the ranks or counts of a file are trusted, or struct.error is not caught.
    path = write_gguf(tmp_path / "a.gguf")
    data, rng = path.read_bytes(), random.Random(0)
    index = data.find(b"general.alignment") + data.find(b"output_norm.weight") + 100
    refused = 0
    for _ in range(300):
        spoilt = bytearray(data)
        at = rng.randrange(min(index, len(data)))
        spoilt[at : at + 4] = rng.randbytes(4)
        path.write_bytes(spoilt)
        try:
            File(path)
        except UserError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 50


def test_nested_arrays_end(tmp_path):
    path = tmp_path / "deep.gguf"
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    path.write_bytes(head + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 100_000)
    with pytest.raises(UserError, match="not a complete GGUF file"):
        File(path)


def test_the_other_byte_order_and_an_old_version(tmp_path):
    path = tmp_path / "a.gguf"
    for version in (struct.pack(">I", 3), struct.pack("<I", 1)):
        path.write_bytes(b"GGUF" + version + bytes(16))
        with pytest.raises(UserError, match="version [0-9]+; known: 2, 3, little-endian"):
            File(path)


@pytest.mark.parametrize("kind", ["IQ4_NL", "I32", "F64"])
def test_an_unreadable_type_names_tensor_and_type(tmp_path, kind):
    # Breaks if: _kind returns whatever the package knows.
    block, size = gguf.GGML_QUANT_SIZES[Quant[kind]]
    path = tmp_path / "a.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", np.zeros((2, 64 // block * size), np.uint8), raw_dtype=Quant[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=rf"a\.gguf: tensor t has type {kind}, .*known: F32, F16, "):
        File(path)


def test_a_type_of_the_future_is_said_by_its_number(tmp_path):
    path = write_gguf(tmp_path / "a.gguf")
    data = bytearray(path.read_bytes())
    at = data.find(b"output_norm.weight") + len("output_norm.weight") + 4 + 8
    assert data[at : at + 4] == struct.pack("<I", 0)
    data[at : at + 4] = struct.pack("<I", 999)
    path.write_bytes(data)
    with pytest.raises(UserError, match="tensor output_norm.weight has type 999"):
        File(path)


def test_metadata_of_another_type_is_one_line(tmp_path):
    file = File(write_gguf(tmp_path / "a.gguf"))
    with pytest.raises(UserError, match="metadata has no llama.nothing"):
        file.size("nothing")
    with pytest.raises(UserError, match=r"metadata general.architecture is llama, expected int"):
        file.need("general.architecture", int)
    file.metadata["llama.block_count"] = 0
    with pytest.raises(UserError, match=r"llama.block_count is 0, expected at least 1"):
        file.size("block_count")


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.gguf: no such GGUF file"):
        File(tmp_path / "nothing.gguf")
