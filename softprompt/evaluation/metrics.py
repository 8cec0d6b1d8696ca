"""Metrics of predicted labels and of generated answers. Unlabelled examples are ignored.

Evaluators score each task of a trial with `classification` or `free_text`. `over_tasks` joins the
scores of tasks. `Task.metrics` lists the metrics that a task can have.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score

NOT_METRICS = ("examples", "classes_predicted")  # entries of scores that are not metrics


def classification(predicted_N: np.ndarray, labels_N: np.ndarray, classes: int) -> dict[str, float]:
    """Returns the accuracy, and F1 averaged over all classes that are labels or predictions.

    Args:
        predicted_N: index of the predicted class; -1 for an output that is not a label, which
            counts as wrong.
        labels_N: index of the right class; -1 if it is unknown.
        classes: number of classes.

    Returns:
        accuracy, macro_f1, classes_predicted (how many different ones), and examples (how many are
        labelled). If there is no labelled example, only examples.
    """
    known_N = labels_N >= 0
    right, predicted = labels_N[known_N], predicted_N[known_N]
    if not len(right):
        return {"examples": 0}
    present = sorted(set(range(classes)) & (set(right.tolist()) | set(predicted.tolist())))
    return {
        "accuracy": float(accuracy_score(right, predicted)),
        "macro_f1": float(
            f1_score(right, predicted, labels=present, average="macro", zero_division=0)
        ),
        "classes_predicted": len(set(predicted.tolist()) - {-1}),
        "examples": len(right),
    }


def free_text(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """Returns SQuAD's exact match and F1 of generated answers, as shares (not percentages).

    Each prediction is compared with every right answer of its example; the best match counts.

    Args:
        predicted: the generated text of each example.
        answers: the right answers of each example; an example without one is ignored.

    Returns:
        exact_match, f1, and examples (how many have an answer). If none has one, only examples.

    Source: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1, and evaluate-v1.1.py.
    """
    pairs = [pair for pair in zip(predicted, answers, strict=True) if pair[1]]
    if not pairs:
        return {"examples": 0}
    exact = [
        max(normalised_answer(text) == normalised_answer(one) for one in right)
        for text, right in pairs
    ]
    overlap = [max(token_f1(text, one) for one in right) for text, right in pairs]
    return {
        "exact_match": float(np.mean(exact)),
        "f1": float(np.mean(overlap)),
        "examples": len(pairs),
    }


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised_answer(text: str) -> str:
    """Returns the text in lower case, without ASCII punctuation, articles and extra white space."""
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def token_f1(predicted: str, answer: str) -> float:
    """Returns the F1 of the words of two texts, after `normalised_answer`.

    It is 0.0 if they have no common word, so also if both are empty (as in evaluate-v1.1.py).
    """
    ours, theirs = (normalised_answer(text).split() for text in (predicted, answer))
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def over_tasks(scores: Mapping[str, dict[str, float]]) -> dict[str, float]:
    """Joins the scores of several tasks: their unweighted means, and the scores of each task.

    Only metrics that all tasks have are averaged. Tasks without a labelled example are ignored. The
    scores of a single task are returned unchanged.

    Args:
        scores: of each task by name, from `classification` or `free_text`.

    Returns:
        The mean of each common metric, examples (of all tasks), and "TASK/accuracy" and so on.
    """
    if len(scores) == 1:
        return dict(*scores.values())
    own = {f"{task}/{name}": x for task, found in scores.items() for name, x in found.items()}
    count = int(sum(found["examples"] for found in scores.values()))
    known = [found for found in scores.values() if found["examples"]]
    names = [
        name
        for name in (known[0] if known else ())
        if name not in NOT_METRICS and all(name in found for found in known)
    ]
    means = {name: float(np.mean([found[name] for found in known])) for name in names}
    return {**means, "examples": count, **own}
