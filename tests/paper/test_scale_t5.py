"""The paper's own setting: its trials, their costs and their scores."""

import pytest

from experiments.paper import scale_t5, study
from softprompt.config import resolve, to_dict, trial_id
from softprompt.trials.trial_cost import GIB


def test_trials():
    """Breaks when a set, a size or a seed is left out, or two trials are one."""
    configs = [resolve(config, backend="tpu") for config in scale_t5.sweep()]
    assert len({trial_id(config) for config in configs}) == len(configs) == 5 * 8 * 3
    (xl, *_) = scale_t5.sweep("xl")
    assert (xl.model.name, xl.task.name, xl.train.steps) == (
        "google/t5-xl-lm-adapt",
        "boolq_dev",
        30_000,
    )


def test_costs():
    """Breaks when seeds are not counted, or memory is not that of the largest set."""

    def cost(config):
        times = {"boolq_dev": 1, "rte_dev": 3}[config.task.name]
        sizes = {"weight_bytes": GIB, "delta_bytes": 0, "activation_bytes": times * GIB}
        return {"frozen": 1000, "trained": 10, "chip_hours": 7 * times, "fits": times < 2, **sizes}

    (line, total) = scale_t5.costs(["small"], ["boolq", "rte"], cost).to_dict("records")
    assert (line["frozen"], line["trials"], line["fits"]) == ("1,000", "6", "with microbatches")
    assert line["memory a chip (GiB)"] == "4.0"
    assert line["chip-hours"] == total["chip-hours"] == f"{len(study.SEEDS) * 28}"


def test_scores():
    """Breaks when a size is averaged over some of the sets, or over trials instead of sets."""
    rows = []
    for config in scale_t5.sweep("base"):
        if config.seed == 0 or config.task.name == "cb_dev":
            score = 0.9 if config.task.name == "cb_dev" else 0.5
            metrics = {"test": {scale_t5.SCORE: score}}
            facts = {"trial": trial_id(config), "status": "done", "metrics": metrics}
            rows.append(facts | {"config": to_dict(config)})
    (line,) = scale_t5.table(rows).to_dict("records")
    assert line["score"] == pytest.approx(55.0)
    assert scale_t5.table(rows[:-1] if rows[-1]["config"]["seed"] == 0 else rows[1:]).empty
    assert len(scale_t5.figure(rows).axes[0].lines) == 3
