"""Parses generated answers."""

from collections.abc import Sequence

import numpy as np

from softprompt.pretrained.tokenizer import Tokenizer


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
