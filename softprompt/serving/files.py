"""Generates for the lines of a file: each names a task and has an input; the answers keep order."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.serving.engine import Engine
from softprompt.serving.requests import Finish, Request, Token

FIELDS: dict[str, tuple[type, ...]] = {
    "task": (str,),
    "input": (str,),
    "max_new": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
    "stop": (list,),
}


class Line(NamedTuple):
    """A line of the input file: its number, from 1, and its fields."""

    number: int
    record: Mapping[str, Any]


def read_lines(file: Path) -> list[Line]:
    """The lines of a JSONL file with the fields `FIELDS`; `input` is required.

    Raises:
        UserError: a line is not such an object; names its number and the field.
    """
    try:
        texts = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not readable as UTF-8 ({error})") from error
    # Not by `splitlines`: a JSON text may hold other characters that end a line, such as U+2028.
    return [_line(file, number, text) for number, text in enumerate(texts, 1) if texts != [""]]


def _line(file: Path, number: int, text: str) -> Line:
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{file}, line {number}: not JSON ({error})") from error
    if not isinstance(record, dict) or not isinstance(record.get("input"), str):
        raise UserError(f"{file}, line {number}: allowed: an object with the text field 'input'")
    for field, value in record.items():
        types = FIELDS.get(field)
        if types is None:
            known = ", ".join(FIELDS)
            raise UserError(f"{file}, line {number}: field {field!r}; allowed: {known}")
        if type(value) not in types:
            named = " or ".join(one.__name__ for one in types)
            raise UserError(f"{file}, line {number}: {field} is {value!r}; allowed: {named}")
    if not all(isinstance(one, str) and one for one in record.get("stop", [])):
        allowed = "a list of texts that are not empty"
        raise UserError(f"{file}, line {number}: stop is {record['stop']!r}; allowed: {allowed}")
    return Line(number, record)


def finished_lines(file: Path, lines: Sequence[Line]) -> int:
    """The number of complete answers in an output file; an incomplete last one is removed.

    Raises:
        UserError: an answer is not that of the input's line.
    """
    if not file.exists():
        return 0
    content = file.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    for number, text in enumerate(complete.splitlines()):
        wanted = lines[number].record if number < len(lines) else None
        if wanted is None or not _answers(text, wanted):
            raise UserError(
                f"{file}, line {number + 1}: not the answer to the input's line; give a new file"
            )
    if len(complete) < len(content):
        os.truncate(file, len(complete))
    return complete.count(b"\n")


def _answers(text: bytes, record: Mapping[str, Any]) -> bool:
    """Whether a line of the output is the answer to a line of the input."""
    try:
        answer = json.loads(text)
    except ValueError:
        return False
    return isinstance(answer, dict) and {key: answer.get(key) for key in record} == record


def _request(line: Line, ids: Sequence[int], engine: Engine, defaults: Request) -> Request:
    """A line's request, with defaults; the default seed is increased by the line's number."""
    given = {key: value for key, value in line.record.items() if key not in ("task", "input")}
    task = line.record.get("task", "")
    given |= {"stop": tuple(given["stop"])} if "stop" in given else {}
    given = {"seed": defaults.seed + line.number, **given}
    tokens = (*engine.bos_ids(task), *ids)
    return dataclasses.replace(defaults, task=task, tokens=tokens, **given)


def submit(engine: Engine, request: Request) -> Future[tuple[str, Finish]]:
    """Submits a request; the result is its output and its last event."""
    texts, done = list[str](), Future[tuple[str, Finish]]()

    def take(event: Token | Finish) -> None:
        if isinstance(event, Token):
            texts.append(event.text)
        else:
            done.set_result(("".join(texts), event))

    engine.submit(request, take)
    return done


def answers(
    engine: Engine,
    lines: Sequence[tuple[Line, Sequence[int]]],
    defaults: Request,
    *,
    ahead: int,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """The answers to lines, in order: their fields, "output", "finish" and "new_tokens".

    All lines are checked before the first is submitted.

    Args:
        engine: that generates.
        lines: each with the ids of its input, without BOS.
        defaults: of the fields that a line lacks.
        ahead: lines that are in the engine at once.
        progress: the display.

    Raises:
        UserError: a line's value is not allowed, or the engine has stopped.
    """
    requests = []
    for line, ids in lines:
        try:
            requests.append((line, _request(line, ids, engine, defaults)))
            engine.check(requests[-1][1])
        except UserError as error:
            raise UserError(f"line {line.number}: {error}") from error
    pending: list[tuple[Line, Future[tuple[str, Finish]]]] = []
    left = iter(requests)
    for done in range(len(lines)):
        for line, request in left:
            pending.append((line, submit(engine, request)))
            if len(pending) >= ahead:
                break
        line, answer = pending.pop(0)
        output, end = answer.result()
        if end.reason in ("error", "cancelled"):
            raise UserError(f"line {line.number}: {end.error or end.reason}")
        facts = {"finish": end.reason, "new_tokens": end.completion_tokens}
        yield {**line.record, "output": output, **facts}
        progress.stage("generate", done + 1, len(lines))
