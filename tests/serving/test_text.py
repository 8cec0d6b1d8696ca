"""Texts of tokens: together they are the decoded output, cut before a stop text."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from softprompt.pretrained.tokenizer import Tokenizer, byte_backend
from softprompt.serving.http.answers import spelling
from softprompt.serving.requests import Token
from softprompt.serving.text import TextStream

BYTES = Tokenizer(byte_backend(), None, 1, False)


def stream(ids, stop=(), tokenizer=BYTES, before=()):
    """The texts of each push, and of the flush; and whether a stop text was found."""
    made, pushes = TextStream(tokenizer, stop, before), []
    for id_ in ids:
        pushes.append([token.text for token in made.push(Token(id_, "", 0.0))])
        if made.stopped:
            return pushes, True
    return [*pushes, [token.text for token in made.flush()]], False


def test_texts_are_the_decoded_output():
    """Mutation: a token is decoded alone; what is incomplete at the end is dropped."""
    ids = [*BYTES.encode("a€ é"), BYTES.encode("€")[0]]
    pushes, _ = stream(ids)
    assert pushes[0] == ["a"]
    assert pushes[1:4] == [[], [], ["", "", "€"]]
    assert "".join(text for push in pushes for text in push) == BYTES.decode(ids)


def test_a_space_that_a_decoder_drops_at_the_beginning():
    """Mutations: decode only what is new; an output without its input; an alternative alone."""
    words = {"▁the": 0, "▁cat": 1, "s": 2, "<unk>": 3}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = Tokenizer(backend, None, None, False)
    pushes, _ = stream([0, 1, 2, 1], tokenizer=tokenizer)
    assert [text for push in pushes for text in push] == ["the", " cat", "s", " cat"]
    pushes, _ = stream([1, 2], tokenizer=tokenizer, before=[2, 0] * 5)
    assert [text for push in pushes for text in push] == [" cat", "s"]
    assert [spelling(tokenizer, one) for one in (1, 2)] == [" cat", "s"]


def test_an_input_is_not_cut_within_a_character():
    """Mutation: the input's last five tokens, whose first may be part of a character: a run of
    bytes is decoded as a whole.
    """
    euro = {"<0xE2>": 0, "<0x82>": 1, "<0xAC>": 2, "<unk>": 3}
    backend = Backend(models.WordLevel(euro, unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pushes, _ = stream([0, 1, 2], (), Tokenizer(backend, None, None, False), before=[0, 1, 2] * 2)
    assert "".join(text for push in pushes for text in push) == "€"


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("twos", "e t"), "on", True),
        ("one tw", ("two",), "one tw", False),
        ("aab", ("ab",), "a", True),
        ("abc", ("c",), "ab", True),
    ],
)
def test_stop_texts(text, stop, wanted, stopped):
    """Mutation: the stop text is sent; what may begin one is sent at once."""
    pushes, found = stream(BYTES.encode(text), stop)
    assert ("".join(one for push in pushes for one in push), found) == (wanted, stopped)
