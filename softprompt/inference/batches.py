"""Inputs of unlike lengths as batches of few shapes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class InputBatch:
    """Inputs to be continued, padded on the right.

    Attributes:
        tokens_BT: each input, then zeros.
        lengths_B: tokens in each input; 1 where there is no example.
        example_B: the index of each example, -1 where there is none.
    """

    tokens_BT: np.ndarray
    lengths_B: np.ndarray
    example_B: np.ndarray


def input_batches(
    inputs: Sequence[Sequence[int] | np.ndarray], *, batch: int, multiple: int = 64
) -> list[InputBatch]:
    """Batches inputs of similar length.

    Args:
        inputs: token ids of each example.
        batch: B, examples in a batch; the last one is padded.
        multiple: T is a multiple of this, so that few shapes are compiled.
    """
    lengths_N = np.array([len(tokens) for tokens in inputs])
    order = np.argsort(lengths_N, kind="stable")
    batches = []
    for first in range(0, len(order), batch):
        members = order[first : first + batch]
        longest = -(-int(lengths_N[members].max()) // multiple) * multiple
        tokens_BT = np.zeros((batch, longest), np.int32)
        for place, example in enumerate(members.tolist()):
            tokens_BT[place, : lengths_N[example]] = inputs[example]
        spare = (0, batch - len(members))
        lengths_B = np.pad(lengths_N[members], spare, constant_values=1).astype(np.int32)
        example_B = np.pad(members, spare, constant_values=-1)
        batches.append(InputBatch(tokens_BT, lengths_B, example_B))
    return batches


def slots_for(length: int) -> int:
    """Slots of a cache that is to hold so many tokens: 64, 128, 256, ...; few programs result."""
    return max(64, 1 << (length - 1).bit_length())
