"""Commands of workers and of the store that they share."""

import argparse
import sys
from typing import TYPE_CHECKING

from softprompt.commands.base import DISTRIBUTED, Command, Overrides, path
from softprompt.source import is_clean

if TYPE_CHECKING:
    from types import ModuleType

    from softprompt.trials.engine.plan import Plan

WATCH_SECONDS = 15

STORE = ("workdir", {"type": path, "metavar": "DIR", "help": "the sweep's folder, or gs://"})


def write_sweep_plan(
    experiment: "ModuleType", arguments: argparse.Namespace, overrides: Overrides
) -> "Plan":
    """Writes the plan of a sweep. It opens no device, since a worker needs the TPU."""
    from softprompt.trials.engine.plan import plan_sweep
    from softprompt.trials.experiment import make_trials
    from softprompt.trials.outputs import experiment_name, record_experiment

    target, workdir = arguments.target, arguments.workdir
    trials = make_trials(experiment, arguments.subset, overrides, target=target)
    name = experiment_name(experiment)
    plan = plan_sweep(workdir, name, arguments.subset, trials, target=target)
    record_experiment(experiment, workdir)
    print(f"softprompt: {len(plan.jobs)} trials planned in {workdir}", file=sys.stderr)
    if not is_clean(plan.commit):
        print(
            f"softprompt: note: no archive of the code is in {workdir}, since it is of commit "
            f"{plan.commit}: workers must run this very code",
            file=sys.stderr,
        )
    return plan


def work(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Runs trials of a plan until none is left."""
    from softprompt.trials.engine.worker import work as run
    from softprompt.trials.shards import parse_minutes

    minutes = parse_minutes(arguments.minutes)
    return run(arguments.workdir, minutes=minutes, distributed=arguments.distributed)


def stop(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Asks all workers to save and leave, or lets them start again."""
    from softprompt.trials.engine.claims import STOP
    from softprompt.trials.engine.plan import read_plan
    from softprompt.trials.engine.store import open_store

    store = open_store(arguments.workdir)
    read_plan(store)
    if arguments.undo:
        store.delete(STOP)
    else:
        store.write(STOP, b"")
    return 0


def status(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Prints the state of a sweep, and writes it as a page."""
    import time
    from pathlib import Path

    from softprompt.console import print_columns
    from softprompt.files import write_text
    from softprompt.trials.engine.status import COLUMNS, page, read_status, summary, table
    from softprompt.trials.engine.store import open_store

    store = open_store(arguments.workdir)
    while True:
        found = read_status(store)
        print("\n".join(summary(*found, arguments.price)))
        print_columns(COLUMNS, table(found[2]))
        refresh = WATCH_SECONDS if arguments.watch else 0
        if arguments.html:
            write_text(Path(arguments.html), page(*found, arguments.price, refresh=refresh))
        if not refresh:
            return 0
        time.sleep(refresh)
        print()


def check(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Checks that a worker can work on this machine."""
    from softprompt.trials.engine.check import check as run

    for what, said in run(arguments.workdir):
        print(f"{what}: {said}", flush=True)
    return 0


COMMANDS = {
    "work": Command(
        work,
        "run trials of a sweep's plan until none is left; any number of workers share it",
        "softprompt work gs://BUCKET/prompt_length",
        [
            STORE,
            (
                "--minutes",
                {"default": "", "metavar": "N", "help": "claim no trial after N minutes"},
            ),
            DISTRIBUTED,
        ],
    ),
    "status": Command(
        status,
        "print how far a sweep is, and what its workers do",
        "softprompt status gs://BUCKET/prompt_length --watch",
        [
            STORE,
            ("--watch", {"action": "store_true", "help": "again every 15 seconds"}),
            ("--html", {"type": path, "metavar": "FILE", "help": "also write a page"}),
            (
                "--price",
                {"type": float, "metavar": "DOLLARS", "help": "of a chip-hour, to print the cost"},
            ),
        ],
    ),
    "check": Command(
        check,
        "check on a new machine that a worker can work there: store, claims, devices, SIGTERM",
        "softprompt check gs://BUCKET/prompt_length",
        [STORE],
    ),
    "stop": Command(
        stop,
        "ask all workers of a sweep to save and leave",
        "softprompt stop gs://BUCKET/prompt_length",
        [STORE, ("--undo", {"action": "store_true", "help": "let workers start again"})],
    ),
}
