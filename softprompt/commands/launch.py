"""Sweeps whose workers an engine starts, and recipes for machines that start them."""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from softprompt.commands.base import FOLDER, Command, Flag, Overrides, path
from softprompt.commands.engine import write_sweep_plan
from softprompt.errors import UserError

if TYPE_CHECKING:
    from types import ModuleType

    from softprompt.trials.engine.plan import Plan

RESOURCES = {"tpu": "TPU", "gpu": "GPU", "cpu": "CPU", "": ""}  # Ray's, by target


def start_engine(
    experiment: "ModuleType", arguments: argparse.Namespace, overrides: Overrides
) -> int:
    """Plans a sweep in its folder, and lets an engine start workers."""
    plan = write_sweep_plan(experiment, arguments, overrides)
    match arguments.engine:
        case "ray":
            return _on_ray(arguments, plan, experiment)
        case "slurm":
            return _on_slurm(arguments)
    print(f"softprompt work {shlex.quote(arguments.workdir)}")
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """Checks that the flags of a sweep suit its engine, if it has one.

    Raises:
        UserError: a flag of another engine, or of a sweep without one.
    """
    given = {"--shard": arguments.shard != "1/1", "--minutes": bool(arguments.minutes)}
    given |= {"--dry-run": arguments.dry_run, "--distributed": arguments.distributed is not None}
    wrong = [flag for flag, is_given in given.items() if is_given]
    if arguments.engine and wrong:
        raise UserError(f"{wrong[0]} cannot be combined with --engine")
    if arguments.target and not arguments.engine and not arguments.dry_run:
        raise UserError("--target needs --engine or --dry-run")
    if arguments.engine != "slurm" and (arguments.slurm or arguments.workers != 1):
        raise UserError("--workers and --slurm need --engine slurm")
    if arguments.engine != "ray" and arguments.address != "auto":
        raise UserError("--address needs --engine ray")
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; allowed: 1 or more")


def _on_ray(arguments: argparse.Namespace, plan: "Plan", experiment: "ModuleType") -> int:
    """Runs workers on a Ray cluster until nothing is left; then writes the sweep's outputs."""
    import importlib.util

    if importlib.util.find_spec("ray") is None:
        raise UserError("--engine ray needs Ray; install the extra ray: softprompt[ray]")
    from softprompt.results import read_rows
    from softprompt.trials.engine import ray

    workdir = _everywhere(arguments.workdir)
    code = ray.run(
        ["-m", "softprompt", "work", workdir],
        sweep=workdir,
        resource=RESOURCES[plan.target],
        address=arguments.address,
        say=_say,
    )
    if any(row["status"] == "done" for row in read_rows(arguments.workdir)):
        show_outputs(experiment, arguments.workdir)
    return code


def _on_slurm(arguments: argparse.Namespace) -> int:
    """Submits a job array of workers, and prints its id."""
    from softprompt.trials.engine import slurm

    workdir = _everywhere(arguments.workdir)
    job = slurm.submit(
        [sys.executable, "-m", "softprompt", "work", workdir],
        workers=arguments.workers,
        options=arguments.slurm,
        logs=f"{workdir}/slurm" if "://" not in workdir else "slurm",
    )
    print(job)
    return 0


def _everywhere(workdir: str) -> str:
    """A folder's name for processes that start elsewhere: absolute, or at gs://."""
    from pathlib import Path

    return workdir.rstrip("/") if "://" in workdir else str(Path(workdir).absolute())


def _say(line: str) -> None:
    print(f"softprompt: {line}", file=sys.stderr, flush=True)


def show_outputs(experiment: "ModuleType", folder: str) -> None:
    """Writes the table and figure of all rows below a folder, and prints the table."""
    from etils import epath

    from softprompt.trials.outputs import write_trial_outputs

    files = write_trial_outputs(experiment, folder)
    print((epath.Path(folder) / files[0]).read_text(), end="")
    print(f"wrote {', '.join(files)} in {folder}", file=sys.stderr)


def launch(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Writes the files that start workers of a planned sweep, and prints the commands to run."""
    from softprompt.source import is_clean
    from softprompt.trials.engine.launch import Order, make_recipe, write_recipe
    from softprompt.trials.engine.plan import archive_name, read_plan
    from softprompt.trials.engine.store import open_store

    plan = read_plan(open_store(arguments.workdir))
    if arguments.on != "slurm" and not is_clean(plan.commit):
        raise UserError(
            f"{arguments.workdir}: its plan is of commit {plan.commit}; allowed: a clean commit, "
            "which other machines can install"
        )
    workdir = _everywhere(arguments.workdir)
    order = Order(
        workdir=workdir,
        experiment=plan.experiment,
        archive=f"{workdir}/{archive_name(plan)}",
        commit=plan.commit,
        tpu=arguments.tpu,
        count=arguments.count,
        spot=arguments.spot,
        slurm=arguments.slurm,
    )
    recipe = make_recipe(arguments.on, order)
    write_recipe(recipe, arguments.to)
    print("\n".join([f"cd {shlex.quote(arguments.to)}", *recipe.commands]))
    return 0


TARGETS = ("sky", "compute", "queued", "kuberay", "jobset", "slurm")
SLURM: Flag = ("--slurm", {"default": "", "metavar": "OPTIONS", "help": "options of sbatch"})

ENGINE_FLAGS: list[Flag] = [
    (
        "--engine",
        {
            "default": "",
            "choices": ("ray", "slurm", "store"),
            "help": "what starts workers; store: nothing, only write the plan",
        },
    ),
    (
        "--target",
        {
            "default": "",
            "choices": ("tpu", "gpu", "cpu"),
            "help": "the workers' backend, for configs that depend on it; with --engine or "
            "--dry-run",
        },
    ),
    ("--address", {"default": "auto", "metavar": "HOST:PORT", "help": "of Ray's head"}),
    ("--workers", {"default": 1, "type": int, "metavar": "N", "help": "jobs of Slurm"}),
    SLURM,
]

COMMANDS = {
    "launch": Command(
        launch,
        "write the files that start workers of a planned sweep, and print the commands to run",
        "softprompt launch gs://BUCKET/x --on sky --tpu v6e-8 --count 8 --spot --to launch/x",
        [
            ("workdir", {"type": path, "metavar": "DIR", "help": "a folder with a plan"}),
            (
                "--on",
                {"required": True, "choices": TARGETS, "help": "what starts the machines"},
            ),
            ("--to", {**FOLDER, "help": "a new or empty folder for the files"}),
            ("--tpu", {"default": "v6e-8", "metavar": "SLICE", "help": "such as v6e-8 (default)"}),
            (
                "--count",
                {"default": 1, "type": int, "metavar": "N", "help": "slices, or jobs of Slurm"},
            ),
            ("--spot", {"action": "store_true", "help": "on capacity that may be taken away"}),
            SLURM,
        ],
    )
}
