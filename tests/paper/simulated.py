"""Records of trials whose accuracies are given."""

import numpy as np

from experiments.paper import study
from softprompt.config import resolve, to_dict, trial_id

EXAMPLES = 1000


def record(model, method, seed, accuracy, *, examples=EXAMPLES, task=study.TASK, **changes):
    """A finished trial: half of the labels are the majority's; the same examples are hard."""
    config = resolve(study.trial(model, method, seed, model__dtype="float32", **changes))
    random = np.random.default_rng([seed, int(1e6 * accuracy)])
    hard = np.random.default_rng(0).normal(size=examples) + random.normal(size=examples)
    right = hard < np.quantile(hard, accuracy)
    answers = {
        "examples": examples,
        "majority": 0.5,
        "ids": "0" * 16,
        "right": np.packbits(right).tobytes().hex(),
    }
    return {
        "trial": trial_id(config),
        "name": f"{model}-{method}-s{seed}",
        "status": "done",
        "config": to_dict(config),
        "metrics": {
            "validation": {"accuracy": accuracy},
            "test": {"accuracy": float(right.mean()), "examples": examples},
        },
        "answers": {task: answers},
    }


def seeds(model, method, accuracies, **changes):
    """A trial for each accuracy, with seeds from 0."""
    return [record(model, method, n, value, **changes) for n, value in enumerate(accuracies)]
