"""Records from people's own files.

A record, here and from TFDS (`softprompt.data.tfds_reader`), is a plain dict of strings: "id"
(unique in its split), the text fields that were asked for, and "label" (None where the row is
unlabelled). Whatever is wrong with a file is one line that names the file and the line.
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
    form: str,
    *,
    fields: Sequence[str],
    label_field: str = "label",
    id_field: str = "",
    labels: Collection[str] | None = None,
    id_prefix: str = "",
) -> list[Record]:
    """Reads a file of labelled text.

    JSON lines hold one object a line; a number or boolean counts as its JSON spelling (true, 1,
    0.5). TSV is split at tabs and nothing else (quotes are text); CSV follows RFC 4180; both begin
    with a line of column names. Lines of white space alone are skipped. An unlabelled row has null
    (JSON) or nothing (TSV, CSV) as its label; `label_field` "" means that no row has one.

    Args:
        path: a local path or any that etils' epath opens, such as gs://.
        form: "jsonl", "tsv" or "csv".
        fields: the text fields every row must have.
        label_field: the field with the label.
        id_field: the field with the id; "" numbers the rows.
        labels: the labels that are allowed; None allows any.
        id_prefix: a numbered row is called "<id_prefix>-<index>", from 0.

    Raises:
        UserError: the file cannot be read, or a line is malformed, lacks a field, repeats an id or
            has a label that is not allowed.
    """
    records: list[Record] = []
    seen: dict[str, int] = {}
    wanted = tuple(dict.fromkeys(fields))
    for number, row in _rows(path, form):
        where = f"{path}:{number}"
        record = {name: _text(row, name, where) for name in wanted}
        key = _text(row, id_field, where) if id_field else f"{id_prefix}-{len(records)}"
        if key in seen:
            raise UserError(f"{where}: id {key!r} was already used in line {seen[key]}")
        seen[key] = number
        label = _label(row, label_field, where)
        if label is not None and labels is not None and label not in labels:
            raise UserError(
                f"{where}: label {label!r} has no verbalizer{nearest(label, labels)}; "
                f"known: {', '.join(labels)}"
            )
        records.append({"id": key, **record, "label": label})
    return records


def _rows(path: str, form: str) -> Iterator[tuple[int, Record]]:
    """(line number from 1, row) of a file."""
    if form == "jsonl":
        return _json_rows(path)
    if form == "tsv":
        return _tab_rows(path)
    if form == "csv":
        return _comma_rows(path)
    raise UserError(f"unknown file format {form!r}; known: {', '.join(FORMATS)}")


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """(line number from 1, line without its ending) of a UTF-8 file, blank lines left out."""
    content = _content(path)
    for number, raw in enumerate(content.split(b"\n"), start=1):
        line = _decode(raw, f"{path}:{number}").rstrip("\r")
        if line.strip():
            yield number, line


def _content(path: str) -> bytes:
    """A file's bytes without a byte order mark."""
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


def _tab_rows(path: str) -> Iterator[tuple[int, Record]]:
    names: list[str] = []
    for number, line in _lines(path):
        cells = line.split("\t")
        if names:
            yield number, _named(names, cells, f"{path}:{number}")
        else:
            names = _header(cells, f"{path}:{number}")


def _comma_rows(path: str) -> Iterator[tuple[int, Record]]:
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
                yield start, _named(names, cells, f"{path}:{start}")
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


def _named(names: list[str], cells: list[str], where: str) -> Record:
    if len(cells) != len(names):
        raise UserError(
            f"{where}: {len(cells)} columns, expected {len(names)} ({', '.join(names)})"
        )
    return dict(zip(names, cells, strict=True))


def _text(row: Record, name: str, where: str) -> str:
    """A field as text, or a UserError where it is absent or no text."""
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
            f"{where}: field {name!r} has half of a character, {text[error.start]!a}, at place "
            f"{error.start}"
        ) from error
    return text


def _label(row: Record, name: str, where: str) -> str | None:
    """A row's label, or None where it is null or empty."""
    if not name or (name in row and row[name] in (None, "")):
        return None
    return _text(row, name, where)
