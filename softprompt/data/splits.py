"""A task's splits: reads their records, and counts texts that two splits share."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from softprompt.data.sources import Record, read_file
from softprompt.data.subsets import content_hash, hash_fraction, seeded_order, shared_texts
from softprompt.data.tasks import SPLITS, SplitRule, Task
from softprompt.errors import UserError, unknown


def read_split(task: Task, split: str) -> list[Record]:
    """Reads a task's train, validation or test records.

    Args:
        task: the task.
        split: "train", "validation" or "test"; only test may have unlabelled records.

    Raises:
        UserError: the source cannot be read or has a bad line (see `read_file` and `read_tfds`),
            two splits are the same file, the split is empty, or a train or validation record has no
            label.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    _check_files_differ(task)
    rule = task.splits[split]
    records = _select(_read(task, rule), rule, task)
    origin = _origin(task, rule)
    if not records:
        advice = "; allowed: more examples, or a file for each split" if rule.by_hash else ""
        raise UserError(
            f"{split} split of task {task.name!r} is empty: {origin} has no examples for it{advice}"
        )
    for record in records if split != "test" else ():
        if record["label"] is None:
            raise UserError(
                f"{split} split of task {task.name!r}: example {record['id']!r} of {origin} has no "
                "label"
            )
    return records


def _check_files_differ(task: Task) -> None:
    """Checks that {split} in a path leads to three files."""
    kind, _, path = task.source.partition(":")
    files: dict[str, str] = {}
    for split in SPLITS if kind != "tfds" and "{split}" in path else ():
        file = os.path.realpath(os.path.expanduser(path.replace("{split}", split)))
        if file in files:
            raise UserError(
                f"task.source {task.source!r}: {files[file]} and {split} are the same file, "
                f"{file}; allowed: a file for each split, or a path without {{split}}, which is "
                "divided"
            )
        files[file] = split


def _origin(task: Task, rule: SplitRule) -> str:
    """The source of a split, for messages."""
    kind, _, path = task.source.partition(":")
    return f"tfds:{path}, {rule.split}" if kind == "tfds" else path.replace("{split}", rule.split)


def _read(task: Task, rule: SplitRule) -> list[Record]:
    """All records of the source's own split."""
    kind, _, path = task.source.partition(":")
    labels = task.labels or None
    if kind == "tfds":
        from softprompt.data.tfds_reader import read_tfds

        return read_tfds(
            path,
            rule.split,
            fields=task.fields,
            label_field=task.label_field,
            id_field=task.id_field,
            labels=labels,
        )
    return read_file(
        path.replace("{split}", rule.split),
        kind,
        fields=task.fields,
        label_field=task.label_field,
        id_field=task.id_field,
        labels=labels,
        id_prefix=rule.split,
    )


def _select(records: list[Record], rule: SplitRule, task: Task) -> list[Record]:
    """The rule's share of the records, in their own order."""
    if (rule.start, rule.stop) == (0, 1):
        return records
    ids = [record["id"] for record in records]
    if not rule.by_hash:
        first, last = (round(end * len(records)) for end in (rule.start, rule.stop))
        return [records[index] for index in sorted(seeded_order(ids, 0)[first:last])]
    keys, fields = ids, task.fields
    if not task.id_field:
        keys = [content_hash(record, fields) for record in records]
        records = _with_content_ids(records, keys)
    shares = [hash_fraction(key) for key in keys]
    return [
        record
        for record, share in zip(records, shares, strict=True)
        if rule.start <= share < rule.stop
    ]


def _with_content_ids(records: list[Record], hashes: Sequence[str]) -> list[Record]:
    """The records with ids that do not depend on their line; equal contents are numbered."""
    seen: Counter[str] = Counter()
    named = []
    for record, key in zip(records, hashes, strict=True):
        seen[key] += 1
        number = f"-{seen[key]}" if seen[key] > 1 else ""
        named.append({**record, "id": f"row-{key[:16]}{number}"})
    return named


def overlaps(task: Task, splits: Mapping[str, Sequence[Record]]) -> tuple[int, list[str]]:
    """Counts texts that stand in two splits (see `shared_texts`).

    Splits that the task itself defines as the same are left out.

    Args:
        task: the task.
        splits: its records by split, in the order train, validation, test.

    Returns:
        The count over all pairs of splits, and a line for each pair that has some.
    """
    total, lines = 0, []
    for one, other in combinations(splits, 2):
        count = shared_texts(splits[one], splits[other], task.fields)
        if count and task.splits[one] != task.splits[other]:
            total += count
            lines.append(
                f"warning: {count:,} of {len(splits[other]):,} {other} texts of task "
                f"{task.name!r} also stand in {one}"
            )
    return total, lines
