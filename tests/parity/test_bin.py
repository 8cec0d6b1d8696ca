"""Folders of PyTorch files, read by torch.load: single and sharded, and what it must refuse."""

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from softprompt.errors import UserError
from softprompt.pretrained.loading import load_model
from tests.families import write_family_folder
from tests.tiny import write_llama_folder
from tests.tiny_t5 import load_weights, write_t5_folder

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")


def to_bin(folder: Path, shards: int = 1, dtype: Any = None, **options: Any) -> None:
    """Turns the folder's safetensors file into PyTorch files."""
    file = folder / "model.safetensors"
    tensors = {name: torch.tensor(x).to(dtype) for name, x in load_file(file).items()}
    file.unlink()
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin", **options)
        return
    names = [f"pytorch_model-{i + 1:05}-of-{shards:05}.bin" for i in range(shards)]
    where = {name: names[i % shards] for i, name in enumerate(tensors)}
    for shard in names:
        torch.save({n: x for n, x in tensors.items() if where[n] == shard}, folder / shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt-350m", "gemma3"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_weights_are_those_of_safetensors(tmp_path, name, shards):
    # Breaks if: one shard is left out, or the stored type has another name.
    expected = load_model(str(write_family_folder(tmp_path, name)))
    to_bin(tmp_path, shards)
    ours = load_model(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, ours.weights, expected.weights)
    assert ours.fingerprint == expected.fingerprint


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_bfloat16_and_files_of_old_versions(tmp_path, options):
    # Breaks if: mmap is asked of a file that has none, or bfloat16 is not viewed as such.
    exact = load_model(str(write_llama_folder(tmp_path)), dtype="bfloat16")
    to_bin(tmp_path, dtype=torch.bfloat16, **options)
    ours = load_model(str(tmp_path), dtype="bfloat16")
    kernel = ours.weights["layers"]["mlp"]["up"]["kernel"]
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(kernel, exact.weights["layers"]["mlp"]["up"]["kernel"])


def test_t5(tmp_path):
    load = {"dtype": np.dtype(np.float32), "put": lambda path, leaf: leaf}
    folder = write_t5_folder(tmp_path)
    _, expected, _ = load_weights(folder, **load)
    to_bin(folder, 2)
    _, weights, _ = load_weights(folder, **load)
    jax.tree.map(np.testing.assert_array_equal, weights, expected)


def test_a_head_that_is_the_embeddings(tmp_path):
    # Breaks if: the copy is not compared.
    write_llama_folder(tmp_path)
    to_bin(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    state = torch.load(file, weights_only=True)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, file)
    load_model(str(tmp_path))
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    torch.save(state, file)
    with pytest.raises(UserError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        load_model(str(tmp_path))


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("kind", ["pickle", "zip"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind):
    # Breaks if: weights_only is False.
    write_llama_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file, sign = tmp_path / "pytorch_model.bin", tmp_path / "it-ran"
    if kind == "pickle":
        file.write_bytes(pickle.dumps({"a": Code(sign)}))
    else:
        torch.save({"a": Code(sign)}, file)
        assert zipfile.is_zipfile(file)
    with pytest.raises(UserError, match=r"pytorch_model\.bin: refused: it holds more than") as e:
        load_model(str(tmp_path))
    assert "\n" not in str(e.value)
    assert not sign.exists()


def test_files_that_are_none(tmp_path):
    write_llama_folder(tmp_path)
    to_bin(tmp_path)
    file = tmp_path / "pytorch_model.bin"
    data = file.read_bytes()
    for keep in (0, 100, len(data) // 2, len(data) - 10):
        file.write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"pytorch_model\.bin: ") as error:
            load_model(str(tmp_path))
        assert "\n" not in str(error.value)
    for value in ([1, 2], {"a": 1}):
        torch.save(value, file)
        with pytest.raises(UserError, match=r"pytorch_model\.bin: expected a dict of tensors"):
            load_model(str(tmp_path))
