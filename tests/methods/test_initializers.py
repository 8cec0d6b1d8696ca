"""Where a prompt starts."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.methods import initializers
from softprompt.methods.initializers import (
    common_tokens,
    embedding_rms,
    fixed,
    from_rows,
    text,
    uniform,
    vocabulary,
)

KEY = jax.random.key(3)
EMBEDDING = np.asarray(0.13 * jax.random.normal(jax.random.key(0), (50, 64)))
OTHER = np.arange(6 * 64, dtype=np.float32).reshape(6, 64)
ALL = {
    "uniform": uniform(),
    "uniform_paper": uniform(0.5),
    "vocabulary": vocabulary(range(50)),
    "labels": fixed([[3], [4, 5]], vocabulary(range(50))),
    "file": from_rows(OTHER, uniform(), name="f"),
}


@pytest.mark.parametrize("name", ALL)
def test_the_key_decides(name):
    """Mutation: a key of its own; a global random state."""
    once, again, other = (ALL[name](key, EMBEDDING, 9) for key in (KEY, KEY, jax.random.key(4)))
    assert once.shape == (9, 64)
    np.testing.assert_array_equal(once, again)
    assert np.abs(once - other).max() > 0


def test_uniform_has_the_scale_of_the_embeddings():
    """Mutation: the RMS as the bound (too small by a root of three); a bound that is not used."""
    assert float(embedding_rms(EMBEDDING)) == pytest.approx(np.sqrt(np.mean(EMBEDDING**2)))
    rows = np.asarray(uniform()(KEY, EMBEDDING, 2000))
    assert np.sqrt(np.mean(rows**2)) == pytest.approx(np.sqrt(np.mean(EMBEDDING**2)), rel=0.01)
    paper = np.asarray(uniform(0.5)(KEY, EMBEDDING, 2000))
    assert -0.5 <= paper.min() < -0.499 and 0.499 < paper.max() <= 0.5
    assert np.sqrt(np.mean(paper**2)) == pytest.approx(0.5 / 3**0.5, rel=0.01)


def where(rows):
    """The token whose embedding each row is."""
    same = np.all(np.asarray(rows)[:, None] == EMBEDDING[None], axis=-1)
    assert np.all(same.sum(axis=1) == 1)
    return same.argmax(axis=1).tolist()


def test_vocabulary_samples_without_repetition_while_it_can():
    """Mutation: sample with replacement; sample from all ids."""
    pool = [3, 7, 11, 20, 48]
    assert sorted(where(vocabulary(pool)(KEY, EMBEDDING, 5))) == pool
    more = where(vocabulary(pool)(KEY, EMBEDDING, 40))
    assert len(more) == 40 and set(more) == set(pool)


def test_labels_come_first_and_several_tokens_are_averaged():
    """Mutation: only a verbalizer's first token; the sampled rows first."""
    groups = [[3], [4, 5, 6], [7]]
    init = fixed(groups, vocabulary([20, 21]))
    rows = np.asarray(init(KEY, EMBEDDING, 5))
    np.testing.assert_allclose(rows[:3], [EMBEDDING[g].mean(axis=0) for g in groups], rtol=1e-6)
    assert sorted(where(rows[3:])) == [20, 21]
    np.testing.assert_allclose(init(KEY, EMBEDDING, 2), rows[:2])
    np.testing.assert_allclose(init(KEY, EMBEDDING, 3), rows[:3])


def test_text_is_cut_or_repeated():
    """Mutation: pad with zeros; keep the end of a long text."""
    init = text([9, 8, 7])
    assert where(init(KEY, EMBEDDING, 2)) == [9, 8]
    assert where(init(KEY, EMBEDDING, 3)) == [9, 8, 7]
    assert where(init(KEY, EMBEDDING, 7)) == [9, 8, 7, 9, 8, 7, 9]


def test_another_prompt_is_cut_or_extended():
    """Mutation: keep its end; extend with its own rows; extend in front."""
    init = from_rows(OTHER, vocabulary([20, 21]), name="other.safetensors")
    np.testing.assert_array_equal(init(KEY, EMBEDDING, 4), OTHER[:4])
    np.testing.assert_array_equal(init(KEY, EMBEDDING, 6), OTHER)
    longer = init(KEY, EMBEDDING, 8)
    np.testing.assert_array_equal(longer[:6], OTHER)
    assert sorted(where(longer[6:])) == [20, 21]


@pytest.mark.parametrize("shape", [(6, 63), (64,), (2, 3, 64)])
def test_a_prompt_of_another_width_is_refused(shape):
    """Mutation: broadcast, or cut its columns."""
    init = from_rows(np.zeros(shape, np.float32), uniform(), name="other.safetensors")
    with pytest.raises(UserError, match=r"other.safetensors.*allowed: \[any length, 64\]"):
        init(KEY, EMBEDDING, 4)


def test_common_tokens_are_counted():
    """Mutation: the smallest ids; ties by first appearance; texts counted once a token."""
    texts = [[9, 9, 9, 5], [5, 30, 2, 9], [2, 40, 40, 40, 40, 40]]
    assert common_tokens(texts, 4) == [40, 9, 2, 5]
    assert common_tokens(texts, 100) == [40, 9, 2, 5, 30]
    assert common_tokens([[], []], 3) == []


def started(common_text, train, cls=initializers.Vocabulary, **loaded):
    """An initialiser for a model of 50 tokens, of which 0 and 1 are BOS and EOS."""
    tokenizer = SimpleNamespace(bos_id=0, eos_id=1, vocab_size=50, **loaded)
    settings = cls(common_tokens=6, common_text=common_text)
    return settings.initializer(SimpleNamespace(tokenizer=tokenizer), train, place="encoder")


def encoded(**parts):
    """A split of two inputs."""
    inputs = [np.array([40, 41, 42, 1]), np.array([43, 44, 45, 1])]
    return Encoded(["a", "b"], inputs, [], np.array([-1, -1]), (), 0, **parts)


def test_the_most_common_tokens_may_be_the_first_of_the_vocabulary():
    """Breaks when T5's first ids, which the paper samples from, are counted in the inputs."""
    train = encoded()
    assert sorted(where(started("train", train)(KEY, EMBEDDING, 6))) == [40, 41, 42, 43, 44, 45]
    assert sorted(where(started("vocabulary", train)(KEY, EMBEDDING, 6))) == [0, 1, 2, 3, 4, 5]
    empty = dataclasses.replace(train, inputs=[np.array([1]), np.array([1])])  # EOS alone
    with pytest.raises(UserError, match="config key 'method.common_text' is 'train'; allowed: "):
        started("train", empty)


def test_a_label_starts_as_its_words_alone():
    """Breaks when EOS is averaged into a label's row, or ReCoRD's and WSC's words are not used."""
    candidates = (np.array([7, 8, 1]), np.array([9, 1]))
    train = dataclasses.replace(encoded(eos=True), candidates=candidates)
    rows = started("vocabulary", train, initializers.Labels)(KEY, EMBEDDING, 4)
    np.testing.assert_allclose(rows[:2], [EMBEDDING[[7, 8]].mean(axis=0), EMBEDDING[9]], rtol=1e-6)
    assert set(where(rows[2:])) <= set(range(6))
    words = (np.array([20]), np.array([21, 22]))
    rows = started("train", encoded(words=words), initializers.Labels)(KEY, EMBEDDING, 3)
    np.testing.assert_allclose(rows[:2], [EMBEDDING[20], EMBEDDING[21:23].mean(axis=0)], rtol=1e-6)
    assert set(where(rows[2:])) <= {40, 41, 42, 43, 44, 45}
    with pytest.raises(UserError, match="'method.init' is 'labels'; this task has no verbalizers"):
        started("train", encoded(), initializers.Labels)
