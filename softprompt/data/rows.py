"""How examples lie in the rows of a batch: the arrays of both kinds of model.

A batch is a dict of numpy arrays whose names end in their shape: R rows of T tokens, M positions in
a row whose logits are needed, C pairs in a row that are scored. An encoder-decoder has rows of S
tokens for its encoder beside them. Segment 0 is padding; the examples of a row are its segments 1,
2, ...; an example's positions start at 0.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Batch = dict[str, np.ndarray]

ROW = ("tokens_RT", "segments_RT", "positions_RT", "index_RM")
TRAIN = ("target_RM", "weight_RM")
EVAL = ("branches_RT", "pair_head_RC", "pair_token_RC")
ENCODER = ("inputs_RS", "input_segments_RS", "input_positions_RS")


@dataclass(frozen=True)
class Layout:
    """Where a model wants an example.

    Attributes:
        start: the id that each of an encoder-decoder's target sequences begins with; None for a
            decoder, in whose row the target follows the input.
        input_slots: prompt vectors that stand inline before each input in the encoder's row.
        target_slots: prompt vectors that stand inline before each target sequence.
        prompts: how many prompts (an encoder-decoder's stand before inputs) there are for examples
            to have one of, by their task; 0 where all have the same.
    """

    start: int | None = None
    input_slots: int = 0
    target_slots: int = 0
    prompts: int = 0

    @property
    def encoder(self) -> bool:
        """Whether the input goes into a row of its own."""
        return self.start is not None

    def names(self, *more: str) -> list[str]:
        """The arrays of a batch: those that every one has, and `more`."""
        optional = {
            "input_prompt_RS": self.input_slots,
            "prompt_RT": self.target_slots,
            "which_RT": self.prompts and not self.encoder,
        }
        there = [name for name, needed in optional.items() if needed]
        return [*(ENCODER if self.encoder else ()), *ROW, *there, *more]


DECODER = Layout()


def input_row(layout: Layout, tokens: np.ndarray) -> Batch:
    """An input's own arrays in the encoder's row; none for a decoder."""
    if not layout.encoder:
        return {}
    return _sequence(tokens, layout.input_slots, ("inputs_RS", "input_prompt_RS", "input_"))


def train_row(layout: Layout, tokens: np.ndarray, target: np.ndarray) -> Batch:
    """One example's arrays for training; the last target token is predicted only, and stays out."""
    if layout.start is None:
        row = _sequence(np.concatenate([tokens, target[:-1]]), 0)
    else:
        row = _sequence(np.array([layout.start, *target[:-1]]), layout.target_slots)
    end = len(row["tokens_RT"])
    row["index_RM"] = np.arange(end - len(target), end)
    return row | {"target_RM": target, "weight_RM": np.ones(len(target))}


def scored_row(layout: Layout, tokens: np.ndarray, scored: Sequence[np.ndarray]) -> Batch:
    """One example's arrays for scoring sequences after its input, each a branch of the segment.

    A decoder shares the input between them. An encoder-decoder has its input elsewhere, and each of
    them whole: the relative bias counts places in the row.
    """
    if layout.start is None:
        return _shared_input(tokens, scored)
    slots = layout.target_slots
    rows = [_sequence(np.array([layout.start, *one[:-1]]), slots) for one in scored]
    row = {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}
    lengths = [len(one) for one in scored]
    ends = np.cumsum([slots + length for length in lengths])
    branches = np.arange(len(scored))
    return row | {
        "branches_RT": np.repeat(branches + 1, [slots + length for length in lengths]),
        "index_RM": np.concatenate(
            [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]
        ),
        "pair_head_RC": np.arange(sum(lengths)),
        "pair_token_RC": np.concatenate(scored),
        "pair_candidate_RC": np.repeat(branches, lengths),
    }


def _sequence(
    tokens: np.ndarray, slots: int, names: tuple[str, str, str] = ("tokens_RT", "prompt_RT", "")
) -> Batch:
    """Tokens behind the slots of an inline prompt, with their positions."""
    index = np.arange(slots + len(tokens)) - slots
    row_name, prompt_name, prefix = names
    letter = row_name[-1]
    row = {
        row_name: np.concatenate([np.zeros(slots, np.int32), tokens]),
        f"{prefix}positions_R{letter}": np.maximum(index, 0),
    }
    return row | ({prompt_name: np.where(index < 0, index + slots, -1)} if slots else {})


def _shared_input(tokens: np.ndarray, scored: Sequence[np.ndarray]) -> Batch:
    """An input, then each scored sequence without its last token as a branch."""
    own = [len(one) - 1 for one in scored]
    heads = np.split(np.arange(sum(own)) + 1, np.cumsum(own)[:-1])
    end, branches = len(tokens), range(len(scored))
    return {
        "tokens_RT": np.concatenate([tokens, *(one[:-1] for one in scored)]),
        "positions_RT": np.concatenate([np.arange(end), *(end + np.arange(n) for n in own)]),
        "branches_RT": np.repeat([0, *(b + 1 for b in branches)], [end, *own]),
        "index_RM": np.arange(end - 1, end + sum(own)),
        "pair_head_RC": np.concatenate([[0, *head] for head in heads]),
        "pair_token_RC": np.concatenate(scored),
        "pair_candidate_RC": np.repeat(branches, [n + 1 for n in own]),
    }


def of_task(layout: Layout, piece: Batch, task: int) -> Batch:
    """An example's arrays with those that say which of several prompts it has: its task's."""
    if not layout.prompts:
        return piece
    assert 0 <= task < layout.prompts, f"task {task} has none of {layout.prompts} prompts"
    if not layout.encoder:
        return piece | {"which_RT": np.full(len(piece["tokens_RT"]), task)}
    index = piece["input_prompt_RS"]
    first = task * layout.input_slots
    return piece | {"input_prompt_RS": np.where(index < 0, index, first + index)}


def empty(rows: int, widths: dict[str, int], names: Sequence[str]) -> Batch:
    """Zeros for each name, as wide as the letter that it ends in says.

    An inline prompt's index is 0 in padding, too: no example sees what stands there.
    """
    return {name: np.zeros((rows, widths[name[-1]]), np.int32) for name in names}


def append(batch: Batch, row: int, used: Counter[str], piece: Batch, segment: int) -> None:
    """Writes an example's arrays behind what its row already holds (in place).

    Args:
        batch: the arrays of all rows.
        row: where to write.
        used: places of each letter (S, T, M, C) that the row holds; is advanced.
        piece: the example's arrays; indices count from its own first token or head.
        segment: the number of the example in its row.
    """
    piece = dict(piece)
    for tokens, segments in (("tokens_RT", "segments_RT"), ("inputs_RS", "input_segments_RS")):
        if tokens in piece:
            piece[segments] = np.full(len(piece[tokens]), segment)
    offsets = {"index_RM": used["T"], "pair_head_RC": used["M"]}
    for name, values in piece.items():
        first = used[name[-1]]
        assert first + len(values) <= batch[name].shape[1], f"{name}: row {row} is too short"
        batch[name][row, first : first + len(values)] = values + offsets.get(name, 0)
    used.update({name[-1]: len(values) for name, values in piece.items()})
