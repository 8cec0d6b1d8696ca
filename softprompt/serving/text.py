"""The text of an output, token by token, up to the first of the texts that end it."""

import dataclasses
from collections.abc import Sequence

from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.serving.requests import Token

INCOMPLETE = "\ufffd"  # what part of a character decodes to
BEFORE = 5  # tokens of the input with which an output is decoded


class TextStream:
    """Gives each token of an output its text.

    Tokens are withheld while their character is incomplete, or while their text may be the
    beginning of a stop text. The texts of all tokens together are the decoded output, cut before
    the first stop text.

    Args:
        tokenizer: of the model.
        stop: the stop texts.
        before: the input's ids: some tokenizers drop a space at a text's beginning, and an output
            is not the beginning.

    Attributes:
        stopped: a stop text was found.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()
    ) -> None:
        self._decode, self._stop = tokenizer.decode, stop
        self._ids = list(before[-BEFORE:])
        while INCOMPLETE in self._decode(self._ids):  # they begin within a character
            del self._ids[0]
        # The texts of ids before `_read` are known; new ids are decoded after those from `_first`.
        self._first, self._read = 0, len(self._ids)
        self._withheld: list[Token] = []
        self.stopped = False

    def push(self, token: Token) -> list[Token]:
        """Adds a token; returns those that are complete, with their texts."""
        self._ids.append(token.id)
        text = self._added()
        self._withheld.append(dataclasses.replace(token, text=text or ""))
        held = "".join(one.text for one in self._withheld)
        found = [held.find(stop) for stop in self._stop if stop in held]
        if found:
            self.stopped = True
            return _cut(self._release(), min(found))
        if text is None or any(_may_begin(held, stop) for stop in self._stop):
            return []
        return self._release()

    def flush(self) -> list[Token]:
        """Ends the output; returns the tokens that are still withheld."""
        rest = self._decode(self._ids[self._first :])
        rest = rest[len(self._decode(self._ids[self._first : self._read])) :]
        released = self._release()
        if released and self._read < len(self._ids):
            released[-1] = dataclasses.replace(released[-1], text=released[-1].text + rest)
        return released

    def _added(self) -> str | None:
        """The text of the ids since `_read`; None if its last character is incomplete."""
        text = self._decode(self._ids[self._first :])
        if text.endswith(INCOMPLETE):
            return None
        added = text[len(self._decode(self._ids[self._first : self._read])) :]
        self._first, self._read = self._read, len(self._ids)
        return added

    def _release(self) -> list[Token]:
        released, self._withheld = self._withheld, []
        return released


def _may_begin(text: str, stop: str) -> bool:
    """Whether `text` ends with a beginning of `stop`."""
    return any(text.endswith(stop[:size]) for size in range(1, len(stop)))


def _cut(tokens: list[Token], length: int) -> list[Token]:
    """The tokens, with their texts cut to `length` characters in total."""
    made = []
    for token in tokens:
        made.append(dataclasses.replace(token, text=token.text[:length]))
        length -= len(made[-1].text)
    return made
