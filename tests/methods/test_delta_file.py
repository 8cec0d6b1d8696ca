"""Delta files: exact round trips, provenance, and what is refused."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from softprompt.errors import UserError
from softprompt.methods.delta_file import KEY, load_delta, save_delta

PROVENANCE = {"model": "tiny", "fingerprint": "0123456789abcdef", "bos": "after", "é": [1, None]}


def test_round_trip_is_exact(tmp_path):
    """Mutation: drop the folders of a leaf's name, or cast to float32."""
    random = np.random.default_rng(0)
    delta = {
        "prompt": random.standard_normal((3, 5)).astype(np.float32),
        "layers": {"attn": {"lora_a": np.array([[1e-45, -0.0]], np.float32)}},
        "low": np.arange(4, dtype=np.float16),
    }
    save_delta(tmp_path / "d.safetensors", delta, PROVENANCE)
    found, provenance = load_delta(tmp_path / "d.safetensors")
    assert provenance == PROVENANCE
    assert found.keys() == delta.keys()
    assert found["prompt"].tobytes() == delta["prompt"].tobytes()
    lora_a = found["layers"]["attn"]["lora_a"]
    assert lora_a.tobytes() == delta["layers"]["attn"]["lora_a"].tobytes()
    assert found["low"].dtype == np.float16


def test_others_can_read_it(tmp_path):
    """An array that is not contiguous is written as what it says, not as what lies in memory."""
    prompt_PD = jnp.arange(6.0).reshape(3, 2)
    save_delta(tmp_path / "d.safetensors", {"a": {"prompt": np.asarray(prompt_PD).T}}, {})
    found = load_file(tmp_path / "d.safetensors")
    assert list(found) == ["a/prompt"]
    np.testing.assert_array_equal(found["a/prompt"], np.asarray(prompt_PD).T)


def test_the_same_delta_is_the_same_bytes(tmp_path):
    """Contract 9 compares files. Mutation: a date in the provenance."""
    for name, order in (("a", 1), ("b", -1)):
        provenance = dict(list(PROVENANCE.items())[::order])
        save_delta(tmp_path / name, {"prompt": np.ones((2, 2), np.float32)}, provenance)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_file_of_another_program_has_no_provenance(tmp_path):
    save_file({"prompt": np.ones((2, 2), np.float32)}, tmp_path / "d", metadata={"format": "pt"})
    assert load_delta(tmp_path / "d")[1] == {}
    save_file({"prompt": np.ones((2, 2), np.float32)}, tmp_path / "e")
    assert load_delta(tmp_path / "e")[1] == {}


def test_an_empty_delta(tmp_path):
    save_delta(tmp_path / "d", {}, PROVENANCE)
    assert load_delta(tmp_path / "d") == ({}, PROVENANCE)


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = tmp_path / "d.safetensors"
    save_delta(file, {"prompt": np.ones((2, 2), np.float32)}, PROVENANCE)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"{file}: not a readable safetensors file \("):
        load_delta(file)


@pytest.mark.parametrize(
    "content",
    [
        b"a prompt",
        json.dumps({"prompt": [1]}).encode() * 9,
        save({"prompt": np.ones(2, np.float32)}, {KEY: "not json"}),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path, content):
    (tmp_path / "d").write_bytes(content)
    with pytest.raises(UserError, match="d: not a readable safetensors file"):
        load_delta(tmp_path / "d")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"none.safetensors: No such file"):
        load_delta(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match=rf"{tmp_path}: Is a directory"):
        load_delta(tmp_path)
