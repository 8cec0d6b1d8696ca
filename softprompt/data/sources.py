"""Records read from users' own files.

A record, here and from TFDS (`softprompt.data.tfds_reader`), is a plain dict: "id" (unique in its
split), the text fields that were asked for, and "label" (None where the row is unlabelled), all
strings. A record of a free-text task also has "answers", a tuple of all right answers; its label is
the first of them. Where a task has them, a record has its "group", its "candidates" (a tuple), and
whether its label is "correct". Any mistake in a file is one line that names the file and the line.
"""

import codecs
import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from softprompt.errors import UserError, nearest

Record = dict[str, Any]
Row = dict[str, Any]

FORMATS = ("jsonl", "tsv", "csv", "mrqa")


@dataclass(frozen=True)
class Columns:
    """Which fields of a source's rows hold the parts of a record.

    A field inside of others is named with dots, as in "answers.text".

    Attributes:
        texts: the text fields that every row must have; a list of texts is joined by ", ".
        label: the field that holds the label or the answers; "" where no row has one.
        id: the field that holds the id; "" numbers the rows.
        group: the field that holds the group; "" where there are none.
        candidates: the field that holds a list of candidates; "" where there are none.
        correct: the field that says whether the label is correct, as "True" or "False"; "" where
            all are.
        labels: the labels that are allowed; None for free text.
        clean: changes each text, answer and candidate.
        transform_row: changes each row before its fields are read.
    """

    texts: tuple[str, ...]
    label: str = "label"
    id: str = ""
    group: str = ""
    candidates: str = ""
    correct: str = ""
    labels: Collection[str] | None = None
    clean: Callable[[str], str] | None = None
    transform_row: Callable[[Row], Row] | None = None


def read_file(
    path: str, file_format: str, columns: Columns, *, id_prefix: str = ""
) -> list[Record]:
    """Reads a file of labelled or answered text.

    JSON lines hold one object a line; a number or boolean is read as its JSON spelling (true, 1,
    0.5). TSV is split at tabs and nothing else (quotes are text); CSV follows RFC 4180; both begin
    with a line of column names. Blank lines are skipped. An unlabelled row has null (JSON) or
    nothing (TSV, CSV) as its label. Without `labels`, the label field holds an answer, or in JSON a
    list of the right answers, which is empty for an unanswered row. "mrqa" are the JSON lines of
    MRQA: a header, then passages, each with several questions. A name that ends in .gz is
    decompressed.

    Args:
        path: a local path, or any that etils' epath opens, such as gs://.
        file_format: "jsonl", "tsv", "csv" or "mrqa".
        columns: the fields.
        id_prefix: a numbered row has the id "<id_prefix>-<index>", counted from 0.

    Raises:
        UserError: the file cannot be read, or a line is malformed, lacks a field, repeats an id or
            has a label that is not allowed.
    """
    rows = ((f"{path}:{number}", row) for number, row in _rows(path, file_format))
    return make_records(rows, columns, id_prefix=id_prefix)


def make_records(
    rows: Iterable[tuple[str, Row]], columns: Columns, *, id_prefix: str
) -> list[Record]:
    """Returns the records of rows.

    Args:
        rows: each with its place, for errors.
        columns: the fields.
        id_prefix: see `read_file`.

    Raises:
        UserError: see `read_file`.
    """
    records: list[Record] = []
    seen: dict[str, str] = {}
    for where, row in rows:
        row = columns.transform_row(row) if columns.transform_row else row
        key = _text(row, columns.id, where) if columns.id else f"{id_prefix}-{len(records)}"
        if key in seen:
            raise UserError(f"{where}: id {key!r} was already used in {seen[key]}")
        seen[key] = where
        texts = {name: _text(row, name, where, join=True) for name in columns.texts}
        if columns.clean:
            texts = {name: columns.clean(text) for name, text in texts.items()}
        records.append({"id": key, **texts, **_solution(row, columns, where)})
    return records


def _solution(row: Row, columns: Columns, where: str) -> Record:
    """What a record holds beside its id and its fields.

    Raises:
        UserError: the label has no verbalizer, or no candidate is a right answer.
    """
    labels, found, clean = columns.labels, Record(), columns.clean or str
    answers = _texts(row, columns.label, where, several=labels is None)
    if labels is None:
        answers = [clean(answer) for answer in answers]
    label = answers[0] if answers else None
    found["label"] = label
    if labels is None:
        found["answers"] = tuple(answers)
    elif label is not None and label not in labels:
        raise UserError(
            f"{where}: label {label!r} has no verbalizer{nearest(label, labels)}; "
            f"known: {', '.join(labels)}"
        )
    if columns.group:
        found["group"] = _text(row, columns.group, where)
    if columns.candidates:
        options = _texts(row, columns.candidates, where, several=True)
        candidates = dict.fromkeys(clean(one) for one in options)
        found["candidates"] = tuple(candidates)
        ours = columns.clean is not None  # a benchmark's own rows are scored as they are
        if not ours and (len(candidates) < 2 or answers and candidates.keys().isdisjoint(answers)):
            raise UserError(
                f"{where}: field {columns.candidates!r} is {', '.join(candidates)!r}; allowed: two "
                f"or more texts, of which one is a right answer ({', '.join(answers)})"
            )
    if columns.correct:
        truth = _texts(row, columns.correct, where, several=False)
        found["correct"] = truth == ["True"] if truth else None
    return found


def _rows(path: str, file_format: str) -> Iterator[tuple[int, Record]]:
    """The rows of a file, each with its line number from 1."""
    if file_format == "jsonl":
        return _json_rows(path)
    if file_format == "tsv":
        return _tsv_rows(path)
    if file_format == "csv":
        return _csv_rows(path)
    if file_format == "mrqa":
        return _mrqa_rows(path)
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
        content = epath.Path(path).expanduser().read_bytes()
        if path.endswith(".gz"):
            content = gzip.decompress(content)
        return content.removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
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


def _mrqa_rows(path: str) -> Iterator[tuple[int, Record]]:
    """The questions of a file of MRQA, each with the context of its line."""
    for number, line in _json_rows(path):
        if "header" in line:
            continue
        questions = line.get("qas")
        if not isinstance(questions, list) or "context" not in line:
            raise UserError(f"{path}:{number}: has no 'context' and 'qas', as lines of MRQA have")
        for question in questions:
            yield number, {"context": line["context"], **question}


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


def _value(row: Row, name: str, where: str) -> Any:
    """The value of a field, or of one inside of others; in a list of dicts, of each of them."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        several = isinstance(value, list)
        inside = value if several else [value]
        if any(not isinstance(one, dict) or part not in one for one in inside):
            raise UserError(
                f"{where}: missing field {name!r}{nearest(name, row)}; the line has: "
                f"{', '.join(row)}"
            )
        value = [one[part] for one in inside] if several else value[part]
    return value


def _text(row: Row, name: str, where: str, *, join: bool = False) -> str:
    """The text of a field; a list of texts only with `join`.

    Raises:
        UserError: the field is absent or holds no text.
    """
    value = _value(row, name, where)
    if join and isinstance(value, list) and all(isinstance(one, str) for one in value):
        value = ", ".join(value)
    return _string(value, name, where)


def _string(value: Any, name: str, where: str) -> str:
    """A value of a field as text; a number as JSON spells it."""
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


def _texts(row: Row, name: str, where: str, *, several: bool) -> list[str]:
    """The texts of a field; none where it is null or empty. A list may hold several."""
    value = _value(row, name, where) if name else None
    if value in (None, ""):
        return []
    if not (several and isinstance(value, list)):
        return [_string(value, name, where)]
    texts = [_string(one, name, where) for one in value]
    if not all(text.strip() for text in texts):
        raise UserError(
            f"{where}: field {name!r} has an answer without text; allowed: texts, or an empty list "
            "where no answer is known"
        )
    return texts
