"""Texts of tokens: together they are the decoded output, cut before a stop text."""

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from softprompt.pretrained.tokenizer import Tokenizer, byte_backend
from softprompt.serving.requests import Token
from softprompt.serving.text import TextStream

BYTES = Tokenizer(byte_backend(), None, 1, False)


def stream(ids, stop=(), tokenizer=BYTES):
    """The texts of each push, and of the flush; and whether a stop text was found."""
    made, pushes = TextStream(tokenizer, stop), []
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
    """Mutation: decode only what is new."""
    words = {"▁the": 0, "▁cat": 1, "s": 2, "<unk>": 3}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    pushes, _ = stream([0, 1, 2, 1], tokenizer=Tokenizer(backend, None, None, False))
    assert [text for push in pushes for text in push] == ["the", " cat", "s", " cat"]


@pytest.mark.parametrize(
    ("text", "stop", "wanted", "stopped"),
    [
        ("one two three", ("two",), "one ", True),
        ("one two three", ("twos", "e t"), "on", True),
        ("one tw", ("two",), "one tw", False),
        ("aab", ("ab",), "a", True),
        ("abc", ("", "c"), "ab", True),
    ],
)
def test_stop_texts(text, stop, wanted, stopped):
    """Mutation: the stop text is sent; what may begin one is sent at once; "" stops everything."""
    pushes, found = stream(BYTES.encode(text), stop)
    assert ("".join(one for push in pushes for one in push), found) == (wanted, stopped)
