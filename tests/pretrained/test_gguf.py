"""Models from GGUF files: the weights and config of the folder that they were made from."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.pretrained import hf
from softprompt.pretrained.families import read_family
from softprompt.pretrained.gguf import File, open_model
from softprompt.pretrained.loading import load_model
from softprompt.pretrained.name_tables import read_weights
from tests.families import VARIANTS, family_tensors, write_family_folder
from tests.pretrained.ggufs import CASES, write_gguf
from tests.tiny import tiny_config, write_llama_folder
from tests.tiny_t5 import (
    FAMILIES,
    hf_t5_config,
    load_weights,
    tiny_t5_config,
    tiny_t5_tensors,
    write_t5_folder,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama.json").read_text())
Quant = gguf.GGMLQuantizationType

SIZES = ({}, {"tied": False}, {"heads": 3, "kv_heads": 1, "head_size": 24})


@pytest.mark.real
def test_real_logits_are_those_of_transformers(smollm2):
    # Breaks if: _uninterleaved returns the part it is given.
    cases = GOLDEN["smollm2-135m-instruct-q4"]
    longest = max(len(case["ids"]) for case in cases)
    apply = jax.jit(smollm2.model.apply)
    for case in cases:
        padded_T = jnp.array(case["ids"] + [0] * (longest - len(case["ids"])))  # compiles once
        logits_TV = apply({"params": smollm2.weights}, padded_T)
        last_V = np.asarray(logits_TV[len(case["ids"]) - 1])
        np.testing.assert_allclose(last_V[case["top_ids"]], case["top_logits"], atol=1e-3)
        np.testing.assert_allclose(last_V[:5], case["first_logits"], atol=1e-3)


@pytest.mark.parametrize("sizes", SIZES)
def test_a_gguf_file_gives_the_weights_of_the_folder(tmp_path, sizes):
    # Breaks if: _uninterleaved returns the part it is given, or a tied head is looked for.
    ours = load_model(str(write_gguf(tmp_path / "a.gguf", **sizes)))
    theirs = load_model(str(write_llama_folder(tmp_path / "folder", **sizes)))
    assert ours.config.tied == sizes.get("tied", True)
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)


def assert_near(ours, theirs):
    """Configs are equal but for the rounding of a file's numbers to float32."""
    for field in dataclasses.fields(theirs):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if isinstance(other, float):
            other = pytest.approx(other, rel=1e-7)
        assert mine == other, field.name


def weights_of(source, table):
    return read_weights(source, table, dtype=np.dtype(np.float32), put=lambda path, leaf: leaf)[0]


@pytest.mark.parametrize("name", CASES)
def test_every_family_gives_config_and_weights_of_the_folder(tmp_path, name):
    # Breaks if: a name or third of a table is another, a 1 is added to Gemma's norms, a key of the
    # metadata is not read, or Llama 3's frequencies are left as they are.
    raw = {**VARIANTS[name], **CASES[name]}
    if raw["model_type"] == "gemma2":
        raw["rope_theta"] = 10000.0
    family, config = read_family(raw)
    tensors = family_tensors(name, raw=raw)
    folder = write_family_folder(tmp_path / "folder", name, raw=raw)
    ours, table, source = open_model(File(write_gguf(tmp_path / "a.gguf", model=(raw, tensors))))
    assert_near(ours, config)
    _, their_table, theirs = hf.open_folder(folder)
    jax.tree.map(
        np.testing.assert_array_equal, weights_of(source, table), weights_of(theirs, their_table)
    )


def test_the_biggest_gemmas_scale_queries_by_width(tmp_path):
    # Breaks if: `biggest` of either is another.
    for name, layers in {"gemma2": 46, "gemma3": 62}.items():
        raw = {**VARIANTS[name], "num_hidden_layers": layers, "hidden_size": 36}
        file = File(write_gguf(tmp_path / "a.gguf", model=(raw, {})))
        assert open_model(file)[0].query_scale == (36 // raw["num_attention_heads"]) ** -0.5
        file.metadata[f"{name}.block_count"] = layers - 1
        assert open_model(file)[0].query_scale == raw["head_dim"] ** -0.5


@pytest.mark.parametrize("family", FAMILIES)
def test_t5_gives_config_and_weights_of_the_folder(tmp_path, family):
    # Breaks if: two names of the table are swapped, or decoder_block_count or the start token is
    # not read.
    sizes = {**FAMILIES[family], "start": 5}
    config = tiny_t5_config(**sizes)
    tensors = tiny_t5_tensors(config, 0)
    unused = {"dec.blk.0.cross_attn_rel_b.weight": np.zeros((32, 3), np.float32)}
    tokenizer = {"model": "t5", "tokens": [str(i) for i in range(config.vocab)]}
    path = write_gguf(
        tmp_path / "a.gguf",
        model=(hf_t5_config(config), tensors),
        metadata={"t5.decoder_start_token_id": 5},
        extra=unused,
        tokenizer=tokenizer,
    )
    ours, table, source = open_model(File(path))
    assert_near(ours, config)
    load = {"dtype": np.dtype(np.float32), "put": lambda path, leaf: leaf}
    _, expected, _ = load_weights(write_t5_folder(tmp_path / "hf", **sizes), **load)
    jax.tree.map(np.testing.assert_array_equal, weights_of(source, table), expected)


def test_the_config_is_the_metadata(tmp_path):
    config, _, _ = open_model(File(write_gguf(tmp_path / "a.gguf", kv_heads=1, head_size=8)))
    assert_near(config, tiny_config(kv_heads=1, head_size=8))


QUANTS = {Quant.Q8_0: 0.02, Quant.Q4_0: 0.3, Quant.Q4_1: 0.3, Quant.Q5_0: 0.2, Quant.Q5_1: 0.2}


@pytest.mark.parametrize("quant", [Quant.F16, Quant.BF16, *QUANTS])
def test_quantised_types_are_near_the_original(tmp_path, quant):
    sizes = {"width": 64, "head_size": 16, "ffn": 96}
    ours = load_model(str(write_gguf(tmp_path / "a.gguf", quant=quant, **sizes)))
    theirs = load_model(str(write_llama_folder(tmp_path / "folder", **sizes)))
    step = QUANTS.get(quant, 0.01)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=step * float(jnp.abs(b).max())),
        ours.weights,
        theirs.weights,
    )
    assert ours.fingerprint != theirs.fingerprint


def test_missing_unexpected_and_misshapen_are_one_error(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        metadata={"llama.block_count": 4, "llama.feed_forward_length": 32},
        extra={"blk.0.attn_q_norm.weight": np.zeros(48, np.float32)},
    )
    with pytest.raises(UserError) as error:
        load_model(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "missing: blk.3.attn_k.weight, blk.3.attn_norm.weight" in message
    assert "unexpected: blk.0.attn_q_norm.weight" in message
    assert "blk.2.ffn_down.weight [48, 64] (expected [48, 32])" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"architecture": "bloom"},
            "architecture 'bloom' is not supported; supported: gemma2, gemma3, gpt2, llama, q",
        ),
        ({"without": "llama.context_length"}, "metadata has no llama.context_length"),
        ({"metadata": {"llama.context_length": "9"}}, "llama.context_length is 9, expected int"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rotary scaling .*yarn.*linear"),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count 8"),
        ({"metadata": {"llama.rope.dimension_count": 6}}, "must be the head size 12"),
        (
            {"extra": {"rope_freqs.weight": np.array([1, 2, 1, 4, 1, 1], np.float32)}},
            "rotary scaling .rope_freqs.weight. is not supported; allowed: that of Llama 3.1",
        ),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_model(str(write_gguf(tmp_path / "a.gguf", **options)))


def test_more_tokens_than_embeddings_is_an_error(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", metadata={"llama.vocab_size": 300})
    with pytest.raises(UserError, match=r"a\.gguf: .*320 tokens, the model embeds 300"):
        load_model(str(path))
