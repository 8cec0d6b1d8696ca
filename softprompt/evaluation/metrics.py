"""Metrics of predicted labels, from scikit-learn. Unlabelled examples do not count."""

from collections.abc import Mapping

import numpy as np
from sklearn.metrics import accuracy_score, f1_score


def classification(predicted_N: np.ndarray, labels_N: np.ndarray, classes: int) -> dict[str, float]:
    """Accuracy, and F1 averaged over the classes that occur or are predicted.

    Args:
        predicted_N: index of the predicted class, or -1 for an output that is no legal label (which
            counts as wrong).
        labels_N: index of the right class, or -1 where nobody knows it.
        classes: how many classes there are.

    Returns:
        accuracy, macro_f1, classes_predicted (how many different ones), and examples: how many
        counted. Without a labelled example, only that.
    """
    known_N = labels_N >= 0
    right, told = labels_N[known_N], predicted_N[known_N]
    if not len(right):
        return {"examples": 0}
    present = sorted(set(range(classes)) & (set(right.tolist()) | set(told.tolist())))
    return {
        "accuracy": float(accuracy_score(right, told)),
        "macro_f1": float(f1_score(right, told, labels=present, average="macro", zero_division=0)),
        "classes_predicted": len(set(told.tolist()) - {-1}),
        "examples": len(right),
    }


def over_tasks(scores: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """The scores of several tasks as one: means in which tasks count alike, and each by itself.

    A task without a labelled example does not count. Those of an only task stay as they are.

    Args:
        scores: of each task by name, from `classification`.

    Returns:
        accuracy, macro_f1 and any others but counts, then examples (of all), then "TASK/accuracy"
        and so on.
    """
    if len(scores) == 1:
        return dict(*scores.values())
    own = {f"{task}/{name}": x for task, found in scores.items() for name, x in found.items()}
    count = int(sum(found["examples"] for found in scores.values()))
    known = [found for found in scores.values() if found["examples"]]
    counts = ("examples", "classes_predicted")
    names = [name for name in known[0] if name not in counts] if known else []
    means = {name: float(np.mean([found[name] for found in known])) for name in names}
    return {**means, "examples": count, **own}
