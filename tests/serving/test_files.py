"""`softprompt generate`: answers in order; resumed, they are the same file."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from softprompt import cli
from softprompt.errors import UserError
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.serving import engine as engine_module
from softprompt.serving.files import Line, answers, finished_lines, read_lines
from softprompt.serving.requests import Request

LINES = [
    {"task": "short", "input": "Review: a warm film", "max_new": 7},
    {"input": "There was", "max_new": 2, "temperature": 1.5},
    {"task": "short", "input": "the plot is thin", "stop": ["e"]},
    {"input": "Question:", "temperature": 1.5, "top_k": 9, "top_p": 0.9},
    {"task": "long", "input": "Answer: the"},
    {"task": "two:other", "input": "warm and moving"},
]


def arguments(folder, task_root, tiny_loaded, to="out.jsonl"):
    command = ["generate", str(folder / "in.jsonl"), "--root", str(task_root), "--rows", "2"]
    return [*command, "--model", tiny_loaded.name, "--to", str(folder / to), "--max-new", "5"]


def run(*where):
    return cli.main(arguments(*where))


def test_a_resumed_file_is_the_same(tiny_loaded, task_root, tmp_path, monkeypatch, capsys):
    """Mutations: seeds count from where the file is resumed; answers come as they end; a broken
    line stays; TRIAL:TASK is taken for a folder; texts are encoded one by one.
    """
    monkeypatch.setattr(Tokenizer, "encode", None)
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    (tmp_path / "in.jsonl").write_text(text)
    assert run(tmp_path, task_root, tiny_loaded) == 0
    whole = (tmp_path / "out.jsonl").read_bytes()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [{key: one[key] for key in line} for one, line in zip(answers, LINES, strict=True)] == (
        LINES
    )
    assert answers[0]["new_tokens"] <= 7 and "e" not in answers[2]["output"]
    (tmp_path / "again.jsonl").write_bytes(whole[: whole.index(b"\n", whole.index(b"\n") + 1) + 9])
    assert run(tmp_path, task_root, tiny_loaded, "again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == whole
    monkeypatch.setattr(engine_module, "Engine", None)
    assert run(tmp_path, task_root, tiny_loaded) == 0  # nothing is left to do


@pytest.mark.long
def test_a_killed_command_goes_on(tiny_loaded, task_root, tmp_path):
    """Mutations: answers are written when all are there; a broken line stays."""
    lines = [one | {"max_new": 9} for one in LINES * 100]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def process(to):
        words = arguments(tmp_path, task_root, tiny_loaded, to)
        return subprocess.Popen([sys.executable, "-m", "softprompt", *words])

    killed, file = process("out.jsonl"), tmp_path / "out.jsonl"
    while not (file.exists() and file.read_bytes().count(b"\n") > 100):
        assert killed.poll() is None
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    part = file.read_bytes()
    file.write_bytes(part + b'{"input": "half')  # what a kill within a write leaves
    assert process("out.jsonl").wait() == process("whole.jsonl").wait() == 0
    whole = (tmp_path / "whole.jsonl").read_bytes()
    assert file.read_bytes() == whole and 100 < part.count(b"\n") < len(lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('{"task": "short"}', "line 2: allowed: an object with the text field 'input'"),
        ('{"input": "a", "n": 2}', "line 2: field 'n'; allowed: task, input"),
        ('{"input": "a", "max_new": "2"}', "line 2: max_new is '2'; allowed: int"),
        ('{"input": "a", "stop": [1]}', "line 2: stop is .1.; allowed: a list of texts"),
    ],
)
def test_bad_lines(tmp_path, line, message):
    """Mutation: a line is checked when its turn comes."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"input": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_lines(file)


def test_all_lines_are_checked_before_the_first_is_submitted():
    """Mutation: a line is checked when it is submitted, after answers were written."""

    def check(request):
        if request.temperature < 0:
            raise UserError(f"temperature is {request.temperature}")

    engine = SimpleNamespace(check=check, bos_ids=lambda task: ())  # it cannot submit
    records = [{"input": "a"}, {"input": "a", "temperature": -1}]
    lines = [(Line(number, record), [5, 6]) for number, record in enumerate(records, 1)]
    with pytest.raises(UserError, match="line 2: temperature is -1"):
        next(answers(engine, lines, Request("", (), 5), ahead=1, progress=None))


def test_a_text_may_hold_characters_that_end_lines(tmp_path):
    """Mutation: the file is cut by `splitlines`."""
    (tmp_path / "in.jsonl").write_text('{"input": "a\u2028b"}\n{"input": "c"}\n')
    assert [line.record["input"] for line in read_lines(tmp_path / "in.jsonl")] == ["a\u2028b", "c"]
    (tmp_path / "in.jsonl").write_text("")
    assert read_lines(tmp_path / "in.jsonl") == []


def test_another_output_file(tmp_path):
    """Mutations: answers are counted, not compared; a line that is not JSON is a traceback."""
    file = tmp_path / "in.jsonl"
    file.write_text('{"input": "a"}\n')
    for other in ('{"input": "b", "output": ""}', "a text", "1"):
        (tmp_path / "out.jsonl").write_text(f"{other}\n")
        with pytest.raises(UserError, match="line 1: not the answer"):
            finished_lines(tmp_path / "out.jsonl", read_lines(file))
