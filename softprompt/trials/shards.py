"""Which part of a sweep runs: `--shard` and `--minutes`."""

from collections.abc import Sequence

from softprompt.config import ConfigDict
from softprompt.errors import UserError


def parse_minutes(text: str) -> float:
    """Parses a time budget in minutes; "" is none.

    Raises:
        UserError: not a number above zero.
    """
    try:
        minutes = float(text or "inf")
    except ValueError:
        minutes = 0.0
    if not minutes > 0:
        raise UserError(f"--minutes is {text!r}; allowed: a number above 0")
    return minutes


def parse_shard(text: str) -> tuple[int, int]:
    """Parses "2/4" as the second of four parts.

    Raises:
        UserError: the text is not i/n with 1 <= i <= n.
    """
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard is {text!r}; allowed: i/n with i from 1 to n, such as 1/4")
    return int(part), int(parts)


def take_shard(trials: Sequence[ConfigDict], shard: tuple[int, int]) -> list[ConfigDict]:
    """Returns every n-th trial from the i-th on (from 1), so that shards have similar costs."""
    part, parts = shard
    return list(trials[part - 1 :: parts])
