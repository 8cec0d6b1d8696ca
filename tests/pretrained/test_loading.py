"""From a name to a model: which names there are, where leaves go, what a fingerprint says."""

import dataclasses
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softprompt.errors import UserError
from softprompt.pretrained import hf, t5x
from softprompt.pretrained.loading import find, load_model
from softprompt.pretrained.name_tables import read_weights
from tests.pretrained.ggufs import write_gguf
from tests.pretrained.t5x_folders import write_t5x
from tests.tiny import tiny_decoder, write_llama_folder
from tests.tiny_t5 import hf_t5_config, write_complete_t5


def test_tiny_decoder_is_the_tiny_folder(tmp_path, x64):
    folder = load_model(str(write_llama_folder(tmp_path, seed=3, tied=False)))
    model, weights = tiny_decoder(seed=3, tied=False)
    assert model.config == folder.config
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b), weights, folder.weights
    )
    logits_TV = model.apply({"params": weights}, jnp.arange(20))
    assert logits_TV.dtype == jnp.float64
    assert 1 < jnp.std(logits_TV) < 10


def test_weights_fit_the_model(tmp_path):
    loaded = load_model(str(write_llama_folder(tmp_path, tied=False)))
    made = jax.eval_shape(loaded.model.init, jax.random.key(0), jnp.arange(4))["params"]
    assert jax.tree.map(jnp.shape, loaded.weights) == jax.tree.map(jnp.shape, made)


def test_dtype_is_that_of_every_matrix_and_of_the_model(tmp_path):
    write_llama_folder(tmp_path)
    exact = load_model(str(tmp_path))
    half = load_model(str(tmp_path), dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(half.weights):
        assert leaf.dtype == (jnp.float32 if path[-1].key == "scale" else jnp.bfloat16)
    assert half.model.dtype == jnp.bfloat16
    assert half.fingerprint == exact.fingerprint
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)),
        half.weights,
        exact.weights,
    )
    with pytest.raises(UserError, match="unknown dtype 'float16'.*known: bfloat16, float32"):
        load_model(str(tmp_path), dtype="float16")


def test_put_is_given_every_leaf_once(tmp_path):
    seen = {}

    def put(path, array):
        assert path not in seen
        seen[path] = array.shape
        return jnp.asarray(array)

    loaded = load_model(str(write_llama_folder(tmp_path)), put=put)
    leaves = jax.tree_util.tree_leaves_with_path(loaded.weights)
    assert seen == {"/".join(key.key for key in keys): leaf.shape for keys, leaf in leaves}


def test_fingerprint_follows_the_content(tmp_path):
    # Breaks if: _digest leaves out the raw bytes.
    write_llama_folder(tmp_path)
    first = load_model(str(tmp_path)).fingerprint
    assert len(first) == 16
    assert load_model(str(tmp_path)).fingerprint == first
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert load_model(str(tmp_path)).fingerprint != first


def test_one_stacked_leaf_is_in_memory_at_a_time(tmp_path):
    # Breaks if: read_weights keeps its leaves, or _fill collects a leaf's tensors before stacking.
    write_llama_folder(tmp_path, width=256, layers=8, ffn=512, heads=8)
    config, table, source = hf.open_folder(tmp_path)
    sizes = {}
    tracemalloc.start()
    try:
        read_weights(
            source,
            table,
            dtype=np.dtype(np.float32),
            put=lambda path, leaf: sizes.update({path: leaf.nbytes}),
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    tensor = max(sizes.values()) / config.layers
    assert peak < max(sizes.values()) + 2.5 * tensor


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instruct-q5", "did you mean 'smollm2-135m-instruct-q4'"),
        ("gpt2", "unknown model 'gpt2' .did you mean 'openai-community/gpt2'"),
        ("./nowhere", "model './nowhere': no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("nowhere.gguf", "no such file or folder"),
        ("org/repo", "could not fetch model org/repo from the hub"),
    ],
)
def test_names_that_lead_nowhere(name, message):
    with pytest.raises(UserError, match=message):
        load_model(name)


def test_a_file_of_another_kind_and_a_revision_out_of_place(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="neither a folder nor a .gguf file"):
        load_model(str(tmp_path / "model.bin"))
    for name in (str(tmp_path), "smollm2-135m-instruct-q4"):
        with pytest.raises(UserError, match="revision 'main' applies to hub models only"):
            load_model(name, revision="main")


@pytest.fixture
def t5_folder(tmp_path):
    return write_complete_t5(tmp_path / "hf")


def test_a_t5x_checkpoint_is_a_model_like_any_other(t5_folder, tmp_path):
    # Breaks if: the checkpoint is not known for one, or a tokenizer is looked for in it.
    (tmp_path / "t5x").mkdir()
    tensors = load_file(t5_folder / "model.safetensors")
    checkpoint = write_t5x(tmp_path / "t5x", tensors)
    theirs = load_model(str(t5_folder))
    ours = load_model(str(checkpoint), tokenizer_name=str(t5_folder))
    assert ours.encoder_decoder
    assert dataclasses.replace(ours.config, context_length=0) == dataclasses.replace(
        theirs.config, context_length=0
    )
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)
    assert ours.tokenizer.encode("a film") == theirs.tokenizer.encode("a film")
    assert ours.tokenizer.add_eos
    with pytest.raises(UserError, match="revision 'v1' applies to hub models only"):
        load_model(str(checkpoint), revision="v1")


def test_a_t5x_checkpoint_has_the_tokenizer_of_t5_11(t5_folder, tmp_path, monkeypatch):
    # Breaks if: weights are fetched beside the tokenizer.
    checkpoint = write_t5x(tmp_path, load_file(t5_folder / "model.safetensors"))
    asked = []

    def download(repo, **options):
        asked.append((repo, options))
        return t5_folder

    monkeypatch.setattr(hf, "download", download)
    assert load_model(str(checkpoint)).tokenizer.eos_id == 1
    assert asked == [("google/t5-v1_1-base", {"patterns": hf.TOKENIZER_FILES})]


def test_a_bucket_is_taken_for_a_checkpoint(monkeypatch):
    monkeypatch.setattr(t5x, "open_folder", lambda folder: (_ for _ in ()).throw(UserError(folder)))
    with pytest.raises(UserError, match="^gs://some/folder$"):
        load_model("gs://some/folder")


def test_a_t5_of_a_gguf_file_is_a_model_like_any_other(t5_folder, tmp_path):
    # Breaks if: open_model's config is taken for a decoder's.
    theirs = load_model(str(t5_folder))
    model = hf_t5_config(theirs.config), load_file(t5_folder / "model.safetensors")
    ours = load_model(str(write_gguf(tmp_path / "a.gguf", model=model)))
    assert ours.encoder_decoder
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)


def test_another_tokenizer_than_the_models_own(tmp_path, t5_folder):
    # Breaks if: tokenizer_name is read for T5X only.
    folder = write_llama_folder(tmp_path / "llama")
    assert not load_model(str(folder)).tokenizer.add_eos
    assert load_model(str(folder), tokenizer_name=str(t5_folder)).tokenizer.add_eos
    file = write_gguf(tmp_path / "a.gguf")
    assert load_model(str(file), tokenizer_name=str(t5_folder)).tokenizer.add_eos
    with pytest.raises(UserError, match="tokenizer 'nowhere': neither a folder nor the name of a"):
        load_model(str(folder), tokenizer_name="nowhere")


def test_a_name_of_the_catalogue_takes_a_revision(monkeypatch):
    """Mutation: drop `revision` where the name has an entry."""
    monkeypatch.setattr(hf, "download", lambda repo, revision: (repo, revision))
    found = find("EleutherAI/pythia-70m-deduped", revision="step1000")
    assert found == ("EleutherAI/pythia-70m-deduped", "step1000")
