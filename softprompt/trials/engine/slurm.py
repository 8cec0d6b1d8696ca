"""Workers on a Slurm cluster: one job array, each of whose jobs keeps one worker running.

Source: https://slurm.schedmd.com/sbatch.html, version 24.11.
"""

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from softprompt.errors import UserError, one_line
from softprompt.trials.engine.scripts import render


def batch_script(command: Sequence[str], *, workers: int, options: str, logs: str) -> str:
    """Returns the script of a job array whose jobs run a worker until nothing is left to do.

    A job that is preempted, or near its time limit, stops its worker with SIGTERM, which saves, and
    goes back to the queue. With several tasks in a job, `srun` starts one process of the worker in
    each and names process 0's address with `--distributed`.

    Args:
        command: the words of the command that runs a worker.
        workers: the number of jobs.
        options: more options of sbatch, such as "--partition=gpu --gres=gpu:1"; they come last and
            replace the script's own.
        logs: a folder that exists, for the jobs' output.

    Raises:
        UserError: `options` has a line break or a quote that is not closed, or no option in it.
    """
    try:
        words = shlex.split(options)
    except ValueError as error:
        raise UserError(f"--slurm is {options!r}: {error}; allowed: options of sbatch") from error
    if "\n" in options or (words and not words[0].startswith("-")):
        raise UserError(f"--slurm is {options!r}; allowed: options of sbatch, as in --time=60")
    return render(
        "slurm.sh",
        command=shlex.join(command),
        workers=workers,
        options=[options] if words else [],
        log=f"{logs}/%A_%a.log",
    )


def submit(command: Sequence[str], *, workers: int, options: str, logs: str) -> str:
    """Submits the job array of `batch_script`, and returns its id. Creates the folder `logs`.

    Raises:
        UserError: there is no sbatch, or it refuses the script; see also `batch_script`.
    """
    if shutil.which("sbatch") is None:
        raise UserError("there is no sbatch here; --engine slurm submits from a node that has it")
    folder = Path(logs).absolute()
    script = batch_script(command, workers=workers, options=options, logs=str(folder))
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch", "--parsable"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch: {one_line(RuntimeError(done.stderr))}")
    return done.stdout.strip().partition(";")[0]
