"""Metrics of predicted labels, from scikit-learn. Unlabelled examples do not count."""

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
        accuracy, macro_f1, and examples: how many counted. Without a labelled example, only that.
    """
    known_N = labels_N >= 0
    right, told = labels_N[known_N], predicted_N[known_N]
    if not len(right):
        return {"examples": 0}
    present = sorted(set(range(classes)) & (set(right.tolist()) | set(told.tolist())))
    return {
        "accuracy": float(accuracy_score(right, told)),
        "macro_f1": float(f1_score(right, told, labels=present, average="macro", zero_division=0)),
        "examples": len(right),
    }
