"""Subsets, hashes and digests of records. Subsets depend on ids and a seed, not on file order."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from softprompt.data.sources import Record
from softprompt.errors import UserError


def seeded_order(keys: Sequence[str], seed: int) -> list[int]:
    """Returns the indices that sort the keys by SHA-256("seed/key")."""
    digests = [hashlib.sha256(f"{seed}/{key}".encode()).digest() for key in keys]
    return sorted(range(len(keys)), key=lambda index: (digests[index], index))


def seeded_sample(records: Sequence[Record], n: int) -> list[Record]:
    """Returns n of the records in their own order; all of them where n is 0 or too large.

    Groups are whole, so the last one may make it a few more. Which ones depends on the names of
    the groups, or else on the ids, alone.
    """
    if not 0 < n < len(records):
        return list(records)
    keys = [str(record.get("group", record["id"])) for record in records]
    sizes, chosen, total = Counter(keys), set(), 0
    names = list(sizes)
    for index in seeded_order(names, 0):
        if total >= n:
            break
        chosen.add(names[index])
        total += sizes[names[index]]
    return [record for record, key in zip(records, keys, strict=True) if key in chosen]


def balanced_subset(records: Sequence[Record], n: int, seed: int) -> list[Record]:
    """Returns n records with the labels as balanced as the records allow.

    Labels are dealt in turns, so their counts differ by at most one until a label runs out. The
    records of a free-text task are drawn as if they had one label. For the same seed a smaller
    subset is the beginning of a larger one. The order of `records` has no influence.

    Args:
        records: their ids differ.
        n: number of records; it need not be a multiple of the number of labels.
        seed: chooses the subset.

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
        groups.setdefault(_label_name(records[index]), []).append(records[index])
    names = sorted(groups)
    turns = [groups[names[index]] for index in seeded_order(names, seed)]
    longest = max(map(len, turns), default=0)
    dealt = [group[turn] for turn in range(longest) for group in turns if turn < len(group)]
    return dealt[:n]


def label_counts(records: Iterable[Record]) -> dict[str, int]:
    """Returns the number of records of each label, most common first.

    A record of a free-text task counts as "answered", an unlabelled one as "unlabelled".
    """
    counts = Counter(_label_name(record) for record in records)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _label_name(record: Record) -> str:
    """A record's label, or whether it has an answer."""
    if record["label"] is None:
        return "unlabelled"
    return "answered" if "answers" in record else str(record["label"])


def normalised(text: str) -> str:
    """Returns the text without differences of case and white space."""
    return " ".join(text.split()).casefold()


def content_hash(record: Record, fields: Sequence[str]) -> str:
    """Returns the SHA-256, in hex, of a record's fields up to case and white space."""
    content = json.dumps([normalised(record[name] or "") for name in fields])
    return hashlib.sha256(content.encode()).hexdigest()


def hash_fraction(key: str) -> float:
    """Returns a number in [0, 1) that depends on the key alone, evenly distributed."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32


def shared_texts(one: Sequence[Record], other: Sequence[Record], fields: Sequence[str]) -> int:
    """Returns how many records of `other` have a text that `one` has, too.

    Texts are the fields up to case and white space (see `content_hash`).
    """
    known = {content_hash(record, fields) for record in one}
    return sum(content_hash(record, fields) in known for record in other)


def records_digest(records: Sequence[Record], fields: Sequence[str]) -> str:
    """Returns 16 hex digits that depend on the records' ids, fields, labels and order.

    Args:
        records: of a split.
        fields: the text fields that count.
    """
    digest = hashlib.sha256()
    for record in records:
        texts = [record[name] for name in fields]
        line = [record["id"], texts, record["label"], record.get("answers", ())]
        line += [record[part] for part in ("group", "candidates", "correct") if part in record]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()[:16]


def check_digests(now: Mapping[str, str], then: Mapping[str, str], *, made: str) -> None:
    """Checks that data is what it was.

    Args:
        now: the digest of each split, by name.
        then: the digests that were stored; splits without one (of older files) are not compared.
        made: what was made with the stored data, such as a checkpoint's path.

    Raises:
        UserError: a split's digest differs.
    """
    for name, digest in now.items():
        if then.get(name, digest) != digest:
            raise UserError(
                f"{made} was made with other data: the digest of {name} was {then[name]}, and now "
                f"is {digest}; allowed: the same data, or a new folder"
            )
