"""Folders of PyTorch files, where there is no PyTorch. With PyTorch: tests/parity/test_bin.py."""

import importlib.util
import sys

import pytest

from softprompt.errors import UserError
from softprompt.pretrained.loading import load_model
from tests.tiny import write_llama_folder


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_without_pytorch_it_is_said_what_to_install(tmp_path, monkeypatch, name):
    # Breaks if: the import's error is not caught.
    if importlib.util.find_spec("torch"):
        monkeypatch.setitem(sys.modules, "torch", None)
    write_llama_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    if name != "pytorch_model.bin":
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(f'{{"weight_map": {{"model.norm.weight": "{name}"}}}}')
    with pytest.raises(UserError, match=rf"{name}: .*pip install torch") as e:
        load_model(str(tmp_path))
    assert "\n" not in str(e.value)


def test_safetensors_are_read_where_both_are(tmp_path):
    # Breaks if: the .bin file is preferred.
    write_llama_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    load_model(str(tmp_path))


def test_an_absent_pytorch_shard_is_named(tmp_path):
    write_llama_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}')
    with pytest.raises(UserError, match="not there: pytorch_model-00001-of-00002.bin"):
        load_model(str(tmp_path))
