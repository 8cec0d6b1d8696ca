"""Saving is the inverse of loading. That transformers reads it is in tests/parity/test_save.py."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file

from softprompt.errors import UserError
from softprompt.pretrained import hf
from softprompt.pretrained.loading import load_model
from softprompt.pretrained.save import save_folder
from tests.families import VARIANTS, write_family_folder
from tests.pretrained.ggufs import write_gguf
from tests.tiny import write_llama_folder
from tests.tiny_t5 import VARIANTS as T5_VARIANTS
from tests.tiny_t5 import write_complete_t5


def saved(loaded, folder, **options):
    return save_folder(folder, loaded.config, loaded.weights, loaded.tokenizer, **options)


def assert_same(a, b):
    assert a.config == b.config
    assert jax.tree.structure(a.weights) == jax.tree.structure(b.weights)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a.weights), jax.tree.leaves(b.weights), strict=True
    ):
        assert x.dtype == y.dtype, path
        np.testing.assert_array_equal(x, y, err_msg=str(path))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_family_is_loaded_bit_for_bit(tmp_path, name, dtype):
    # Breaks if: any key of a family's `raw` is another, a rule's offset is not taken off again, or
    # one part of a fused tensor is left out.
    loaded = load_model(str(write_family_folder(tmp_path / "a", name)), dtype=dtype)
    again = load_model(str(saved(loaded, tmp_path / "b")), dtype=dtype)
    assert_same(again, loaded)
    if dtype == "float32" and not name.startswith("gemma"):  # whose scales lose their 1 again
        assert again.fingerprint == loaded.fingerprint
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert raw["dtype"] == dtype
    if name not in ("llama-linear", "mistral"):
        assert raw["architectures"] == VARIANTS[name]["architectures"]


@pytest.mark.parametrize("family", T5_VARIANTS)
def test_a_saved_t5_is_loaded_bit_for_bit(tmp_path, family):
    # Breaks if: what ties the head is not said.
    sizes = {key: value for key, value in T5_VARIANTS[family].items() if key != "vocab"}
    loaded = load_model(str(write_complete_t5(tmp_path / "a", **sizes)))
    again = load_model(str(saved(loaded, tmp_path / "b")))
    assert_same(again, loaded)
    assert again.fingerprint == loaded.fingerprint
    assert again.tokenizer.add_eos


@pytest.mark.parametrize("limit", [1, 20_000, 10**9])
@pytest.mark.parametrize("name", ["gpt2", "neox", "gemma3"])
def test_shards(tmp_path, name, limit):
    # Breaks if: a shard is larger than asked, or a fused tensor is in two of them.
    loaded = load_model(str(write_family_folder(tmp_path / "a", name)))
    folder = saved(loaded, tmp_path / "b", shard_bytes=limit)
    assert_same(load_model(str(folder)), loaded)
    files = [load_file(file) for file in sorted(folder.glob("*.safetensors"))]
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1)
    for tensors in files:
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= limit
    if limit == 1:
        total = json.loads(index.read_text())["metadata"]["total_size"]
        assert total == sum(x.nbytes for tensors in files for x in tensors.values())
        assert total == sum(leaf.nbytes for leaf in jax.tree.leaves(loaded.weights))


def test_what_the_original_says_beside_the_decoder_is_kept(tmp_path):
    # Breaks if: config.json is written anew although there is an original, or its dtype is kept.
    folder = write_llama_folder(tmp_path / "a")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, "_name_or_path": "of its own"}))
    (folder / "generation_config.json").write_text("{}")
    loaded = load_model(str(folder), dtype="bfloat16")
    after = saved(loaded, tmp_path / "b", original=folder)
    written = json.loads((after / "config.json").read_text())
    assert (written["_name_or_path"], written["dtype"]) == ("of its own", "bfloat16")
    assert "torch_dtype" not in written
    assert_same(load_model(str(after), dtype="bfloat16"), loaded)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (after / name).read_bytes() == (folder / name).read_bytes()
    other = write_llama_folder(tmp_path / "c", ffn=32)
    with pytest.raises(UserError, match="its config.json is not that of the model to be saved"):
        saved(loaded, tmp_path / "d", original=other)


def test_a_gguf_file_becomes_a_folder(tmp_path):
    # Breaks if: the tokenizer is not written, or BOS is not, or the ids of BOS and EOS are not.
    file = write_gguf(tmp_path / "a.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    loaded = load_model(str(file))
    again = load_model(str(saved(loaded, tmp_path / "b")))
    assert_same(again, loaded)
    for text in ("Review: a film.\n\n  1234", "<|bos|>x<|eos|>"):
        assert again.tokenizer.encode(text) == loaded.tokenizer.encode(text)
    for field in ("bos_id", "eos_id", "add_bos", "add_eos"):
        assert getattr(again.tokenizer, field) == getattr(loaded.tokenizer, field)
    raw = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (raw["bos_token_id"], raw["eos_token_id"]) == (0, 1)


def test_trained_weights_are_saved_not_the_loaded(tmp_path):
    loaded = load_model(str(write_llama_folder(tmp_path / "a")))
    trained = jax.tree.map(lambda x: x * 2, loaded.weights)
    after = dataclasses.replace(loaded, weights=trained)
    assert_same(load_model(str(saved(after, tmp_path / "b"))), after)


def test_what_cannot_be_saved_leaves_nothing(tmp_path, monkeypatch):
    # Breaks if: the partial folder is kept, or a folder with something in it is written into.
    loaded = load_model(str(write_llama_folder(tmp_path / "a")))
    with pytest.raises(UserError, match=r"a: not an empty folder"):
        saved(loaded, tmp_path / "a")
    odd = dataclasses.replace(loaded, config=dataclasses.replace(loaded.config, attn_softcap=3.0))
    with pytest.raises(UserError, match="no family of transformers computes what this config"):
        saved(odd, tmp_path / "b")
    small = load_model(str(tmp_path / "a"), quantize="int8")
    with pytest.raises(UserError, match="quantised weights cannot be saved"):
        saved(small, tmp_path / "b")
    less = dict(loaded.weights)
    del less["final_norm"]
    with pytest.raises(UserError, match="weights do not match the config: final_norm/scale"):
        saved(dataclasses.replace(loaded, weights=less), tmp_path / "b")
    monkeypatch.setattr("softprompt.pretrained.save.save_file", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        saved(loaded, tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_every_conversion_of_a_folder_is_a_view(tmp_path):
    """What saving rests on."""
    folders = [write_family_folder(tmp_path / name, name) for name in VARIANTS]
    opened = [hf.open_folder(folder)[1] for folder in folders]
    opened.append(hf.open_folder(write_complete_t5(tmp_path / "t5"))[1])
    for table in opened:
        for path, part in table.items():
            tensor = np.zeros(part.source, np.float32)
            part.convert(tensor)[...] = 1
            assert tensor.sum() == np.prod(part.leaf), path
    assert len(flatten_dict(load_model(str(folders[0])).weights)) == len(opened[0])


def test_a_gguf_file_that_asks_for_a_bos_and_has_none(tmp_path):
    # Breaks if: the name of the BOS is looked up where there is none.
    asked = {"tokenizer.ggml.add_bos_token": True}
    without = "tokenizer.ggml.bos_token_id"
    loaded = load_model(str(write_gguf(tmp_path / "a.gguf", metadata=asked, without=without)))
    again = load_model(str(saved(loaded, tmp_path / "b")))
    assert (again.tokenizer.bos_id, again.tokenizer.add_bos) == (None, False)


def test_the_text_part_of_a_gemma_that_sees_images(tmp_path):
    # Breaks if: the original's config.json is kept, and with it the images that are not saved.
    text = {key: value for key, value in VARIANTS["gemma3"].items() if key != "architectures"}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    folder = write_family_folder(tmp_path / "a", "gemma3", raw=raw)
    loaded = load_model(str(folder))
    after = saved(loaded, tmp_path / "b", original=folder)
    written = json.loads((after / "config.json").read_text())
    assert written["architectures"] == ["Gemma3ForCausalLM"]
    assert "text_config" not in written
    assert_same(load_model(str(after)), loaded)


def test_an_original_without_a_tokenizer(tmp_path):
    # Breaks if: the tokenizer is written only where there is no original.
    folder = write_llama_folder(tmp_path / "a")
    loaded = load_model(str(folder))
    for file in folder.glob("tokenizer*"):
        file.unlink()
    (folder / "generation_config.json").write_text("{}")
    after = saved(loaded, tmp_path / "b", original=folder)
    assert (after / "generation_config.json").exists()
    assert load_model(str(after)).tokenizer.encode("a film") == loaded.tokenizer.encode("a film")


def test_a_place_that_cannot_be_written(tmp_path):
    # Breaks if: errors of the disk are not caught.
    loaded = load_model(str(write_llama_folder(tmp_path / "a")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/b: cannot be written \(.*Not a directory"):
        saved(loaded, tmp_path / "file" / "b")
