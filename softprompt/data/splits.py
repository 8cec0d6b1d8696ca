"""A task's splits: reads their records, and counts texts that two splits share."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from softprompt.data.sources import Record, read_file
from softprompt.data.subsets import content_hash, hash_fraction, seeded_order, shared_texts
from softprompt.data.tasks import SPLITS, SplitRule, Task
from softprompt.downloads import cache_dir, say
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
    rule = split_rule(task, split)
    _check_files_differ(task)
    read = _read(task, rule)
    if task.counts and len(read) != (count := task.counts[rule.split != "train"]):
        say(f"warning: {_origin(task, rule)} has {len(read):,} rows; in the paper it has {count:,}")
    records = _select(read, rule, task)
    if split == "train" and task.expand_record:
        records = [one for record in records for one in task.expand_record(record)]
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


def split_rule(task: Task, split: str) -> SplitRule:
    """Returns the rule of a task's split.

    Raises:
        UserError: there is no such split, or the task is only for tests.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if split not in task.splits:
        raise UserError(
            f"task {task.name!r} has no {split} split; allowed: {', '.join(task.splits)} (train on "
            "another task, and evaluate with --task)"
        )
    return task.splits[split]


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
    return f"tfds:{path}, {rule.split}" if kind == "tfds" else _path(path, rule)


def _path(path: str, rule: SplitRule) -> str:
    """The path of a split's file."""
    return path.replace("{split}", rule.split).replace("{cache}", str(cache_dir()))


def _read(task: Task, rule: SplitRule) -> list[Record]:
    """All records of the source's own split.

    Raises:
        UserError: see `read_split`; or there is no file that the user has to download.
    """
    kind, _, path = task.source.partition(":")
    if kind == "tfds":
        from softprompt.data.tfds_reader import read_tfds

        return read_tfds(path, rule.split, task.columns)
    file = _path(path, rule)
    if task.url and not os.path.exists(file):
        raise UserError(f"task {task.name!r} has no file {file}; download it from {task.url}")
    return read_file(file, kind, task.columns, id_prefix=rule.split)


def _select(records: list[Record], rule: SplitRule, task: Task) -> list[Record]:
    """The rule's share of the records, in their own order; groups are not divided."""
    if (rule.start, rule.stop) == (0, 1):
        return records
    keys = [str(record.get("group", record["id"])) for record in records]
    if not rule.by_hash:
        groups = list(dict.fromkeys(keys))
        first, last = (round(end * len(groups)) for end in (rule.start, rule.stop))
        chosen = {groups[index] for index in seeded_order(groups, 0)[first:last]}
        return [record for record, key in zip(records, keys, strict=True) if key in chosen]
    if not task.id_field:
        hashes = [content_hash(record, task.content) for record in records]
        records = _with_content_ids(records, hashes)
        keys = keys if task.group_field else hashes
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
        count = shared_texts(splits[one], splits[other], task.content)
        if count and task.splits[one] != task.splits[other]:
            total += count
            lines.append(
                f"warning: {count:,} of {len(splits[other]):,} {other} texts of task "
                f"{task.name!r} also stand in {one}"
            )
    return total, lines
