"""The command line: `softprompt COMMAND`, for the commands in `COMMANDS`.

Results go to standard output, progress to standard error. Exit codes: 0 done, 1 a trial failed,
2 a mistake in the command or its input, 75 stopped by SIGTERM and resumable, 130 interrupted.
The commands themselves are in softprompt/commands/.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from softprompt.commands import COMMANDS
from softprompt.commands.base import Overrides
from softprompt.errors import UserError
from softprompt.files import check_reachable

DESCRIPTION = "Prompt tuning on frozen language models, and sweeps that study how it scales."


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def check_paths(arguments: argparse.Namespace) -> None:
    """Checks that every folder and file that a command names can be reached."""
    for value in vars(arguments).values():
        for text in value if isinstance(value, list) else [value]:
            check_reachable(str(text))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        check_streams()
        arguments, overrides = parse(sys.argv[1:] if argv is None else argv)
        check_paths(arguments)
        code = COMMANDS[arguments.command].run(arguments, overrides)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"softprompt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("softprompt: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of standard output is gone, as after `| head`
        drop_results()
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        drop_results()
        print(f"softprompt: error: cannot write any more: {error.strerror}", file=sys.stderr)
        return 2


def check_streams() -> None:
    """Checks that standard output is open, and replaces a closed standard error by the null device.

    Otherwise the next file that is opened would get the closed descriptor's number, and libraries
    that write to standard error would write into that file.

    Raises:
        UserError: standard output is closed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")
    if sys.stdout is None:
        raise UserError("standard output is closed; results go there (>/dev/null drops them)")


def drop_results() -> None:
    """Makes standard output the null device, so that Python's own flush at exit succeeds."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, Overrides]:
    """Returns the arguments and the `--config.key=value` pairs.

    Raises:
        UserError: an argument is unknown, missing or not allowed.
    """
    rest, overrides = split_overrides(argv)
    parser = _Parser(prog="softprompt", description=DESCRIPTION, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Parser
    )
    for name, command in COMMANDS.items():
        more = "  --config.KEY=VALUE sets any config key." if command.takes_overrides else ""
        added = commands.add_parser(
            name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.{more}",
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for flag, keywords in command.flags:
            added.add_argument(flag, **keywords)
    arguments = parser.parse_args(rest)
    if overrides and not COMMANDS[arguments.command].takes_overrides:
        raise UserError(f"--config.{overrides[0][0]}: {arguments.command} takes no config keys")
    return arguments, overrides


def split_overrides(argv: Sequence[str]) -> tuple[list[str], Overrides]:
    """Takes `--config.key=value` and `--config.key value` out of the arguments.

    Raises:
        UserError: a key without a value.
    """
    rest: list[str] = []
    overrides: Overrides = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        key, given, value = word.removeprefix("--config.").partition("=")
        if not given:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError(f"{word} has no value; write {word}=VALUE")
            value = following
        overrides.append((key, value))
    return rest, overrides


def _version() -> str:
    from softprompt import __version__

    return f"softprompt {__version__}"
