"""The folders of tasks under one root: trials, or PEFT adapters."""

import re
from pathlib import Path

from softprompt.errors import UserError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,127}")
ALLOWED = "1 to 128 letters, digits and . _ + -, the first a letter, a digit or _"
MARKS = ("delta.safetensors", "adapter_config.json")  # a trial's folder, a PEFT adapter


class NoTask(UserError):
    """No task of this name is loaded, or no folder has this name."""


def find_tasks(root: Path) -> list[str]:
    """The names of the tasks under a root: the folders in it that hold a trial or an adapter.

    Raises:
        UserError: no such folder, or no task in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder {str(root)!r}; give one whose folders are trials")
    names = sorted(child.name for child in root.iterdir() if NAME.fullmatch(child.name))
    found = [name for name in names if any((root / name / mark).is_file() for mark in MARKS)]
    if not found:
        raise UserError(f"{root}: no folder in it holds {' or '.join(MARKS)}")
    return found


def task_folder(root: Path, name: str) -> Path:
    """The folder of a task. Neither it nor its files may be links that leave the root.

    Raises:
        UserError: not a name, or a link that leaves the root.
        NoTask: no such folder.
    """
    if not NAME.fullmatch(name):
        raise UserError(f"the task's name is {name[:128]!r}; allowed: {ALLOWED}")
    folder, home = root / name, root.resolve()
    if not any((folder / mark).is_file() for mark in MARKS):
        raise NoTask(
            f"task {name!r}: no folder of this name in {root.name!r} holds {' or '.join(MARKS)}"
        )
    for path in (folder, *folder.iterdir()):
        if not path.resolve().is_relative_to(home):
            raise UserError(f"task {name!r}: {path.name!r} is a link that leaves the root")
    return folder
