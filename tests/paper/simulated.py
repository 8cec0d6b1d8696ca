"""Records of trials whose accuracies are given."""

import numpy as np

from experiments.paper import study
from softprompt.config import resolve, to_dict, trial_id

EXAMPLES = 1000


def answers(seed, accuracy, *, examples=EXAMPLES):
    """Answers of which a share is right; the same examples are hard for all seeds."""
    random = np.random.default_rng([seed, int(1e6 * accuracy)])
    hard = np.random.default_rng(0).normal(size=examples) + random.normal(size=examples)
    right = hard < np.quantile(hard, accuracy)
    return {
        "examples": examples,
        "majority": 0.5,
        "ids": "0" * 16,
        "right": np.packbits(right).tobytes().hex(),
        "predicted": "".join("ab"[int(n % 2 == one)] for n, one in enumerate(right)),
    }


def record(model, method, seed, accuracy, *, shifted=None, seconds=10.0, **changes):
    """A finished trial: half of the labels are the majority's.

    Its accuracy on other domains is `shifted`, or as on its own; it is at its best after `seconds`.
    """
    config = study.trial(model, method, seed, **changes)
    config.model.dtype = "float32"
    config = resolve(config)
    found = {config.task.name: answers(seed, accuracy)}
    for task in filter(None, config.eval.transfer.split(",")):
        found[task] = answers(seed, accuracy if shifted is None else shifted)
    return {
        "trial": trial_id(config),
        "name": f"{model}-{method}-s{seed}",
        "status": "done",
        "config": to_dict(config),
        "metrics": {
            "validation": {"accuracy": accuracy},
            "test": {"accuracy": accuracy, "examples": EXAMPLES},
        },
        "answers": found,
        "curve": [[0, 0.0, 0.5], [1, seconds, accuracy - 0.005], [2, 2 * seconds, accuracy]],
    }


def seeds(model, method, accuracies, **changes):
    """A trial for each accuracy, with seeds from 0."""
    return [record(model, method, n, value, **changes) for n, value in enumerate(accuracies)]
