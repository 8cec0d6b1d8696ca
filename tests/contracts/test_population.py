"""Contract 6: a trial among others equals the same trial alone (one after another, one program)."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from softprompt.trials import prepare
from softprompt.trials.run import run_trial
from tests.contracts.examples import session, trial_config, write_task
from tests.families import write_family_folder
from tests.tiny_t5 import write_complete_t5

TRIALS = (
    {"seed": 0, "method__init": "vocabulary", "optimizer__rate": 0.02},
    {"seed": 1, "method__init": "uniform", "optimizer__schedule": "constant"},
    {"seed": 2, "method__init": "labels", "optimizer__warmup": 2, "optimizer__rate": 0.1},
)
OTHER = {**TRIALS[0], "optimizer__b1": 0.5, "optimizer__eps": 0.1}


def configs(model, tmp_path, trials, **changes):
    source = write_task(tmp_path)
    return [trial_config(model, source, eval__select="last", **one, **changes) for one in trials]


def outcome(config, folder, shared):
    """The loss of every step and the last delta of a trial."""
    run_trial(config, folder, session=shared)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 4
    delta = load_file(folder / "delta.safetensors")
    return np.array(losses), np.concatenate([delta[name].ravel() for name in sorted(delta)])


def alone(config, folder):
    """The same of a trial in a session of its own."""
    with session() as shared:
        return outcome(config, folder, shared)


def apart(one, other):
    """Largest difference of losses, and of deltas."""
    return tuple(float(np.abs(a - b).max()) for a, b in zip(one, other, strict=True))


def check_trials(model, tmp_path, numbers, **changes):
    """Trials through one session, and each of `numbers` again alone."""
    some = configs(model, tmp_path, (*TRIALS, OTHER), **changes)
    with session() as shared:
        together = [outcome(c, tmp_path / str(n), shared) for n, c in enumerate(some)]
        assert len(shared.compiled) == 2  # the last one's optimizer is another
    for n in numbers:
        assert max(apart(together[n], alone(some[n], tmp_path / f"alone{n}"))) <= 1e-5
    for n in (1, 2, 3):
        assert min(apart(together[0], together[n])) > 1e-4  # they are different trials


def test_float32_trials(tiny_folder, tmp_path):
    """Mutation: a trial begins with the optimizer's state of the one before, or with its prompt; a
    trial's batches are those of the first seed; the optimizer is not in the compiled step's key.
    """
    check_trials(tiny_folder, tmp_path, (1, 2, 3))  # the first one was alone when it ran


@pytest.mark.parametrize("family", ("t5", "gemma3", "opt-350m"))
def test_other_families(tmp_path, family):
    """Mutation: as above."""
    folder = tmp_path / "model"
    if family == "t5":
        write_complete_t5(folder)
    else:
        write_family_folder(folder, family)
    check_trials(folder, tmp_path, (2,), **({"method__place": "both"} if family == "t5" else {}))


class Backwards(prepare.TrainSource):
    """The same steps with their rows in the opposite order."""

    def __getitem__(self, step):
        return jax.tree.map(lambda array: array[::-1], super().__getitem__(step))


def test_bfloat16_trials(tiny_folder, tmp_path, monkeypatch):
    """Mutation: as in float32. The noise is what the order of rows does to the same trial."""
    some = configs(tiny_folder, tmp_path, TRIALS[:2], model__dtype="bfloat16")
    with session() as shared:
        _, together = (outcome(c, tmp_path / str(n), shared) for n, c in enumerate(some))
        solo = alone(some[1], tmp_path / "alone")
        monkeypatch.setattr(prepare, "TrainSource", Backwards)
        permuted = outcome(some[1], tmp_path / "permuted", shared)
    noise = apart(permuted, together)
    for difference, limit in zip(apart(together, solo), noise, strict=True):
        assert difference <= 3 * limit
    assert 0 < max(noise) < 0.2
