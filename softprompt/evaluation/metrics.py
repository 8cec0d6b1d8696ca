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

from softprompt.pretrained.tokenizer import Tokenizer

NOT_METRICS = ("examples", "classes_predicted")  # entries of scores that are not metrics


def classification(
    predicted_N: np.ndarray,
    labels_N: np.ndarray,
    classes: int,
    *,
    positive: int | None = None,
    groups: Sequence[str] = (),
) -> dict[str, float]:
    """Returns the accuracy, and F1 averaged over all classes that are labels or predictions.

    If all classes are labels, macro_f1 is T5's mean F1 of the classes.

    Args:
        predicted_N: index of the predicted class; -1 for an output that is not a label, which
            counts as wrong.
        labels_N: index of the right class; -1 if it is unknown.
        classes: number of classes.
        positive: of two classes the one whose F1 is measured; None for none.
        groups: the group of each example; () for none.

    Returns:
        accuracy, macro_f1, classes_predicted (how many different ones), and examples (how many are
        labelled); f1 with `positive`, and group_match with `groups`. If there is no labelled
        example, only examples.
    """
    known_N = labels_N >= 0
    right, predicted = labels_N[known_N], predicted_N[known_N]
    if not len(right):
        return {"examples": 0}
    present = sorted(set(range(classes)) & (set(right.tolist()) | set(predicted.tolist())))
    found = {
        "accuracy": float(accuracy_score(right, predicted)),
        "macro_f1": float(
            f1_score(right, predicted, labels=present, average="macro", zero_division=0)
        ),
        "classes_predicted": len(set(predicted.tolist()) - {-1}),
        "examples": len(right),
    }
    if positive is not None:
        found["f1"] = binary_f1(predicted, right, positive)
    if groups:
        found["group_match"] = group_match(predicted == right, np.asarray(groups)[known_N])
    return found


def binary_f1(predicted_N: np.ndarray, labels_N: np.ndarray, positive: int) -> float:
    """Returns the F1 of the class `positive` among two.

    An output that is no label (-1) counts as the class that is wrong.

    Source: `f1_score_with_invalid` in T5's metrics.py.
    """
    right_N = labels_N == positive
    found_N = np.where(predicted_N < 0, ~right_N, predicted_N == positive)
    return float(f1_score(right_N, found_N, zero_division=0))


def group_match(right_N: np.ndarray, groups_N: Sequence[str] | np.ndarray) -> float:
    """Returns the share of groups whose examples are all right.

    With questions as groups of answers it is MultiRC's exact match.

    Source: Khashabi et al. 2018, section 5 ("EM"); `mean_group_metric` in T5's metrics.py.
    """
    whole: dict[str, bool] = {}
    for group, right in zip(groups_N, right_N, strict=True):
        whole[group] = whole.get(group, True) and bool(right)
    return float(np.mean(list(whole.values())))


def choice(
    predicted: Sequence[str], answers: Sequence[Sequence[str]], groups: Sequence[str] = ()
) -> dict[str, float]:
    """Returns the accuracy of candidates that were chosen: each is one of the right answers or not.

    Args:
        predicted: the chosen candidate of each example.
        answers: the right answers of each example; an example without one is ignored.
        groups: the group of each example; () for none.

    Returns:
        accuracy, and examples (how many have an answer); group_match with `groups`. If none has an
        answer, only examples.
    """
    known = [index for index, right in enumerate(answers) if right]
    if not known:
        return {"examples": 0}
    right_N = np.array([predicted[index] in answers[index] for index in known])
    found = {"accuracy": float(right_N.mean()), "examples": len(known)}
    if groups:
        found["group_match"] = group_match(right_N, [groups[index] for index in known])
    return found


def free_text(
    predicted: Sequence[str], answers: Sequence[Sequence[str]], groups: Sequence[str] = ()
) -> dict[str, float]:
    """Returns SQuAD's exact match and F1 of generated answers, as shares (not percentages).

    Each prediction is compared with every right answer of its example; the best match counts.

    Args:
        predicted: the generated text of each example.
        answers: the right answers of each example; an example without one is ignored.
        groups: the group of each example; () for none.

    Returns:
        exact_match, f1, and examples (how many have an answer); with `groups` group_match, of exact
        matches. If none has an answer, only examples.

    Source: Rajpurkar et al. 2016 (arXiv 1606.05250), section 6.1, and evaluate-v1.1.py.
    """
    known = [index for index, right in enumerate(answers) if right]
    if not known:
        return {"examples": 0}
    pairs = [(predicted[index], answers[index]) for index in known]
    exact_N = np.array(
        [
            max(normalised_answer(text) == normalised_answer(one) for one in right)
            for text, right in pairs
        ]
    )
    overlap = [max(token_f1(text, one) for one in right) for text, right in pairs]
    found = {
        "exact_match": float(exact_N.mean()),
        "f1": float(np.mean(overlap)),
        "examples": len(pairs),
    }
    if groups:
        found["group_match"] = group_match(exact_N, [groups[index] for index in known])
    return found


_DETERMINERS = frozenset(
    "a an few her his each every many much my our some that the their these this those which whose "
    "your".split()
)


def names_referent(predicted: str, referent: str) -> bool:
    """Whether a generated noun phrase names a referent: the words of one are words of the other.

    Case and determiners do not count. A phrase with an apostrophe never names one without ("Bob" is
    not "Bob's hat").

    Source: `wsc_simple` in T5's postprocessors.py.
    """
    ours, theirs = (_bare_phrase(text) for text in (predicted, referent))
    if ("'" in ours) != ("'" in theirs):
        return False
    words, others = set(ours.split(" ")), set(theirs.split(" "))
    return words <= others or others <= words


def _bare_phrase(text: str) -> str:
    """A phrase in lower case and without determiners."""
    words = text.strip().lower().split(" ")
    return " ".join(word for word in words if word not in _DETERMINERS)


def referents(
    predicted: Sequence[str], named: Sequence[str], correct_N: np.ndarray
) -> dict[str, float]:
    """Returns the accuracy of generated referents: they should name the right one, and no other.

    Args:
        predicted: the generated text of each example.
        named: the referent of each example.
        correct_N: 1 where it is the right one, 0 where it is not, -1 where that is not known.

    Returns:
        accuracy, and examples (how many are known). If none is known, only examples.
    """
    known = np.flatnonzero(correct_N >= 0).tolist()
    if not known:
        return {"examples": 0}
    right = [names_referent(predicted[n], named[n]) == bool(correct_N[n]) for n in known]
    return {"accuracy": float(np.mean(right)), "examples": len(known)}


def read_labels(
    answers: Sequence[Sequence[int]],
    verbalizers: Sequence[str],
    tokenizer: Tokenizer,
    *,
    exact: bool = False,
) -> tuple[np.ndarray, float]:
    """Parses generated answers as labels.

    An answer is the label whose verbalizer it starts with, followed by a word boundary. If several
    match, the longest verbalizer counts. With `exact` it has to be the verbalizer, as T5 has it.

    Args:
        answers: generated ids of each example.
        verbalizers: target texts, in the order of the labels.
        tokenizer: the model's.
        exact: see above.

    Returns:
        Label indices [N], -1 for an answer that is not a label; and the share of such answers.
    """
    words = [text.strip() for text in verbalizers]
    labels_N = np.full(len(answers), -1)
    for example, ids in enumerate(answers):
        text = tokenizer.decode(ids).strip()
        matches = [
            word
            for word in words
            if text == word
            or (not exact and text.startswith(word) and not text[len(word)].isalnum())
        ]
        if matches:
            labels_N[example] = words.index(max(matches, key=len))
    return labels_N, float(np.mean(labels_N < 0)) if len(answers) else 0.0


def illegal_share(predicted: Sequence[str], choices: Sequence[Sequence[str]]) -> float:
    """Returns the share of generated answers that are none of their example's candidates."""
    wrong = [
        normalised_answer(text) not in map(normalised_answer, candidates)
        for text, candidates in zip(predicted, choices, strict=True)
    ]
    return float(np.mean(wrong)) if wrong else 0.0


def task_score(found: Mapping[str, float], reported: Sequence[str]) -> dict[str, float]:
    """Returns the metrics with task_score, the mean of those that the paper reports for a task.

    The mean of SuperGLUE's tasks' is SuperGLUE's score.

    Args:
        found: the metrics; only examples if nothing is labelled.
        reported: names of metrics; () adds nothing.
    """
    if not reported or not found["examples"]:
        return dict(found)
    return {**found, "task_score": float(np.mean([found[name] for name in reported]))}


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
