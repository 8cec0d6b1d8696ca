"""Greedy generation against a plain loop, and how answers are read."""

import numpy as np
import pytest

from softprompt.data.pipeline import generation_batches
from softprompt.evaluation.generation import generate, read_labels
from softprompt.evaluation.metrics import classification
from softprompt.models.tokenizer import Tokenizer
from softprompt.training.step import shared_part
from tests.contracts import concatenated
from tests.contracts.examples import prompted, quick_jit, random_examples
from tests.tiny import tiny_tokenizer

NEW = 5


@pytest.fixture
def given(tiny):
    """What `generate` takes, and the continuations of a loop over the reference form."""
    model, weights = tiny
    config, delta = prompted(model, weights, 4)
    encoded, embedding_VD = random_examples(), np.asarray(weights["embed"]["embedding"])
    logits_fn = quick_jit(concatenated.logits, static_argnames="config")
    room = 4 + max(map(len, encoded.inputs)) + NEW
    wanted = {}
    for n, tokens in enumerate(encoded.inputs):
        said = tokens.tolist()
        for _ in range(NEW):
            rows_SD = np.concatenate([delta["prompt"], embedding_VD[said]])
            padded_SD = np.pad(rows_SD, ((0, room - len(rows_SD)), (0, 0)))
            logits_SV = logits_fn(weights, model.config, padded_SD)
            said.append(int(logits_SV[len(rows_SD) - 1].argmax()))
        wanted[n] = said[len(tokens) :]
    shared = shared_part(config, delta, weights)
    return (model, weights, shared, generation_batches(encoded, batch=4, max_new=NEW)), wanted


def test_generation_is_the_plain_loop(given):
    """Mutation: the logits of the padded row's end; a new token in the wrong place; padded examples
    among the answers.
    """
    arguments, wanted = given
    assert len({tuple(ids) for ids in wanted.values()}) > 1
    assert generate(*arguments, max_new=NEW, eos_id=None) == wanted
    assert generate(*arguments, max_new=NEW, eos_id=99999) == wanted


def test_generation_ends_at_eos(given):
    """Mutation: keep EOS; keep what follows it."""
    arguments, wanted = given
    eos = wanted[0][2]
    cut = {n: ids[: ids.index(eos)] if eos in ids else ids for n, ids in wanted.items()}
    assert len(cut[0]) <= 2
    assert generate(*arguments, max_new=NEW, eos_id=eos) == cut


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(tiny_tokenizer(), bos_id=0, eos_id=1, add_bos=False)


def read(
    tokenizer, answers, verbalizers=(" positive", " negative", " neg", " not", " not so sure")
):
    ids = {n: tokenizer.encode(text) for n, text in enumerate(answers)}
    return read_labels(ids, verbalizers, tokenizer)


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
