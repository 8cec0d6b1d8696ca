"""The description of a command of the command line."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

Overrides = list[tuple[str, str]]
Flag = tuple[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        run: runs the command, and returns its exit code.
        summary: what it does, in one line.
        example: a command line.
        flags: names of its arguments, with argparse's keywords.
        takes_overrides: whether `--config.KEY=VALUE` may be given.
    """

    run: Callable[[argparse.Namespace, Overrides], int]
    summary: str
    example: str
    flags: list[Flag]
    takes_overrides: bool = False


def path(text: str) -> str:
    """Returns a path unchanged; "" is an error, since it would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("is ''; allowed: a path that is not empty")
    return text


FOLDER: dict[str, Any] = {"required": True, "type": path, "metavar": "DIR"}

DISTRIBUTED: Flag = (
    "--distributed",
    {
        "nargs": "?",
        "const": "auto",
        "metavar": "HOST:PORT,I,N",
        "help": "join several processes; no value on a TPU slice or under SLURM",
    },
)

ANY_WEIGHTS: Flag = (
    "--any-weights",
    {"action": "store_true", "help": "accept a delta that was trained on other weights"},
)


def print_json(value: object) -> None:
    """Prints a value as indented JSON."""
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))
