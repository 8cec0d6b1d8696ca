"""Which part of a sweep runs: `--shard` and `--minutes`."""

from collections.abc import Sequence

from softprompt.config import ConfigDict, trial_id
from softprompt.errors import UserError
from softprompt.trials.starts import start_id


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
    """Returns every n-th trial from the i-th on (from 1), so that shards have similar costs.

    A trial that starts from the prompt of another one is in that one's shard.
    """
    part, parts = shard
    positions = {trial_id(config): n for n, config in enumerate(trials)}

    def first(n: int) -> int:
        start = positions.get(start_id(trials[n]))
        return n if start is None else first(start)

    return [config for n, config in enumerate(trials) if first(n) % parts == part - 1]
