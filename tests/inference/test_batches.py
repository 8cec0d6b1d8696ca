"""Inputs as batches of few shapes."""

import numpy as np

from softprompt.inference.batches import input_batches, slots_for


def test_batches_hold_each_input_once():
    """Mutation: left padding; drop the last batch; no sorting by length."""
    random = np.random.default_rng(1)
    lengths = [250, *random.integers(3, 190, 36).tolist()]
    inputs = [random.integers(1, 999, n, dtype=np.int32) for n in lengths]
    batches = input_batches(inputs, batch=8)
    seen = []
    for batch in batches:
        assert batch.tokens_BT.shape[0] == 8 and batch.tokens_BT.shape[1] % 64 == 0
        for tokens_T, length, example in zip(
            batch.tokens_BT, batch.lengths_B, batch.example_B, strict=True
        ):
            assert length >= 1
            assert not tokens_T[length:].any()
            if example >= 0:
                assert np.array_equal(tokens_T[:length], inputs[example])
                seen.append(int(example))
    assert sorted(seen) == list(range(37))
    assert batches[0].tokens_BT.shape[1] < batches[-1].tokens_BT.shape[1]


def test_caches_have_few_sizes():
    """Mutation: a power of two below what is asked for."""
    sizes = [slots_for(n) for n in range(1, 1000)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert set(sizes) == {64, 128, 256, 512, 1024}
