"""Prompts as numpy arrays, as google-research/prompt-tuning keeps them."""

import io

import ml_dtypes
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.interchange.prompt_arrays import from_npy, is_array, to_npy
from tests.interchange.cases import CASES, method, sizes

ROWS = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)


@pytest.mark.parametrize("name", ["prompt-llama", "prompt-t5"])
def test_round_trip(tmp_path, name):
    """Mutation: a transposed prompt, another dtype, or a pickle."""
    case, file = CASES[name], tmp_path / "encoder.prompt.prompt.prompt"  # their name has no ending
    delta = {"encoder": {"prompt": ROWS}} if name == "prompt-t5" else {"prompt": ROWS}
    file.write_bytes(to_npy(delta, sizes(case.model), method(case)))
    assert is_array(file)
    np.testing.assert_array_equal(np.load(file), ROWS)
    written = io.BytesIO()
    np.save(written, ROWS)
    assert written.getvalue() == file.read_bytes()
    again, found = from_npy(file, sizes(case.model))
    assert found == case.method
    assert to_npy(again, sizes(case.model), method(case)) == file.read_bytes()


def test_bfloat16_comes_without_its_name(tmp_path):
    """Their `save_dtype` may be bfloat16. Mutation: take its bytes for float16."""
    low = ROWS.astype(ml_dtypes.bfloat16)
    np.save(tmp_path / "p.npy", low)
    assert np.load(tmp_path / "p.npy").dtype == np.dtype("V2")
    delta, _ = from_npy(tmp_path / "p.npy", sizes("llama"))
    np.testing.assert_array_equal(delta["prompt"], low.astype(np.float32))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ROWS.T, r"an array of float32 \[8, 3\]; allowed for this model: .* \[length, 8\]$"),
        (ROWS[0], r"an array of float32 \[8\]; allowed"),
        (np.where(ROWS == ROWS[0, 0], np.nan, ROWS), "the array: 1 of 24 are not finite$"),
        (ROWS[:0], r"an array of float32 \[0, 8\]; allowed"),
        (ROWS.astype(np.int32), r"an array of int32 \[3, 8\]; allowed"),
        (np.array([{"a": 1}], dtype=object), "not a readable .npy file .*allow_pickle"),
    ],
)
def test_other_arrays(tmp_path, array, message):
    np.save(tmp_path / "p.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        from_npy(tmp_path / "p.npy", sizes("llama"))


def test_a_cut_file(tmp_path):
    np.save(tmp_path / "p.npy", ROWS)
    (tmp_path / "q.npy").write_bytes((tmp_path / "p.npy").read_bytes()[:-4])
    with pytest.raises(UserError, match="q.npy: not a readable .npy file"):
        from_npy(tmp_path / "q.npy", sizes("llama"))


@pytest.mark.parametrize(
    ("name", "delta", "more", "message"),
    [
        (
            "lora-llama",
            {"a": ROWS},
            {},
            "method 'lora' cannot be exported as an array; allowed: prompt",
        ),
        ("prompt-llama", {"prompt": ROWS}, {"bos": "before"}, "'method.bos' is 'before': google-r"),
        (
            "prompt-llama",
            {"prompt": ROWS, "b": ROWS},
            {},
            "allowed: prompt, whose delta is prompt alone",
        ),
        ("prompt-t5", {"decoder": {"prompt": ROWS}}, {}, "decoder/prompt: google-research"),
    ],
)
def test_deltas_that_are_no_array(name, delta, more, message):
    case = CASES[name]
    with pytest.raises(UserError, match=message):
        to_npy(delta, sizes(case.model), method(case, **more))
