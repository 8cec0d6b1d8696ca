"""What a mistake at the command line comes to: one line, exit code 2, and nothing left behind."""

import json
from pathlib import Path
from typing import Any

from softprompt import cli
from tests.own_task import words


def one_line(text: str) -> str:
    """The error, which is the last line and the only one that says so."""
    lines = text.splitlines()
    assert "Traceback" not in text
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert lines[-1].startswith("softprompt: error: ")
    return lines[-1].removeprefix("softprompt: error: ")


def refused(capsys: Any, workdir: Path, task: Path, model: Path | str, **more: Any) -> str:
    """Runs `softprompt train` with a mistake; returns its line once nothing is seen to be left."""
    code = cli.main(["train", *words(task, model, **more), "--workdir", str(workdir)])
    written = capsys.readouterr()
    assert code == 2
    assert written.out == ""
    assert not workdir.exists(), "the corrected command would be refused"
    return one_line(written.err)


def run(capsys: Any, *arguments: Any, code: int = 0) -> Any:
    """Runs a command; returns its JSON, or its one line where it is a mistake."""
    capsys.readouterr()
    assert cli.main([str(word) for word in arguments]) == code
    written = capsys.readouterr()
    if code:
        assert written.out == ""
        return one_line(written.err)
    return json.loads(written.out)
