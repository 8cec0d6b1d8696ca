"""The command line: `softprompt COMMAND`, for the commands in `COMMANDS`.

Results go to standard output, progress to standard error. Exit codes: 0 done, 1 a trial failed,
2 a mistake in the command or its input, 75 stopped by SIGTERM and resumable, 130 interrupted.
The commands themselves are in softprompt/commands.py.
"""

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from softprompt.commands import RUN, Overrides
from softprompt.errors import UserError
from softprompt.files import check_reachable

DESCRIPTION = "Prompt tuning on frozen language models, and sweeps that study how it scales."


def path(text: str) -> str:
    """Returns a path as it was given; "" would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("is ''; allowed: a path that is not empty")
    return text


FOLDER: dict = {"required": True, "type": path, "metavar": "DIR"}

DISTRIBUTED: tuple[str, dict] = (
    "--distributed",
    {
        "nargs": "?",
        "const": "auto",
        "metavar": "HOST:PORT,I,N",
        "help": "join several processes; no value on a TPU slice or under SLURM",
    },
)

ANY_WEIGHTS: tuple[str, dict] = (
    "--any-weights",
    {"action": "store_true", "help": "allow other weights than those of the training"},
)

# command -> (one line, example, flags as (name, argparse's keywords))
COMMANDS: dict[str, tuple[str, str, list[tuple[str, dict]]]] = {
    "train": (
        "train one trial; the same command resumes it, and does nothing once it is done",
        "softprompt train --config configs/base.py --config.method.length=5 --workdir runs/first",
        [
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "default: base config"}),
            ("--workdir", {**FOLDER, "help": "the trial's folder"}),
            (
                "--dry-run",
                {"action": "store_true", "help": "only trace it at full size, and print its cost"},
            ),
            DISTRIBUTED,
        ],
    ),
    "evaluate": (
        "score trained prompts on a split",
        "softprompt evaluate --run runs/first runs/second --task sms_spam --split test",
        [
            (
                "--run",
                {**FOLDER, "nargs": "+", "help": "trials' folders"},
            ),
            ("--task", {"metavar": "NAME", "help": "default: the task or tasks of the trial"}),
            ("--split", {"default": "test", "help": "train, validation or test (default)"}),
            ("--generate", {"action": "store_true", "help": "also generate answers"}),
            ANY_WEIGHTS,
        ],
    ),
    "predict": (
        "label lines from standard input with a trained prompt",
        "echo 'a quiet, moving film' | softprompt predict --run runs/first",
        [
            ("--run", {**FOLDER, "help": "a trial's folder"}),
            ("--task", {"metavar": "NAME", "help": "default: the task it was trained on"}),
            (
                "--format",
                {"default": "text", "choices": ("text", "json"), "help": "of the answers"},
            ),
            ANY_WEIGHTS,
        ],
    ),
    "export": (
        "write a trained delta as a PEFT adapter, an array, or merged into its model",
        "softprompt export --run runs/first --format peft --to adapters/first",
        [
            ("--run", {**FOLDER, "help": "a trial's folder"}),
            (
                "--format",
                {
                    "required": True,
                    "choices": ("peft", "npy", "hf"),
                    "help": "an adapter's folder, a file, or the whole model's folder",
                },
            ),
            ("--to", {**FOLDER, "metavar": "PATH", "help": "a new folder or file"}),
        ],
    ),
    "import": (
        "make a trial's folder from a PEFT adapter or a prompt's array, for evaluate and predict",
        "softprompt import adapters/first --model HuggingFaceTB/SmolLM2-135M --workdir runs/theirs",
        [
            (
                "source",
                {
                    "type": path,
                    "metavar": "PATH",
                    "help": "an adapter's folder, or a .npy file [P, D]",
                },
            ),
            (
                "--model",
                {"required": True, "metavar": "NAME", "help": "the model of its training"},
            ),
            ("--workdir", {**FOLDER, "help": "the new trial's folder"}),
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "config with the task"}),
            ANY_WEIGHTS,
        ],
    ),
    "sweep": (
        "run an experiment's trials, then write its table and figure",
        "softprompt sweep prompt_length --subset quickstart --workdir runs/quickstart --dry-run",
        [
            ("experiment", {"metavar": "NAME", "help": "a file in experiments/, or its path"}),
            ("--workdir", {**FOLDER, "help": "the folder of the trials"}),
            ("--subset", {"default": "full", "help": "a named part of the experiment"}),
            (
                "--shard",
                {
                    "default": "1/1",
                    "metavar": "I/N",
                    "help": "run the I-th of N parts, from 1",
                },
            ),
            (
                "--minutes",
                {
                    "default": "",
                    "metavar": "N",
                    "help": "start no trial after N minutes; the same command goes on later",
                },
            ),
            (
                "--dry-run",
                {"action": "store_true", "help": "only print what the trials would cost"},
            ),
            DISTRIBUTED,
        ],
    ),
    "table": (
        "print the table of a folder's results; with --experiment also write it and the figure",
        "softprompt table runs/quickstart --experiment prompt_length",
        [
            (
                "folder",
                {"type": path, "metavar": "DIR", "help": "holds result.json files, at any depth"},
            ),
            (
                "--experiment",
                {"metavar": "NAME", "help": "the experiment whose files to write"},
            ),
        ],
    ),
    "pretrain": (
        "pretrain a model on text; the same command resumes it, and does nothing once it is done",
        "softprompt pretrain ladder/d1",
        [
            ("recipe", {"metavar": "NAME|FILE", "help": "a name of the ladder, or a .py file"}),
            DISTRIBUTED,
        ],
    ),
    "ladder": (
        "list the pretrained models, or move them between machines in one archive",
        "softprompt ladder pack ladder.tar",
        [
            ("action", {"nargs": "?", "default": "list", "choices": ("list", "pack", "import")}),
            ("file", {"nargs": "?", "default": "", "metavar": "FILE", "help": "the archive"}),
        ],
    ),
    "config": (
        "list the config keys: defaults, what is allowed, what reads them, and what they mean",
        "softprompt config method 'train.*'",
        [("keys", {"nargs": "*", "metavar": "KEY", "help": "a section, key or pattern; all"})],
    ),
    "models": (
        "list the catalogue of models, or check their training steps at full size",
        "softprompt models 'EleutherAI/*' --check",
        [
            ("names", {"nargs": "*", "metavar": "NAME", "help": "a name, pattern or family"}),
            ("--check", {"action": "store_true", "help": "check shapes, sharding and memory"}),
        ],
    ),
    "data": (
        "list the tasks, prepare one's data, or show its examples",
        "softprompt data show movie_sentiment",
        [
            ("action", {"nargs": "?", "default": "list", "choices": ("list", "prepare", "show")}),
            ("task", {"nargs": "?", "default": "", "metavar": "TASK"}),
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "config with the task"}),
        ],
    ),
}

TAKES_OVERRIDES = ("train", "import", "sweep", "data")


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
        code = RUN[arguments.command](arguments, overrides)
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
    for name, (line, example, flags) in COMMANDS.items():
        more = "  --config.KEY=VALUE sets any config key." if name in TAKES_OVERRIDES else ""
        command = commands.add_parser(
            name,
            help=line,
            description=f"{line[0].upper()}{line[1:]}.{more}",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for flag, keywords in flags:
            command.add_argument(flag, **keywords)
    arguments = parser.parse_args(rest)
    if overrides and arguments.command not in TAKES_OVERRIDES:
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
