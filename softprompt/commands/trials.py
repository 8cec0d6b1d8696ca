"""Commands that run trials, and show their results.

Modules that are slow to import are imported by the commands that need them.
"""

import argparse
import sys

from softprompt.commands.base import DISTRIBUTED, FOLDER, Command, Overrides, path, print_json
from softprompt.commands.launch import ENGINE_FLAGS, check_flags, show_outputs, start_engine
from softprompt.distributed import start_jax
from softprompt.errors import UserError


def train(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Trains one trial and prints its scores."""
    from softprompt.config import resolve
    from softprompt.config.files import load_config

    config = load_config(
        arguments.config, overrides
    )  # its errors come before JAX opens the devices
    start_jax(arguments.distributed)
    if arguments.dry_run:
        from softprompt.trials.trial_cost import report

        print("\n".join(report(config)))
        return 0
    from softprompt.console import Progress
    from softprompt.results import cautions
    from softprompt.trials.session import Session
    from softprompt.trials.sweep import reason, run_one

    try:
        with Progress() as progress:
            row = run_one(resolve(config), arguments.workdir, Session(progress))
    except UserError:
        raise
    except Exception as error:
        more = f"more in {arguments.workdir}/traceback.txt"
        print(f"softprompt: trial failed: {reason(error)} ({more})", file=sys.stderr)
        return 1
    for caution in cautions(row):
        print(f"softprompt: note: {caution}", file=sys.stderr)
    print_json(
        {key: row[key] for key in ("trial", "name", "status", "steps", "seconds", "metrics")}
    )
    return 0


def sweep(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Runs an experiment's trials, or prints what they would cost."""
    from softprompt.trials import shards
    from softprompt.trials import sweep as sweeps
    from softprompt.trials.experiment import load_experiment, make_trials

    check_flags(arguments)
    experiment = load_experiment(arguments.experiment)
    if arguments.engine:
        return start_engine(experiment, arguments, overrides)
    shard = shards.parse_shard(arguments.shard)
    minutes = shards.parse_minutes(arguments.minutes)
    start_jax(arguments.distributed)  # before a config is resolved, which needs the devices
    trials = make_trials(experiment, arguments.subset, overrides, target=arguments.target or None)
    trials = shards.take_shard(trials, shard)
    import jax

    from softprompt.console import Progress
    from softprompt.results import read_rows
    from softprompt.trials.estimate import estimate
    from softprompt.trials.outputs import record_experiment
    from softprompt.trials.session import Session

    with Progress() as progress:
        session = Session(progress)
        if arguments.dry_run:
            from softprompt.analysis.tables import to_markdown
            from softprompt.trials.sweep_cost import sweep_cost

            here = jax.default_backend()
            costs, note = sweep_cost(
                trials,
                arguments.workdir,
                lambda c: estimate(c, session),
                here=here,
                target=arguments.target or here,
            )
            print(to_markdown(costs, note), end="")
            return int(any(str(state).startswith("fails") for state in costs["state"]))
        if jax.process_index() == 0:
            record_experiment(experiment, arguments.workdir)
        failed = sweeps.run_trials(trials, arguments.workdir, session, minutes)
        if session.compiled:
            progress.say(f"{len(session.compiled)} training programs compiled")
    for row in failed:
        print(f"softprompt: trial {row['name']} failed: {row['error']}", file=sys.stderr)
    if failed:
        print(
            f"softprompt: {len(failed)} of {len(trials)} trials failed; the same command tries "
            "them again",
            file=sys.stderr,
        )
    if jax.process_index() == 0:
        if any(row["status"] == "done" for row in read_rows(arguments.workdir)):
            show_outputs(experiment, arguments.workdir)
    return 1 if failed else 0


def table(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints a table of results."""
    from softprompt import results
    from softprompt.analysis import outcomes, tables
    from softprompt.trials.experiment import load_experiment

    if arguments.experiment:
        show_outputs(load_experiment(arguments.experiment), arguments.folder)
    else:
        rows = results.read_rows(arguments.folder)
        arms = outcomes.compare_arms(outcomes.read_outcomes(arguments.folder))
        if not rows and arms.empty:
            raise UserError(f"no result.json below {arguments.folder!r}, nor {outcomes.FILE} in it")
        found = [tables.overview(rows)] if rows else []
        found += [] if arms.empty else [arms]
        print("\n".join(map(tables.to_markdown, found)), end="")
    return 0


COMMANDS = {
    "train": Command(
        train,
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
        takes_overrides=True,
    ),
    "sweep": Command(
        sweep,
        "run an experiment's trials, then write its table and figure",
        "softprompt sweep prompt_length --subset quickstart --workdir runs/quickstart --dry-run",
        [
            ("experiment", {"metavar": "NAME", "help": "a file in experiments/, or its path"}),
            ("--workdir", {**FOLDER, "help": "the folder of the trials"}),
            ("--subset", {"default": "full", "help": "a named part of the experiment"}),
            (
                "--shard",
                {"default": "1/1", "metavar": "I/N", "help": "run the I-th of N parts, from 1"},
            ),
            (
                "--minutes",
                {
                    "default": "",
                    "metavar": "N",
                    "help": "start no trial after N minutes; run the same command to continue",
                },
            ),
            (
                "--dry-run",
                {"action": "store_true", "help": "only print what the trials would cost"},
            ),
            *ENGINE_FLAGS,
            DISTRIBUTED,
        ],
        takes_overrides=True,
    ),
    "table": Command(
        table,
        "print the table of a folder's results; with --experiment also write it and the figure",
        "softprompt table runs/quickstart --experiment prompt_length",
        [
            (
                "folder",
                {
                    "type": path,
                    "metavar": "DIR",
                    "help": "holds result.json files at any depth, or outcomes.jsonl",
                },
            ),
            ("--experiment", {"metavar": "NAME", "help": "the experiment whose files to write"}),
        ],
    ),
}
