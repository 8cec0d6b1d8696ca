"""Mistakes in a model's files, at the command line: each is one line that names file and remedy."""

import functools
import importlib.util
import json
import pickle
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.mistakes import refused
from tests.own_task import REPOSITORY, write_task
from tests.pretrained.ggufs import write_gguf
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A task without a mistake."""
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def refuse(capsys, tmp_path, place):
    """Runs `softprompt train` on a model; returns the error's line."""
    return functools.partial(refused, capsys, tmp_path / "w", place)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "smollm2-135m",
            "unknown model 'smollm2-135m' (did you mean 'HuggingFaceTB/SmolLM2-135M'?); "
            "`softprompt models` lists those with a name",
        ),
        ("./nowhere", "model './nowhere': no such file or folder"),
        ("nowhere.gguf", "model 'nowhere.gguf': no such file or folder"),
        ("Makefile", "model 'Makefile' is neither a folder nor a .gguf file"),
    ],
)
def test_unknown_model(refuse, name, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    assert refuse(name).startswith(message)


@pytest.fixture
def model(tmp_path):
    """A model folder to be spoilt."""
    return write_llama_folder(tmp_path / "model")


@pytest.mark.parametrize("keep", [0, 6, 500, -100])
def test_truncated_safetensors(refuse, model, keep):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert refuse(model).startswith(f"{file}: not a complete safetensors file (")


def test_no_weights(refuse, model):
    (model / "model.safetensors").unlink()
    assert refuse(model).startswith(f"{model}: no model.safetensors and no model.safe")


def test_a_missing_and_an_unexpected_tensor(refuse, model):
    """Both in one line."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.3.odd"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    tensors["model.norm.weight"] = np.ones(7, np.float32)
    save_file(tensors, model / "model.safetensors")
    assert refuse(model) == (
        f"{model}: tensors do not match the config; "
        "missing: model.layers.1.mlp.up_proj.weight; unexpected: model.layers.3.odd; "
        "misshapen: model.norm.weight [7] (expected [48])"
    )


@pytest.mark.parametrize("keep", [0, 3, 100, 2000, -1000])
def test_truncated_gguf(refuse, tmp_path, keep):
    file = tmp_path / "model.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes()[:keep])
    assert refuse(file).startswith(f"{file}: not a complete GGUF file (")


def test_a_file_that_is_no_gguf(refuse, tmp_path):
    (tmp_path / "model.gguf").write_text("weights, honestly\n" * 40)
    line = refuse(tmp_path / "model.gguf")
    assert line.startswith(f"{tmp_path / 'model.gguf'}: not a complete GGUF file (")


def edit_config(model, **changes):
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# Mutation: leave T5_ARCHITECTURES out of the message.
def test_an_unsupported_architecture_lists_the_supported(refuse, model):
    edit_config(model, architectures=["BloomForCausalLM"])
    line = refuse(model)
    assert line.startswith(
        f"{model}/config.json: architecture 'BloomForCausalLM' is not supported; supported: GPT2LM"
    )
    for name in ("LlamaForCausalLM", "Gemma3ForCausalLM", "T5ForConditionalGeneration"):
        assert name in line


# Mutation: leave the list out of gguf._family's message.
def test_an_unsupported_architecture_of_a_gguf_file_lists_the_supported(refuse, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", architecture="mamba")
    assert refuse(file) == (
        f"{file}: architecture 'mamba' is not supported; "
        "supported: gemma2, gemma3, gpt2, llama, qwen2, qwen3, t5"
    )


# Mutation: compare no shapes in names._check.
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 32}, "misshapen: model.layers.0.mlp.down_proj.weight [48, 64] (exp"),
        ({"num_hidden_layers": 4}, "missing: model.layers.3.input_layernorm.weight, model.layer"),
        ({"num_hidden_layers": 2}, "unexpected: model.layers.2.input_layernorm.weight, model.la"),
        ({"tie_word_embeddings": False}, "missing: lm_head.weight"),
    ],
)
def test_a_config_and_tensors_that_disagree(refuse, model, changes, message):
    edit_config(model, **changes)
    assert refuse(model).startswith(f"{model}: tensors do not match the config; {message}")


def test_metadata_and_tensors_that_disagree(refuse, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", metadata={"llama.block_count": 2})
    assert refuse(file).startswith(
        f"{file}: tensors do not match the config; unexpected: blk.2.attn_k.weight, "
    )


def test_a_t5_whose_config_and_tensors_disagree(refuse, tmp_path):
    model = write_complete_t5(tmp_path / "model")
    edit_config(model, d_ff=24)
    line = refuse(model)
    assert line.startswith(f"{model}: tensors do not match the config; misshapen: decoder.block.0")


# Mutation: read whatever shards there are.
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_shard_missing_from_an_index(refuse, model, kind):
    stem = {"safetensors": "model", "bin": "pytorch_model"}[kind]
    names = [f"{stem}-{n:05}-of-00002.{kind}" for n in (1, 2)]
    where = {name: names[i % 2] for i, name in enumerate(load_file(model / "model.safetensors"))}
    index = model / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    (model / "model.safetensors").rename(model / names[0])
    assert refuse(model) == f"{index}: names shards that are not there: {names[1]}"


class Code:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Mutation: weights_only=False, where PyTorch is installed; there see tests/parity/test_bin.py.
def test_a_pickle_with_code_in_it(refuse, model, tmp_path):
    (model / "model.safetensors").unlink()
    file, sign = model / "pytorch_model.bin", tmp_path / "it-ran"
    file.write_bytes(pickle.dumps({"model.norm.weight": Code(sign)}))
    line = refuse(model)
    if importlib.util.find_spec("torch"):
        assert line.startswith(f"{file}: refused: it holds more than tensors, which may be code (")
    else:
        assert line.startswith(f"{file}: ") and "pip install torch" in line
    assert not sign.exists()


# Mutation: _kind in gguf/file.py returns every type that the package knows.
@pytest.mark.parametrize("kind", ["IQ4_NL", "TQ1_0", "I32"])
def test_an_unsupported_gguf_type(refuse, tmp_path, kind):
    quant = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quant]
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((2, size), np.uint8), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refuse(file) == (
        f"{file}: tensor token_embd.weight has type {kind}, which cannot be read; known: F32, F16, "
        "BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K"
    )


def test_an_unsupported_tokenizer_of_a_gguf_file(refuse, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", pre="falcon")
    line = refuse(file)
    assert line.startswith(f"{file}: tokenizer.ggml.pre 'falcon' is not supported; known: smollm, ")
    assert "llama-bpe" in line


def test_a_tokenizer_larger_than_the_embeddings(refuse, tmp_path):
    file = write_gguf(tmp_path / "model.gguf", metadata={"llama.vocab_size": 300})
    assert refuse(file) == f"{file}: the tokenizer has 320 tokens, the model embeds 300"


def test_a_t5x_checkpoint_that_is_none(refuse, tmp_path):
    (tmp_path / "checkpoint").write_bytes(b"not msgpack")
    line = refuse(tmp_path)
    assert line.startswith(f"{tmp_path}: no")
    assert "T5X checkpoint" in line


def test_a_tokenizer_from_nowhere(refuse, model):
    line = refuse(model, model__tokenizer="nowhere")
    assert line == "tokenizer 'nowhere': neither a folder nor the name of a hub repository"


# Mutation: either check of free_positions is left out.
@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"method__length": 225},
            "config key 'method.length' is 225; allowed: at most 224 (the model's context of 512 "
            "less task.max_input and task.max_target)",
        ),
        (
            {"method__name": "none", "task__max_input": 481},
            "config key 'task.max_input' is 481; allowed: at most 480 (the model's context of 512 "
            "less task.max_target)",
        ),
    ],
)
def test_a_context_overrun(refuse, model, more, message):
    """512 positions, less 256 for an input and 32 for a target."""
    assert refuse(model, **more) == message
