"""Batches of inputs of different lengths, with few shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MULTIPLE = 64  # of the tokens in a row, so that few shapes are compiled


@dataclass(frozen=True)
class InputBatch:
    """Inputs of a generation, padded on the right.

    Attributes:
        tokens_BT: the inputs' tokens, padded with zeros.
        lengths_B: tokens in each input; 1 in an empty row.
        example_B: the index of each example, -1 in an empty row.
    """

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    example_B: np.ndarray


def input_batches(inputs: Sequence[Sequence[int] | np.ndarray], *, batch: int) -> list[InputBatch]:
    """Batches inputs of similar length, `batch` at a time; empty rows fill the last batch."""
    lengths_N = np.array([len(tokens) for tokens in inputs])
    order = np.argsort(lengths_N, kind="stable")
    batches = []
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        longest = -(-int(lengths_N[members].max()) // MULTIPLE) * MULTIPLE
        tokens_BT = np.zeros((batch, longest), np.int32)
        for row, example in enumerate(members.tolist()):
            tokens_BT[row, : lengths_N[example]] = inputs[example]
        empty = (0, batch - len(members))
        lengths_B = np.pad(lengths_N[members], empty, constant_values=1).astype(np.int32)
        example_B = np.pad(members, empty, constant_values=-1)
        batches.append(InputBatch(tokens_BT, lengths_B, example_B))
    return batches


def slots_for(length: int) -> int:
    """The size of a cache for `length` tokens: 64, 128, 256, ..., so that few sizes compile."""
    return max(64, 1 << (length - 1).bit_length())
