"""The command that writes recipes for starting workers on Cloud TPU and Slurm."""

import argparse

from softprompt.commands.base import FOLDER, Command, Overrides, path


def launch(arguments: argparse.Namespace, overrides: Overrides) -> int:
    """Writes the files that start workers of a planned sweep, and prints the commands to run."""
    import shlex

    from softprompt.errors import UserError
    from softprompt.source import is_clean
    from softprompt.trials.engine.launch import Order, make_recipe, write_recipe
    from softprompt.trials.engine.plan import archive_name, read_plan
    from softprompt.trials.engine.store import open_store

    plan = read_plan(open_store(arguments.workdir))
    if not is_clean(plan.commit):
        raise UserError(
            f"{arguments.workdir}: its plan is of commit {plan.commit}; allowed: a clean commit, "
            "which other machines can install"
        )
    workdir = arguments.workdir.rstrip("/")
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

COMMANDS = {
    "launch": Command(
        launch,
        "write the files that start workers of a planned sweep, and print the commands to run",
        "softprompt launch gs://BUCKET/x --on sky --tpu v6e-8 --count 8 --spot --to launch/x",
        [
            ("workdir", {"type": path, "metavar": "DIR", "help": "a folder with a plan"}),
            (
                "--on",
                {"required": True, "choices": TARGETS, "help": "what the machines are started by"},
            ),
            ("--to", {**FOLDER, "help": "a new or empty folder for the files"}),
            (
                "--tpu",
                {"default": "v6e-8", "metavar": "SLICE", "help": "such as v6e-8 (default)"},
            ),
            (
                "--count",
                {"default": 1, "type": int, "metavar": "N", "help": "slices, or jobs of Slurm"},
            ),
            ("--spot", {"action": "store_true", "help": "on capacity that may be taken away"}),
            (
                "--slurm",
                {"default": "", "metavar": "OPTIONS", "help": "of sbatch, for --on slurm"},
            ),
        ],
    ),
}
