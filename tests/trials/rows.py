"""Configs, result rows and runs of sweeps that train nothing."""

from unittest import mock

from softprompt import results
from softprompt.config import base_config
from softprompt.console import Progress
from softprompt.trials import groups, sweep
from softprompt.trials.experiment import load_experiment, make_trials
from softprompt.trials.session import Session


def config(length=20, seed=0, name="prompt"):
    made = base_config()
    made.method.name = name
    made.method.length = length
    made.seed = seed
    made.model.dtype = "float32"
    return made


def done_row(made, accuracy=0.8):
    return results.make_row(
        made,
        status="done",
        seconds=1.0,
        steps=made.train.steps,
        trainable=made.method.length * 576,
        metrics={
            "validation": {"accuracy": accuracy, "examples": 100},
            "test": {"accuracy": accuracy, "examples": 200},
        },
    )


class Runner:
    """A run_trial that only writes the row, and remembers what it was asked for."""

    def __init__(self, errors=None):
        self.errors = errors or {}
        self.ran = []

    def __call__(self, made, folder):
        self.ran.append(made.method.length)
        if made.method.length in self.errors:
            raise self.errors[made.method.length]
        row = done_row(made)
        results.write_result(folder, row)
        return row


def run(trials, workdir, runner, **options):
    """Runs a sweep of which `runner` runs each trial; `options` are those of `run_sweep`."""
    alone = lambda made, folder, session: runner(made, folder)  # noqa: E731
    with mock.patch.object(groups, "run_trial", alone), Progress() as progress:
        return sweep.run_sweep(trials, workdir, Session(progress), **options)


def experiment_rows(subset):
    trials = make_trials(load_experiment("prompt_length"), subset)
    return [done_row(made, 0.7 + 0.005 * number) for number, made in enumerate(trials)]
