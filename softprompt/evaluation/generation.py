"""How generated answers are read."""

from collections.abc import Sequence

import numpy as np

from softprompt.pretrained.tokenizer import Tokenizer


def read_labels(
    answers: Sequence[Sequence[int]], verbalizers: Sequence[str], tokenizer: Tokenizer
) -> tuple[np.ndarray, float]:
    """Reads generated answers as labels.

    An answer is the label whose verbalizer it begins with, ending at a word's end; the longest one
    where several fit.

    Args:
        answers: generated ids of each example.
        verbalizers: target texts, in the order of the labels.
        tokenizer: of the model.

    Returns:
        Label indices [N], -1 for an answer that is no legal label, and the share of those.
    """
    words = [text.strip() for text in verbalizers]
    labels_N = np.full(len(answers), -1)
    for example, ids in enumerate(answers):
        said = tokenizer.decode(ids).strip()
        fitting = [
            word
            for word in words
            if said.startswith(word) and not said[len(word) : len(word) + 1].isalnum()
        ]
        if fitting:
            labels_N[example] = words.index(max(fitting, key=len))
    return labels_N, float(np.mean(labels_N < 0)) if len(answers) else 0.0
