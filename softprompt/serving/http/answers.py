"""Answers in OpenAI's forms: text completions and chat completions, whole or in parts.

Source: OpenAI's API reference, "The completion object" and "The chat completion object".
"""

import math
import secrets
import time
from collections.abc import Sequence
from typing import Any

from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.serving.requests import Finish, Token

LEAST = -9999.0  # JSON has no -inf


class TextAnswer:
    """A completion of texts.

    Args:
        model: the task that answers.
        tokenizer: spells the alternatives of a token.
        logprobs: whether they were asked for.
    """

    prefix, whole_kind, part_kind = "cmpl-", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._lengths: dict[int, int] = {}  # characters of each row that were sent

    def whole(self, rows: Sequence[tuple[Sequence[Token], Finish]]) -> dict[str, Any]:
        """The answer with all rows."""
        choices = [
            self._choice(index, tokens, finish.reason)
            for index, (tokens, finish) in enumerate(rows)
        ]
        done = usage([finish for _, finish in rows])
        return {**self._head, "object": self.whole_kind, "choices": choices, "usage": done}

    def openings(self, count: int) -> list[dict[str, Any]]:
        """The parts that come before those of `count` rows."""
        return []

    def part(self, index: int, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        """Tokens of one row, or its end."""
        return self._part(self._choice(index, tokens, reason))

    def end(self, finishes: Sequence[Finish]) -> dict[str, Any]:
        """The part with the usage, which has no choices."""
        return self._part() | {"usage": usage(finishes)}

    def _part(self, *choices: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.part_kind, "choices": choices}

    def _choice(self, index: int, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs_of(index, tokens) if self._logprobs and tokens else None
        text = "".join(token.text for token in tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs_of(self, index: int, tokens: Sequence[Token]) -> dict[str, Any]:
        """Four lists, an entry per token. A text's first token has null log-probabilities."""
        offsets = []
        for token in tokens:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + len(token.text)
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [finite(token.logprob) for token in tokens],
            "top_logprobs": [self._alternatives(token) for token in tokens],
            "text_offset": offsets,
        }

    def _alternatives(self, token: Token) -> dict[str, float] | None:
        """The likeliest tokens and the chosen one; of equal spellings the likelier."""
        if math.isnan(token.logprob):
            return None
        found: dict[str, float] = {}
        for one, logprob in sorted([(token.id, token.logprob), *token.top], key=lambda x: -x[1]):
            found.setdefault(spelling(self._tokenizer, one), max(logprob, LEAST))
        return found


class ChatAnswer(TextAnswer):
    """A message of the assistant."""

    prefix, whole_kind, part_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def openings(self, count: int) -> list[dict[str, Any]]:
        """For each row a part that names the role."""
        role = {"role": "assistant", "content": ""}
        choices = (self._delta(index, role, None, None) for index in range(count))
        return [self._part(choice) for choice in choices]

    def part(self, index: int, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        """Tokens of one row, or its end."""
        delta = {"content": "".join(token.text for token in tokens)} if tokens else {}
        return self._part(self._delta(index, delta, self._content(tokens), reason))

    def _choice(self, index: int, tokens: Sequence[Token], reason: str | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(token.text for token in tokens)}
        logprobs = self._content(tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def _delta(
        self, index: int, delta: dict[str, str], logprobs: Any, reason: str | None
    ) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _content(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """Log-probabilities in the form of chats."""
        if not (self._logprobs and tokens):
            return None
        return {"content": [self._entry(token) for token in tokens]}

    def _entry(self, token: Token) -> dict[str, Any]:
        top = [self._spelt(spelling(self._tokenizer, one), value) for one, value in token.top]
        return {**self._spelt(token.text, token.logprob), "top_logprobs": top}

    def _spelt(self, text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(text.encode())}


def spelling(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token after a letter: some tokenizers drop a space at a text's beginning."""
    before = tokenizer.encode("a")
    return tokenizer.decode([*before, token])[len(tokenizer.decode(before)) :]


def finite(logprob: float) -> float | None:
    """A log-probability in JSON: null for NaN, which stands for an unknown one."""
    return None if math.isnan(logprob) else max(logprob, LEAST)


def usage(finishes: Sequence[Finish]) -> dict[str, int]:
    """The tokens of all rows."""
    read = sum(one.prompt_tokens for one in finishes)
    made = sum(one.completion_tokens for one in finishes)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
