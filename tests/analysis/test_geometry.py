"""Properties of prompts, derived by hand for small vocabularies."""

import numpy as np
import pytest

from softprompt.analysis import geometry

# Tokens 0 to 3 point right, 4 and 5 up; 6 is zero.
EMBEDDING = np.array([[2, 0], [1, 0.1], [3, 0.6], [1, 0.3], [0, 1], [0.1, 2], [0, 0]], float)


def test_the_nearest_tokens():
    """Breaks when lengths count, when the order is another, or a token counts as its neighbour."""
    found = geometry.neighbours(np.array([[5.0, 0.0], [0.0, 0.2]]), EMBEDDING, count=2)
    assert found.ids.tolist() == [[0, 1], [4, 5]]
    np.testing.assert_allclose(found.similarity[:, 0], 1)
    cosines = [1 / np.hypot(1, 0.1), 2 / np.hypot(0.1, 2)]
    np.testing.assert_allclose(found.similarity[:, 1], cosines)
    np.testing.assert_allclose(found.tightness, cosines)


def test_what_persists_and_what_is_double():
    """Breaks when vectors beyond the labels count, or the first of two duplicates does."""
    prompt = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 3.0], [4.0, 0.01]])
    found = geometry.neighbours(prompt, EMBEDDING, count=1)
    assert geometry.label_persistence(found, [[0], [2, 5]]) == 0.5
    assert np.isnan(geometry.label_persistence(found, []))
    assert geometry.duplicate_rate(found) == 0.5


def test_lengths_and_similarity():
    """Breaks when means of squares, or sums, are compared."""
    prompt, start = np.array([[3.0, 4.0], [0.0, 5.0]]), np.array([[0.0, 4.0], [0.0, 6.0]])
    assert geometry.norm_ratio(prompt, np.array([[1.0, 0.0], [0.0, 4.0]])) == 2.0
    assert geometry.displacement(prompt, start) == pytest.approx(2 / 5)
    assert geometry.prompt_similarity(prompt, start) == pytest.approx((0.8 + 0.8 + 1 + 1) / 4)
