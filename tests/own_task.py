"""A small sentiment task in JSON lines, and configs of trials on it: what whole runs train on."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprompt.config import ConfigDict, base_config, resolve, set_key, validate
from softprompt.console import Progress

REPOSITORY = Path(__file__).parents[1]
SIZES = {"train": 48, "validation": 20, "test": 20}

OPENINGS = ("a", "the", "such a", "it is a", "there was a", "nothing but a", "in the end a")
GOOD = ("warm", "funny", "moving", "good", "loud and moving", "warm and funny")
BAD = ("thin", "old", "lost", "mess of a", "thin and old", "not so good")
ENDINGS = (
    "film",
    "plot",
    "story that made the whole audience laugh",
    "movie with actors who try to save it",
    "ending",
    "story of people in the city",
)


class Lines(Progress):
    """Keeps what is said, and which stages there were."""

    def __init__(self):
        super().__init__()
        self.said, self.stages = [], []

    def say(self, line):
        self.said.append(line)

    def stage(self, what, done=0, total=0, note=""):
        self.stages.append(what)


def write_task(
    folder: Path, sizes: dict[str, int] | None = None, *, endings: tuple[str, ...] = ENDINGS
) -> Path:
    """Writes train.jsonl, validation.jsonl and test.jsonl of seeded texts; returns the folder.

    Lengths differ, so that packing and the order of the data matter.
    """
    rng = np.random.default_rng(0)
    for split, count in (sizes or SIZES).items():
        lines = []
        for number in range(count):
            label, words = (("good", GOOD), ("bad", BAD))[number % 2]
            choice = [str(rng.choice(part)) for part in (OPENINGS, words, endings)]
            lines.append(json.dumps({"text": " ".join(choice), "label": label}) + "\n")
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return folder


def settings(folder: Path, model: Path | str, **more: Any) -> dict[str, Any]:
    """Config keys of a short trial; `more` says `train__steps=8` for train.steps."""
    found = {
        "model.name": str(model),
        "model.dtype": "float32",
        "task.name": "mine",
        "task.source": f"jsonl:{folder}/{{split}}.jsonl",
        "task.template": "Review: {text}\nSentiment:",
        "task.verbalizers": {"good": " positive", "bad": " negative"},
        "method.length": 3,
        "optimizer.warmup": 2,
        "train.steps": 8,
        "train.batch": 4,
        "log.every": 1,
    }
    return found | {key.replace("__", "."): value for key, value in more.items()}


def make_config(folder: Path, model: Path | str, **more: Any) -> ConfigDict:
    """The resolved config of `settings`."""
    config = base_config()
    for key, value in settings(folder, model, **more).items():
        set_key(config, key, value)
    validate(config)
    return resolve(config)


def words(folder: Path, model: Path | str, **more: Any) -> list[str]:
    """The same as words of the command line."""

    def text(value: Any) -> str:
        return json.dumps(value) if isinstance(value, dict) else str(value)

    found = settings(folder, model, **more)
    return [f"--config.{key}={text(value)}" for key, value in found.items()]


def give(monkeypatch: pytest.MonkeyPatch, text: str | bytes) -> None:
    """Puts a text on standard input."""
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))


def train_command(folder: Path, model: Path | str, workdir: Path, **more: Any) -> list[str]:
    """`softprompt train` as a command for subprocess, to be run in the repository."""
    command = [sys.executable, "-m", "softprompt", "train", "--workdir", str(workdir)]
    return command + words(folder, model, **more)
