"""The command line: `softprompt train|evaluate|predict|sweep|table|models|data`.

Results go to standard output, progress to standard error. Exit codes: 0 done, 1 a sweep with failed
trials, 2 a mistake in what was asked, 75 stopped by SIGTERM and resumable, 130 interrupted.
Everything slow to import is imported by the command that needs it.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from softprompt.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

    from softprompt.data.tasks import Task

Overrides = list[tuple[str, str]]

DESCRIPTION = "Prompt tuning on frozen language models, and sweeps that study how it scales."

DISTRIBUTED: tuple[str, dict] = (
    "--distributed",
    {
        "nargs": "?",
        "const": "auto",
        "metavar": "HOST:PORT,I,N",
        "help": "be one of several processes (on a TPU slice or under SLURM, without a value)",
    },
)

# command -> (one line, example, flags as (name, argparse's keywords))
COMMANDS: dict[str, tuple[str, str, list[tuple[str, dict]]]] = {
    "train": (
        "train one prompt; the same command resumes, and does nothing once done",
        "softprompt train --config configs/base.py --config.method.length=5 --workdir runs/first",
        [
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "default: base config"}),
            ("--workdir", {"required": True, "metavar": "DIR", "help": "the trial's folder"}),
            DISTRIBUTED,
        ],
    ),
    "evaluate": (
        "score a trained prompt on a split",
        "softprompt evaluate --run runs/first --task sms_spam --split test",
        [
            ("--run", {"required": True, "metavar": "DIR", "help": "a trial's folder"}),
            ("--task", {"metavar": "NAME", "help": "default: the task it was trained on"}),
            ("--split", {"default": "test", "help": "train, validation or test (default)"}),
            ("--generate", {"action": "store_true", "help": "also let the model write answers"}),
        ],
    ),
    "predict": (
        "label lines from standard input with a trained prompt",
        "echo 'a quiet, moving film' | softprompt predict --run runs/first",
        [
            ("--run", {"required": True, "metavar": "DIR", "help": "a trial's folder"}),
            (
                "--format",
                {"default": "text", "choices": ("text", "json"), "help": "of the answers"},
            ),
        ],
    ),
    "sweep": (
        "run an experiment's trials, then write its table and figure",
        "softprompt sweep prompt_length --subset quickstart --workdir runs/quickstart --dry-run",
        [
            ("experiment", {"metavar": "NAME", "help": "a file in experiments/, or its path"}),
            ("--workdir", {"required": True, "metavar": "DIR", "help": "where trials are kept"}),
            ("--subset", {"default": "full", "help": "a named part of the experiment"}),
            (
                "--shard",
                {"default": "1/1", "metavar": "I/N", "help": "the I-th of N parts, from 1"},
            ),
            (
                "--dry-run",
                {"action": "store_true", "help": "print what it would cost, run nothing"},
            ),
            DISTRIBUTED,
        ],
    ),
    "table": (
        "print the table of a folder's results; with --experiment also write it and the figure",
        "softprompt table runs/quickstart --experiment prompt_length",
        [
            ("folder", {"metavar": "DIR", "help": "holds result.json files, at any depth"}),
            ("--experiment", {"metavar": "NAME", "help": "whose table and figure to write"}),
        ],
    ),
    "models": ("list the models that have a name here", "softprompt models", []),
    "data": (
        "list the tasks, prepare one's data, or show its examples",
        "softprompt data show movie_sentiment",
        [
            ("action", {"nargs": "?", "default": "list", "choices": ("list", "prepare", "show")}),
            ("task", {"nargs": "?", "default": "", "metavar": "TASK"}),
            ("--config", {"default": "", "metavar": "FILE[:ARG]", "help": "whose task to take"}),
        ],
    ),
}

TAKES_OVERRIDES = ("train", "sweep", "data")


class _Parser(argparse.ArgumentParser):
    """argparse, its complaints as UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    try:
        arguments, overrides = parse(sys.argv[1:] if argv is None else argv)
        code = RUN[arguments.command](arguments, overrides)
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"softprompt: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("softprompt: interrupted; the same command resumes", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


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


def join(distributed: str | None) -> None:
    """Joins the other processes of a run; nothing where it has one.

    Args:
        distributed: "auto" (JAX asks the TPU slice, SLURM or Open MPI), or "host:port,i,n": the
            address of process 0, this one's number and how many there are. None: one process.

    Raises:
        UserError: another form, or nothing to join.
    """
    if distributed is None:
        return
    import jax

    found = re.fullmatch(r"(\S+:\d+),(\d+),(\d+)", distributed)
    if distributed != "auto" and not (found and int(found[2]) < int(found[3])):
        raise UserError(
            f"--distributed is {distributed!r}; allowed: no value, or HOST:PORT,I,N "
            "with I from 0 to N - 1"
        )
    try:
        if found:
            jax.distributed.initialize(found[1], int(found[3]), int(found[2]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--distributed {distributed}: {error}") from error


def train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Trains one trial and prints its scores."""
    import time

    from softprompt.config import resolve
    from softprompt.config_files import load_config

    config = load_config(arguments.config, overrides)  # its mistakes show before JAX is imported
    join(arguments.distributed)
    from softprompt.progress import Progress
    from softprompt.sweep import record_failure
    from softprompt.training.loop import Diverged, terminable
    from softprompt.training.session import Session
    from softprompt.training.trial import run_trial

    config = resolve(config)
    began = time.monotonic()
    try:
        with Progress() as progress, terminable():
            row = run_trial(config, arguments.workdir, session=Session(progress))
    except Diverged as error:
        record_failure(config, arguments.workdir, error, time.monotonic() - began)
        raise
    except UserError:
        raise
    except Exception as error:
        row = record_failure(config, arguments.workdir, error, time.monotonic() - began)
        print(
            f"softprompt: trial failed: {row['error']} (more in {arguments.workdir}/traceback.txt)",
            file=sys.stderr,
        )
        return 1
    _print_json(
        {key: row[key] for key in ("trial", "name", "status", "steps", "seconds", "metrics")}
    )
    return 0


def evaluate(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints a trained prompt's scores as JSON."""
    from softprompt.evaluation.run import evaluate_run
    from softprompt.progress import Progress

    with Progress() as progress:
        scores = evaluate_run(
            arguments.run,
            task=arguments.task,
            split=arguments.split,
            generated=arguments.generate,
            progress=progress,
        )
    _print_json(scores)
    return 0


def predict(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints an answer for each line of standard input."""
    import json

    from softprompt.evaluation.run import predict_lines
    from softprompt.progress import Progress

    lines = (line.rstrip("\r\n") for line in sys.stdin)
    group = {"group": 1} if sys.stdin.isatty() else {}
    with Progress() as progress:
        for answer in predict_lines(arguments.run, lines, progress, **group):
            if arguments.format == "json":
                print(json.dumps(answer, ensure_ascii=False), flush=True)
            else:
                shares = [f"{name}={share:.4f}" for name, share in answer["probabilities"].items()]
                print("\t".join([answer["label"], *shares]), flush=True)
    return 0


def sweep(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Runs an experiment's trials, or says what they would cost."""
    from softprompt import sweep as sweeps

    experiment = sweeps.load_experiment(arguments.experiment)
    shard = sweeps.parse_shard(arguments.shard)
    trials = sweeps.make_trials(experiment, arguments.subset, overrides)
    trials = sweeps.take_shard(trials, shard)
    join(arguments.distributed)
    from softprompt.progress import Progress
    from softprompt.training.estimate import estimate
    from softprompt.training.loop import terminable
    from softprompt.training.session import Session
    from softprompt.training.trial import run_trial

    with Progress() as progress, terminable():
        session = Session(progress)
        if arguments.dry_run:
            from softprompt.analysis.tables import to_markdown

            costs = sweeps.dry_run(trials, arguments.workdir, lambda c: estimate(c, session))
            print(to_markdown(costs), end="")
            return 0
        failed = sweeps.run_sweep(
            trials,
            arguments.workdir,
            lambda config, folder: run_trial(config, folder, session=session),
            progress=progress,
            estimate=lambda config: estimate(config, session),
        )
    _write_experiment(experiment, arguments.workdir)
    for row in failed:
        print(f"softprompt: trial {row['name']} failed: {row['error']}", file=sys.stderr)
    if failed:
        print(
            f"softprompt: {len(failed)} of {len(trials)} trials failed; the same command tries "
            "them again",
            file=sys.stderr,
        )
    return 1 if failed else 0


def table(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints a table of results."""
    from softprompt import results
    from softprompt import sweep as sweeps
    from softprompt.analysis import tables

    if arguments.experiment:
        _write_experiment(sweeps.load_experiment(arguments.experiment), arguments.folder)
    else:
        rows = results.read_rows(arguments.folder)
        if not rows:
            raise UserError(f"no result.json below {arguments.folder!r}")
        print(tables.to_markdown(tables.overview(rows)), end="")
    return 0


def _write_experiment(experiment: "ModuleType", folder: str) -> None:
    """Writes table and figure of all rows below a folder, prints the table and where they are."""
    from etils import epath

    from softprompt import results
    from softprompt import sweep as sweeps

    rows = results.read_rows(folder)
    if not rows:
        raise UserError(f"no result.json below {folder!r}")
    sweeps.write_outputs(experiment, rows, folder)
    print((epath.Path(folder) / "table.md").read_text(), end="")
    print(
        f"wrote table.md, table.csv, table.tex, figure.png, figure.pdf in {folder}", file=sys.stderr
    )


def models(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints the catalogue."""
    from softprompt.models.catalog import CATALOG

    lines = [
        (name, f"{entry.parameters / 1e6:,.0f}M", entry.family, str(entry.source), entry.licence)
        for name, entry in CATALOG.items()
    ]
    _print_columns(("NAME", "PARAMETERS", "FAMILY", "SOURCE", "LICENCE"), lines)
    print("model.name also takes a hub name (org/repo), a folder or a Llama-family .gguf file.")
    return 0


def data(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Lists the tasks, prepares one's data, or shows its examples."""
    from softprompt.config_files import load_config
    from softprompt.data.tasks import TASKS, get_task

    if arguments.action == "list":
        lines = [(task.name, task.source, task.about) for task in TASKS.values()]
        _print_columns(("NAME", "SOURCE", "ABOUT"), lines)
        print("For your own data see configs/own_data.py.")
        return 0
    if not (arguments.task or arguments.config or overrides):
        raise UserError(f"data {arguments.action} needs a task; known: {', '.join(sorted(TASKS))}")
    named = [("task.name", arguments.task)] if arguments.task else []
    task = get_task(load_config(arguments.config, [*named, *overrides]).task)
    _show(task, examples=3 if arguments.action == "show" else 0)
    return 0


def _show(task: "Task", *, examples: int) -> None:
    """Prints a task's examples and label counts, a split at a time; reading prepares the data."""
    import json

    from softprompt.data.subsets import label_counts
    from softprompt.data.tasks import SPLITS, read_split, target_text

    for split in SPLITS:
        records = read_split(task, split)
        counts = label_counts(records).items()
        shares = ", ".join(f"{label or 'unlabelled'} {count:,}" for label, count in counts)
        print(f"{task.name} {split}: {len(records):,} examples ({shares})")
        for record in records[:examples] if split == "train" else ():
            target = target_text(task, record["label"])
            print(f"  id      {record['id']}")
            print(f"  input   {json.dumps(task.template.format(**record), ensure_ascii=False)}")
            print(f"  target  {json.dumps(target, ensure_ascii=False)}")


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))


def _print_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints aligned columns."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, *lines):
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())


RUN: dict[str, Callable[[argparse.Namespace, Overrides], int]] = {
    "train": train,
    "evaluate": evaluate,
    "predict": predict,
    "sweep": sweep,
    "table": table,
    "models": models,
    "data": data,
}
