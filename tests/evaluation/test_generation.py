"""How generated answers are read."""

import numpy as np
import pytest

from softprompt.evaluation.metrics import classification, read_labels
from softprompt.pretrained.tokenizer import Tokenizer
from tests.tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny_tokenizer(), bos_id=0, eos_id=1, add_bos=False)


def read(
    tokenizer, answers, verbalizers=(" positive", " negative", " neg", " not", " not so sure")
):
    return read_labels([tokenizer.encode(text) for text in answers], verbalizers, tokenizer)


def test_answers_are_labels_up_to_a_words_end(tokenizer):
    """Mutation: equality; a prefix within a word; the first verbalizer that fits."""
    labels_N, illegal = read(
        tokenizer,
        [" positive", "positive.\nReview:", " negative", " neg, really", " not so sure", " negate"],
    )
    assert labels_N.tolist() == [0, 0, 1, 2, 4, -1]
    assert illegal == pytest.approx(1 / 6)


def test_illegal_answers_are_counted_and_wrong(tokenizer):
    """Mutation: an answer that is no label is label 0; the share of legal answers."""
    labels_N, illegal = read(tokenizer, [" positive", "", " Positive", " the film is positive"])
    assert labels_N.tolist() == [0, -1, -1, -1]
    assert illegal == pytest.approx(0.75)
    found = classification(labels_N, np.zeros(4, np.int32), 4)
    assert found["accuracy"] == pytest.approx(0.25)


def test_no_answers_have_no_illegal_ones(tokenizer):
    """Mutation: the mean of nothing."""
    labels_N, illegal = read(tokenizer, [])
    assert labels_N.tolist() == [] and illegal == 0.0
