"""Matrices in 8 and 4 bits. Each test names the mutation that breaks it."""

import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from softprompt.methods import initializers
from softprompt.methods.prompt import PromptConfig, init
from softprompt.models.quantize import dequantize, embedding, input_axes, quantize, storage

CASES = {
    "layers/attn/q/kernel": (96, 3, 8),
    "layers/attn/o/kernel": (3, 20, 48),
    "layers/mlp/down/kernel": (130, 24),
    "layers/mlp/up/kernel": (35, 24),  # odd: stays in 8 bits
    "embed/embedding": (50, 64),
}


def matrix(shape):
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("path", CASES)
def test_no_value_moves_by_more_than_half_a_step(path, kind):
    """Mutation: halves of a byte swapped; a scale by input channel; groups along another axis."""
    x, axes = matrix(CASES[path]), input_axes(path)
    values, scale = quantize(x, axes, kind)
    whole = np.asarray(dequantize(jnp.asarray(values), jnp.asarray(scale), axes, jnp.float32))
    assert whole.shape == x.shape
    repeats = [n // m for n, m in zip(x.shape, scale.shape, strict=True)]
    step = scale
    for axis, times in enumerate(repeats):
        step = np.repeat(step, times, axis)
    assert (np.abs(whole - x) <= step / 2 * (1 + 1e-5)).all()
    expected = storage(path, x.shape, np.dtype(np.float32), kind)
    assert [(a.shape, a.dtype) for a in (values, scale)] == list(expected.values())


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("path", CASES)
def test_pieces_change_nothing(monkeypatch, path, kind):
    """Mutation: pieces along an input, whose scales would each see but their own."""
    x, axes = matrix(CASES[path]), input_axes(path)
    whole = quantize(x, axes, kind)
    monkeypatch.setattr("softprompt.models.quantize.PIECE", 1000)
    for ours, wanted in zip(quantize(x, axes, kind), whole, strict=True):
        np.testing.assert_array_equal(ours, wanted)


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_a_huge_matrix_needs_little_more_than_its_rounded_form(kind):
    """Mutation: all of it at once (`PIECE` of 2**40)."""
    x = np.ones((2**15, 2**8), ml_dtypes.bfloat16)
    tracemalloc.start()
    parts = quantize(x, input_axes("embed/embedding"), kind)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - sum(part.nbytes for part in parts) < 4 * x.size, "one copy in float32"


def test_bytes():
    """Mutation: 4-bit values one a byte; groups of a fixed 32."""
    x, path = matrix((576, 1536)), "layers/mlp/up/kernel"
    for kind, bits in (("int8", 8 + 32 / 576), ("int4", 4 + 32 / 64)):
        parts = quantize(x, input_axes(path), kind)
        assert 8 * sum(part.nbytes for part in parts) / x.size == pytest.approx(bits)


def test_channels_of_unlike_size_keep_their_precision():
    """Mutation: one scale for the whole matrix."""
    x = matrix((64, 2)) * np.array([1.0, 1e-4], np.float32)
    values, scale = quantize(x, (0,), "int8")
    whole = np.asarray(dequantize(jnp.asarray(values), jnp.asarray(scale), (0,), jnp.float32))
    error = np.abs(whole - x).max(axis=0) / np.abs(x).max(axis=0)
    assert (error < 1 / 250).all()


def test_zeros_stay_zeros():
    """Mutation: a scale of 0, and values that are not numbers."""
    values, scale = quantize(np.zeros((8, 3), np.float32), (0,), "int4")
    whole = dequantize(jnp.asarray(values), jnp.asarray(scale), (0,), jnp.float32)
    np.testing.assert_array_equal(whole, np.zeros((8, 3)))


def test_what_stays_as_it_is():
    """Mutation: norms, biases or positions are rounded."""
    for path in ("layers/mlp_norm/scale", "layers/attn/q/bias", "positions/embedding"):
        assert input_axes(path) == ()
        assert list(storage(path, (4, 4), np.dtype(np.float32), "int4")) == [path]


def test_embedding_of_either_kind():
    """Mutation: a quantised embedding is returned as integers."""
    x_VD = matrix((50, 64))
    np.testing.assert_array_equal(embedding({"embedding": x_VD}), x_VD)
    values, scale = quantize(x_VD, (1,), "int8")
    found = embedding({"embedding_q": jnp.asarray(values), "embedding_scale": jnp.asarray(scale)})
    assert found.dtype == jnp.float32
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, x_VD, atol=float(scale.max()) / 2 * 1.01)


STARTS = {
    "uniform": initializers.uniform(),
    "labels": initializers.fixed([[5, 7], [9]], initializers.vocabulary(range(99))),
}


@pytest.mark.parametrize("start", [*STARTS, "rate"])
@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_a_prompt_starts_without_the_whole_matrix_in_floats(kind, start):
    """Mutation: `embedding` returns its matrix through `jax.lax.optimization_barrier`.

    XLA fuses the scaling into what reads it, be it rows or the root mean square that a rate counts
    in. Halves of bytes are taken apart first, into a byte a value.
    """
    shape = (2**15, 64)
    stored = storage("embed/embedding", shape, np.dtype(np.float32), kind)
    embed = {path.split("/")[1]: jax.ShapeDtypeStruct(*leaf) for path, leaf in stored.items()}

    def run(key, embed):
        if start == "rate":
            return initializers.embedding_rms(embedding(embed))
        cfg = PromptConfig(20, None, STARTS[start], embed_scale=8.0)
        return init(key, None, {"embed": embed}, cfg)

    memory = jax.jit(run).lower(jax.random.key(0), embed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * np.prod(shape)
