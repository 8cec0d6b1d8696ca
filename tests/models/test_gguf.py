"""GGUF files: what is read equals what was written, and what is broken is said in one line."""

import dataclasses
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.models.gguf import File, read_config
from softprompt.models.loading import load_model
from tests.models.ggufs import write_gguf
from tests.tiny import tiny_config, write_llama_folder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama.json").read_text())
Quant = gguf.GGMLQuantizationType

SIZES = (
    {},
    {"tied": False},
    {"heads": 3, "kv_heads": 1, "head_size": 24},
)


@pytest.mark.real
def test_real_logits_are_those_of_transformers(smollm2):
    # Breaks if: _uninterleave returns its input.
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
    # Breaks if: _uninterleave returns its input, or a tied head is looked for.
    ours = load_model(str(write_gguf(tmp_path / "a.gguf", **sizes)))
    theirs = load_model(str(write_llama_folder(tmp_path / "folder", **sizes)))
    assert ours.config.tied == sizes.get("tied", True)
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)


def test_the_config_is_the_metadata(tmp_path):
    config = read_config(File(write_gguf(tmp_path / "a.gguf", kv_heads=1, head_size=8)))
    expected = tiny_config(kv_heads=1, head_size=8)
    assert config.norm_eps == pytest.approx(expected.norm_eps)  # stored as float32
    assert dataclasses.replace(config, norm_eps=expected.norm_eps) == expected


@pytest.mark.parametrize("quant", [Quant.F16, Quant.BF16, Quant.Q8_0, Quant.Q4_0, Quant.Q4_1])
def test_quantised_types_are_near_the_original(tmp_path, quant):
    sizes = {"width": 64, "head_size": 16, "ffn": 96}
    ours = load_model(str(write_gguf(tmp_path / "a.gguf", quant=quant, **sizes)))
    theirs = load_model(str(write_llama_folder(tmp_path / "folder", **sizes)))
    step = {Quant.Q8_0: 0.02, Quant.Q4_0: 0.3, Quant.Q4_1: 0.3}.get(quant, 0.01)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=step * float(jnp.abs(b).max())),
        ours.weights,
        theirs.weights,
    )
    assert ours.fingerprint != theirs.fingerprint


@pytest.mark.parametrize("keep", [0.0, 0.0001, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_one_line_that_names_it(tmp_path, keep):
    path = write_gguf(tmp_path / "short.gguf")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=r"short\.gguf: not a complete GGUF file") as error:
        load_model(str(path))
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind_is_one_line_that_names_it(tmp_path):
    path = tmp_path / "other.gguf"
    path.write_bytes(b"PK\x03\x04" * 1000)
    with pytest.raises(UserError, match=r"other\.gguf: not a complete GGUF file \(GGUF magic"):
        load_model(str(path))


def test_missing_unexpected_and_misshapen_are_one_error(tmp_path):
    path = write_gguf(
        tmp_path / "a.gguf",
        metadata={"llama.block_count": 4, "llama.feed_forward_length": 32},
        extra={"blk.0.attn_q.bias": np.zeros(48, np.float32)},
    )
    with pytest.raises(UserError) as error:
        load_model(str(path))
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "missing: blk.3.attn_k.weight, blk.3.attn_norm.weight" in message
    assert "unexpected: blk.0.attn_q.bias" in message
    assert "blk.2.ffn_down.weight [48, 64] (expected [48, 32])" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "bloom"}, "architecture 'bloom' is not supported; supported: llama"),
        ({"without": "llama.context_length"}, "metadata has no llama.context_length"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rotary scaling .yarn."),
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count 8"),
        ({"metadata": {"llama.rope.dimension_count": 6}}, "must be the head size 12"),
        ({"extra": {"rope_freqs.weight": np.ones(6, np.float32)}}, "rotary scaling .rope_freqs"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        load_model(str(write_gguf(tmp_path / "a.gguf", **options)))


def test_an_unreadable_type_names_tensor_and_type(tmp_path, monkeypatch):
    def refuse(data, kind):
        raise NotImplementedError

    path = write_gguf(tmp_path / "a.gguf")
    monkeypatch.setattr(gguf, "dequantize", refuse)
    with pytest.raises(UserError, match="tensor token_embd.weight has type F32.*known: F32, F16"):
        load_model(str(path))


def test_more_tokens_than_embeddings_is_an_error(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", metadata={"llama.vocab_size": 300})
    with pytest.raises(UserError, match="320 tokens, the model embeds 300"):
        load_model(str(path))
