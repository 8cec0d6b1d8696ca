"""Metrics against values worked out by hand."""

import numpy as np
import pytest

from softprompt.evaluation.metrics import classification, free_text, normalised_answer, over_tasks


def metrics(predicted, labels, classes):
    return classification(np.array(predicted), np.array(labels), classes)


def test_accuracy_and_macro_f1_by_hand():
    """Mutation: micro or weighted F1."""
    # Class 0: precision 2/3, recall 2/4, F1 4/7. Class 1: precision 1/3, recall 1/2, F1 2/5.
    found = metrics([0, 0, 1, 1, 0, 1], [0, 0, 0, 0, 1, 1], 2)
    assert found == {
        "accuracy": pytest.approx(3 / 6),
        "macro_f1": pytest.approx((4 / 7 + 2 / 5) / 2),
        "classes_predicted": 2,
        "examples": 6,
    }


def test_unlabelled_examples_do_not_count():
    """Mutation: an unlabelled example is wrong, or right where the prediction is illegal."""
    counted = metrics([0, 1, 1], [0, 1, 0], 2)
    assert metrics([0, 1, 0, 1, -1, 1], [0, -1, -1, 1, -1, 0], 2) == counted
    assert counted["accuracy"] == pytest.approx(2 / 3)


def test_nothing_labelled_gives_no_score():
    """Mutation: an accuracy of 0.0."""
    assert metrics([0, 1], [-1, -1], 2) == {"examples": 0}


def test_illegal_outputs_are_wrong_and_no_class_of_their_own():
    """Breaks when illegal outputs do not count; when -1 enters the mean of F1, or the number of
    predicted classes, as a class."""
    found = metrics([0, -1, 1, -1], [0, 0, 1, 1], 2)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["macro_f1"] == pytest.approx(2 / 3)  # precision 1 and recall 1/2 for both
    assert (found["classes_predicted"], found["examples"]) == (2, 4)


def test_classes_that_neither_occur_nor_are_predicted_do_not_count():
    """Mutation: the mean is over all classes."""
    assert metrics([0, 2], [0, 2], 5)["macro_f1"] == pytest.approx(1.0)
    # Class 3 is predicted and never right: an F1 of zero beside 1 and 2/3.
    assert metrics([0, 2, 3], [0, 2, 2], 5)["macro_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_results_are_plain_numbers():
    """Mutation: numpy scalars, which JSON refuses."""
    found = metrics([0, 1], [0, 1], 2)
    assert {type(value) for value in found.values()} == {float, int}


def test_tasks_count_alike_in_the_mean():
    """Breaks when the mean is over examples, or over counts; when a task without labels counts as
    0.0; when no single task's are there."""
    small = {"accuracy": 1.0, "macro_f1": 0.5, "examples": 1}
    large = {"accuracy": 0.5, "macro_f1": 0.0, "examples": 9}
    found = over_tasks({"a": small, "b": {"examples": 0}, "c": large})
    assert {n: found[n] for n in small} == {"accuracy": 0.75, "macro_f1": 0.25, "examples": 10}
    assert (found["a/accuracy"], found["b/examples"], found["c/macro_f1"]) == (1.0, 0, 0.0)
    assert over_tasks({"a": small}) == small
    counted = over_tasks({"a": small | {"classes_predicted": 1}, "c": large})
    assert "classes_predicted" not in counted and counted["a/classes_predicted"] == 1


@pytest.mark.parametrize(
    ("predicted", "answers", "exact_match", "f1"),
    [
        ("The cat!", ["a cat"], 1, 1),  # articles, case and punctuation do not count
        ("the cat sat", ["cat", "cat sat down"], 0, 4 / 5),  # the best answer counts
        ("cat cat", ["cat dog"], 0, 1 / 2),  # a word is shared as often as both have it
        ("U.S.", ["US"], 1, 1),
        ("an\tera", ["era  "], 1, 1),
        ("theory", ["ory"], 0, 0),  # an article is a whole word
        ("dog", ["cat"], 0, 0),
        ("", ["cat"], 0, 0),
        ("", ["the"], 1, 0),  # evaluate-v1.1.py: equal, but no word in common
    ],
)
def test_answers_are_compared_as_squad_does(predicted, answers, exact_match, f1):
    """By hand, by evaluate-v1.1.py. Breaks when a step of its normalisation, or the best answer, is
    left out, or words are compared as sets."""
    found = free_text([predicted], [answers])
    assert found == {"exact_match": exact_match, "f1": pytest.approx(f1), "examples": 1}


def test_free_text_is_a_mean_over_answered_examples():
    """Breaks when an unanswered example counts, or numbers are numpy's or in percent."""
    found = free_text(["cat", "dog", "cow"], [["cat"], ["cat"], ()])
    assert found == {"exact_match": 0.5, "f1": 0.5, "examples": 2}
    assert {type(value) for value in found.values()} == {float, int}
    assert free_text(["cat"], [()]) == {"examples": 0}
    assert normalised_answer("An  apple, a\nday?") == "apple day"


def test_only_metrics_that_all_tasks_have_are_averaged():
    """Breaks when the mean of one kind of task is said to be a mixture's."""
    labels = {"accuracy": 1.0, "macro_f1": 0.5, "examples": 1}
    answers = {"exact_match": 0.5, "f1": 0.75, "examples": 4}
    found = over_tasks({"a": labels, "b": answers})
    assert found == {
        "examples": 5,
        **{f"a/{name}": x for name, x in labels.items()},
        **{f"b/{name}": x for name, x in answers.items()},
    }
    assert over_tasks({"b": answers, "c": answers})["f1"] == 0.75
