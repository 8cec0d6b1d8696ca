"""Records read from users' own files.

A record, here and from TFDS (`softprompt.data.tfds_reader`), is a plain dict: "id" (unique in its
split), the text fields that were asked for, and "label" (None where the row is unlabelled), all
strings. A record of a free-text task also has "answers", a tuple of all right answers; its label is
the first of them. Any mistake in a file is one line that names the file and the line.
"""

import codecs
import csv
import io
import json
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from softprompt.errors import UserError, nearest

Record = dict[str, Any]

FORMATS = ("jsonl", "tsv", "csv")


def read_file(
    path: str,
    file_format: str,
    *,
    fields: Sequence[str],
    label_field: str = "label",
    id_field: str = "",
    labels: Collection[str] | None = None,
    id_prefix: str = "",
) -> list[Record]:
    """Reads a file of labelled or answered text.

    JSON lines hold one object a line; a number or boolean is read as its JSON spelling (true, 1,
    0.5). TSV is split at tabs and nothing else (quotes are text); CSV follows RFC 4180; both begin
    with a line of column names. Blank lines are skipped. An unlabelled row has null (JSON) or
    nothing (TSV, CSV) as its label. Without `labels`, the label field holds an answer, or in JSON a
    list of the right answers, which is empty for an unanswered row.

    Args:
        path: a local path, or any that etils' epath opens, such as gs://.
        file_format: "jsonl", "tsv" or "csv".
        fields: the text fields that every row must have.
        label_field: the field that holds the label or the answers; "" where no row has one.
        id_field: the field that holds the id; "" numbers the rows.
        labels: the labels that are allowed; None for free text.
        id_prefix: a numbered row has the id "<id_prefix>-<index>", counted from 0.

    Raises:
        UserError: the file cannot be read, or a line is malformed, lacks a field, repeats an id or
            has a label that is not allowed.
    """
    records: list[Record] = []
    seen: dict[str, int] = {}
    wanted = tuple(dict.fromkeys(fields))
    for number, row in _rows(path, file_format):
        where = f"{path}:{number}"
        record = {name: _text(row, name, where) for name in wanted}
        key = _text(row, id_field, where) if id_field else f"{id_prefix}-{len(records)}"
        if key in seen:
            raise UserError(f"{where}: id {key!r} was already used in line {seen[key]}")
        seen[key] = number
        found = _answers(row, label_field, where, several=labels is None)
        records.append({"id": key, **record, **solution(found, labels, where)})
    return records


def solution(answers: Sequence[str], labels: Collection[str] | None, where: str) -> Record:
    """Returns what a record holds beside its fields: its label, and for free text its answers.

    Args:
        answers: the label or the right answers of an example; empty where there is none.
        labels: the labels that have a verbalizer; None for free text.
        where: names the example in an error.

    Raises:
        UserError: the label has no verbalizer.
    """
    label = answers[0] if answers else None
    if labels is None:
        return {"label": label, "answers": tuple(answers)}
    if label is not None and label not in labels:
        raise UserError(
            f"{where}: label {label!r} has no verbalizer{nearest(label, labels)}; "
            f"known: {', '.join(labels)}"
        )
    return {"label": label}


def _rows(path: str, file_format: str) -> Iterator[tuple[int, Record]]:
    """The rows of a file, each with its line number from 1."""
    if file_format == "jsonl":
        return _json_rows(path)
    if file_format == "tsv":
        return _tsv_rows(path)
    if file_format == "csv":
        return _csv_rows(path)
    raise UserError(f"unknown file format {file_format!r}; known: {', '.join(FORMATS)}")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file that are not blank, each with its number from 1."""
    content = _content(path)
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line = _decode(raw, f"{path}:{number}").rstrip("\r")
        if line.strip():
            yield number, line


def _content(path: str) -> bytes:
    """The bytes of a file, without a byte order mark."""
    from etils import epath

    try:
        return epath.Path(path).expanduser().read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"cannot read {path}: {reason}") from error


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error


def _json_rows(path: str) -> Iterator[tuple[int, Record]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _tsv_rows(path: str) -> Iterator[tuple[int, Record]]:
    names: list[str] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        if names:
            yield number, _row_of(names, cells, f"{path}:{number}")
        else:
            names = _header(cells, f"{path}:{number}")


def _csv_rows(path: str) -> Iterator[tuple[int, Record]]:
    content = _content(path)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8: {error.reason}") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    start = 1
    try:
        for cells in reader:
            blank = len(cells) < 2 and not "".join(cells).strip()
            if names and not blank:
                yield start, _row_of(names, cells, f"{path}:{start}")
            elif not blank:
                names = _header(cells, f"{path}:{start}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{start}: not valid CSV: {error}") from error


def _header(cells: list[str], where: str) -> list[str]:
    repeated = {cell for cell in cells if cells.count(cell) > 1}
    if repeated:
        raise UserError(f"{where}: column {min(repeated)!r} appears twice in the header")
    return cells


def _row_of(names: list[str], cells: list[str], where: str) -> Record:
    if len(cells) != len(names):
        raise UserError(
            f"{where}: {len(cells)} columns, expected {len(names)} ({', '.join(names)})"
        )
    return dict(zip(names, cells, strict=True))


def _text(row: Record, name: str, where: str) -> str:
    """The text of a field; a UserError where the field is absent or holds no text."""
    if name not in row:
        raise UserError(
            f"{where}: missing field {name!r}{nearest(name, row)}; the line has: {', '.join(row)}"
        )
    value = row[name]
    if value is None or isinstance(value, list | dict):
        raise UserError(f"{where}: field {name!r} is {json.dumps(value)[:40]}, expected text")
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: field {name!r} has half of a character, {text[error.start]!a}, at character "
            f"{error.start}"
        ) from error
    return text


def _answers(row: Record, name: str, where: str, *, several: bool) -> list[str]:
    """The texts of a row's label field; none where it is null or empty. A list may hold several."""
    value = row.get(name)
    if not (several and isinstance(value, list)):
        unlabelled = not name or (name in row and value in (None, ""))
        return [] if unlabelled else [_text(row, name, where)]
    answers = [_text({name: answer}, name, where) for answer in value]
    if not all(answer.strip() for answer in answers):
        raise UserError(
            f"{where}: field {name!r} has an answer without text; allowed: texts, or an empty list "
            "where no answer is known"
        )
    return answers
