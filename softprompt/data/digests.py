"""Digests of a split's records, by which changed data is noticed."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from softprompt.data.sources import Record
from softprompt.errors import UserError


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
