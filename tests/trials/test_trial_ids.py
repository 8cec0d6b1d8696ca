"""Trial ids of the experiments, as they were before configs were rebuilt from methods' settings."""

import json
from pathlib import Path

import pytest

from softprompt.config import trial_id
from softprompt.trials.experiment import load_experiment

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "trial_ids.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_ids_of_an_experiments_trials_stay(name: str) -> None:
    """Breaks when a default changes, or a key gets a value that it did not have."""
    experiment, subset = name.split("/")
    ids = set()
    for config in load_experiment(experiment).sweep(subset):
        if config.model.dtype == "auto":  # what it resolves to depends on the machine
            config.model.dtype = "float32"
        ids.add(trial_id(config))
    assert ids == set(GOLDEN[name])
