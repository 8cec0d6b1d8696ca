"""Small trials: how they are run, what they leave, and when two are one."""

import json
import os
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file

from softprompt.console import Progress
from softprompt.results import read_result
from softprompt.training.logs import read_log
from softprompt.trials.run import run_trial
from softprompt.trials.sweep import run_sweep
from tests.contracts.examples import session, trial_config, write_task

TRIALS = (
    {"seed": 0, "method__init": "vocabulary", "optimizer__rate": 0.02},
    {"seed": 1, "method__init": "uniform", "optimizer__schedule": "constant"},
    {"seed": 2, "method__init": "labels", "optimizer__warmup": 2, "optimizer__rate": 0.1},
)
OTHER = {**TRIALS[0], "optimizer__b1": 0.5, "optimizer__eps": 0.1}


def configs(model, tmp_path, trials, **changes):
    source = write_task(tmp_path)
    return [trial_config(model, source, eval__select="last", **one, **changes) for one in trials]


def ended(folder):
    """The loss of every step and the last delta of a finished trial."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    delta = load_file(folder / "delta.safetensors")
    return np.array(losses), np.concatenate([delta[name].ravel() for name in sorted(delta)])


def outcome(config, folder, shared):
    """The same, once it has run."""
    run_trial(config, folder, session=shared)
    losses, delta = ended(folder)
    assert len(losses) == 4
    return losses, delta


def alone(config, folder):
    """The same of a trial in a session of its own."""
    with session() as shared:
        return outcome(config, folder, shared)


def apart(one, other):
    """Largest difference of losses, and of deltas."""
    return tuple(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def run(trials, workdir, shared):
    """Runs a sweep; returns the rows that failed."""
    return run_sweep(trials, workdir, shared)


def stored(folder):
    """Name -> shape of every array in every checkpoint of a trial."""
    found = {}
    for step in folder.glob("checkpoints/*/state"):
        metadata = ocp.StandardCheckpointer().metadata(step).item_metadata
        leaves, _ = jax.tree_util.tree_flatten_with_path(metadata)
        found |= {f"{step.parent.name}{jax.tree_util.keystr(p)}": leaf.shape for p, leaf in leaves}
    return found


TIMING = ("seconds", "tokens_per_second", "examples_per_second", "peak_share", "input_wait_share")


def scientific(folder):
    """The log without what a clock put into it."""
    return [{k: v for k, v in line.items() if k not in TIMING} for line in read_log(folder)]


def check_same(folder, reference):
    """Whether two folders hold one trial, to the bit."""
    assert scientific(folder) == scientific(reference)
    for name in ("delta.safetensors", "predictions.jsonl"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    ours, theirs = read_result(folder), read_result(reference)
    for key in ("metrics", "steps", "status", "flops", "trainable"):
        assert ours[key] == theirs[key], key


class StopAt(Progress):
    """Interrupts its process when the loop has noted a step."""

    step, number = -1, signal.SIGINT

    def stage(self, what, done=0, total=0, note=""):
        if what == "train" and done == self.step and "loss" in note:
            self.step = -1
            if self.number == signal.SIGINT:
                raise KeyboardInterrupt  # the signal itself is ignored in a shell's background
            os.kill(os.getpid(), self.number)
