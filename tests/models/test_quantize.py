"""Matrices in 8 and 4 bits. Each test names the mutation that breaks it."""

import tracemalloc

import gguf
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


def read(parts, axes):
    """The matrix that parts in numpy stand for."""
    return np.asarray(dequantize([jnp.asarray(part) for part in parts], axes, jnp.float32))


def spread(x, shape):
    """A value for each group or channel, for each of their members."""
    for axis, (size, count) in enumerate(zip(shape, x.shape, strict=True)):
        x = np.repeat(x, size // count, axis)
    return x


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("path", CASES)
def test_no_value_moves_by_more_than_half_a_step(path, kind):
    """Mutation: halves of a byte swapped; a scale by input channel; groups along another axis.

    But a 4-bit group may cut its ends where that lessens its squared error: by a step at most.
    """
    x, axes = matrix(CASES[path]), input_axes(path)
    parts = quantize(x, axes, kind)
    whole = read(parts, axes)
    assert whole.shape == x.shape
    moved = np.abs(whole - x) / spread(parts[1].astype("f4"), x.shape)
    assert (moved <= (1 / 2 if len(parts) == 2 else 1) * (1 + 1e-5)).all()
    assert np.mean(moved <= 0.501) > 0.95
    expected = storage(path, x.shape, np.dtype(np.float32), kind)
    assert [(a.shape, a.dtype) for a in parts] == list(expected.values())


def lowest_to_highest(x):
    """Rows of x on grids of 16 values from the lowest to the highest, in float64."""
    low = x.min(axis=1, keepdims=True).astype("f8")
    scale = (x.max(axis=1, keepdims=True) - low) / 15
    return np.rint((x - low) / scale) * scale + low


def test_a_group_is_rounded_better_than_from_its_lowest_to_its_highest_value():
    """Mutation: the line through a grid's integers is not tried; the worse grid is kept."""
    x = matrix((32, 5000))
    error = np.square(read(quantize(x, (0,), "int4"), (0,)) - x).sum(axis=0)
    plain = np.square(lowest_to_highest(x.T) - x.T).sum(axis=1)
    assert (error <= plain * 1.01).all(), "1 %: scales and minima are stored in float16"
    assert error.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("kind", ("Q4_1", "Q4_K"))
def test_blocks_of_a_file_in_4_bits_keep_their_values(kind):
    """Mutation: groups of 64; scales in bfloat16; minima left out; Q4_K: grids of 15 steps only.

    The package `gguf` writes Q4_1 and reads both. Blocks of Q4_K are random bytes behind a scale
    and a minimum: the products of these with 6-bit ones are more than float16 holds, and one group
    in 50 uses 14 of its 16 integers or fewer.
    """
    rng = np.random.default_rng(0)
    if kind == "Q4_1":
        blocks = gguf.quantize(matrix((48, 256)), gguf.GGMLQuantizationType.Q4_1)
    else:
        blocks = rng.integers(0, 256, (48, 144), dtype=np.uint8)
        blocks[:, :4] = np.array([1e-3, 1e-2], np.float16).view(np.uint8)
    x = gguf.dequantize(blocks, gguf.GGMLQuantizationType[kind]).reshape(48, 256).T
    whole = read(quantize(x, (0,), "int4"), (0,))
    error = np.abs(whole - x).reshape(8, 32, 48).max(axis=1)
    size = np.abs(x).reshape(8, 32, 48).max(axis=1)
    exact = (error == 0) if kind == "Q4_1" else (error < 1e-3 * size)
    assert exact.mean() >= (1 if kind == "Q4_1" else 0.95), exact.mean()


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
    """Mutation: 4-bit values one a byte; scales or minima in float32."""
    x, path = matrix((576, 1536)), "layers/mlp/up/kernel"
    for kind, bits in (("int8", 8 + 32 / 576), ("int4", 4 + 2 * 16 / 32)):
        parts = quantize(x, input_axes(path), kind)
        assert 8 * sum(part.nbytes for part in parts) / x.size == pytest.approx(bits)


def test_channels_of_unlike_size_keep_their_precision():
    """Mutation: one scale for the whole matrix."""
    x = matrix((64, 2)) * np.array([1.0, 1e-4], np.float32)
    whole = read(quantize(x, (0,), "int8"), (0,))
    error = np.abs(whole - x).max(axis=0) / np.abs(x).max(axis=0)
    assert (error < 1 / 250).all()


@pytest.mark.parametrize("value", (0.0, 3.0, -0.25))
def test_groups_of_one_value_keep_it(value):
    """Mutation: a scale of 0 that is divided by, and values that are not numbers."""
    x = np.full((8, 3), value, np.float32)
    np.testing.assert_array_equal(read(quantize(x, (0,), "int4"), (0,)), x)


def test_what_stays_as_it_is():
    """Mutation: norms, biases or positions are rounded."""
    for path in ("layers/mlp_norm/scale", "layers/attn/q/bias", "positions/embedding"):
        assert input_axes(path) == ()
        assert list(storage(path, (4, 4), np.dtype(np.float32), "int4")) == [path]


@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_embedding_of_either_kind(kind):
    """Mutation: a quantised embedding is returned as integers, or without its minima."""
    x_VD = matrix((50, 64))
    np.testing.assert_array_equal(embedding({"embedding": x_VD}), x_VD)
    parts = quantize(x_VD, (1,), kind)
    names = storage("embed/embedding", x_VD.shape, np.dtype(np.float32), kind)
    found = embedding(
        {name.split("/")[1]: jnp.asarray(part) for name, part in zip(names, parts, strict=True)}
    )
    assert found.dtype == jnp.float32
    assert isinstance(found, jax.Array)
    np.testing.assert_allclose(found, x_VD, atol=float(parts[1].max()))


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
