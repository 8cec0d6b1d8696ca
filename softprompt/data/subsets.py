"""Subsets of records that depend on ids and a seed alone, not on the order of a file."""

import hashlib
from collections.abc import Iterable, Sequence

from softprompt.data.sources import Record
from softprompt.errors import UserError


def seeded_order(keys: Sequence[str], seed: int) -> list[int]:
    """Returns the indices of keys in a seeded order, that of SHA-256("seed/key")."""
    digests = [hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=lambda index: (digests[index], index))


def seeded_sample(records: Sequence[Record], n: int) -> list[Record]:
    """Returns n records (0 or too large an n: all) in their own order, whatever that order is."""
    if not 0 < n < len(records):
        return list(records)
    order = seeded_order([record["id"] for record in records], 0)
    return [records[index] for index in sorted(order[:n])]


def balanced_subset(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """Returns n records, as evenly over the labels as the records allow.

    Labels take turns, so their counts differ by one at most until a label runs out. With one seed,
    a smaller subset is the beginning of a larger one. The order of `records` has no influence.

    Args:
        records: with ids that differ.
        n: how many; does not need to divide by the number of labels.
        seed: which subset.

    Raises:
        UserError: there are fewer than n records.
    """
    if n > len(records):
        raise UserError(
            f"config key 'data.train_examples' is {n}; allowed: at most {len(records)}, the "
            "examples of the train split"
        )
    groups: dict[str, list[Record]] = {}
    for index in seeded_order([record["id"] for record in records], seed):
        groups.setdefault(str(records[index]["label"]), []).append(records[index])
    names = sorted(groups)
    turns = [groups[names[index]] for index in seeded_order(names, seed)]
    longest = max(map(len, turns), default=0)
    dealt = [group[turn] for turn in range(longest) for group in turns if turn < len(group)]
    return dealt[:n]


def label_counts(records: Iterable[Record]) -> dict[str, int]:
    """Returns how many records have each label, most common first; unlabelled ones count as ""."""
    counts: dict[str, int] = {}
    for record in records:
        counts[record["label"] or ""] = counts.get(record["label"] or "", 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
