"""Released files of the paper's sets, as TFDS's own builders and feature specs read them."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from softprompt.config import base_config
from softprompt.data.builtin_tasks import get_task
from softprompt.data.splits import read_split
from softprompt.data.tasks import Task, target_text

Lines = dict[str, Any]


def in_form(name: str, form: str = "t5") -> Task:
    return get_task({**base_config().task.to_dict(), "name": name, "form": form})


def texts(task: Task, split: str = "test") -> list[tuple[str, str]]:
    """Input and target of every example."""
    return [
        (task.template.format(**record), target_text(task, record["label"]))
        for record in read_split(task, split)
    ]


@pytest.fixture
def mock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Gives a released file's text (or one by a set's name) to TFDS's own builders, and what they
    make of it, through their feature specs, to whoever reads."""
    import tensorflow_datasets as tfds

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    given: list[Any] = []

    def rows(builder: Any, split: str) -> Iterator[tuple[Any, Lines]]:
        file = tmp_path / "lines"
        name = builder.builder_config.name
        text = given[0] if isinstance(given[0], str) else given[0][name]
        file.write_text(text)
        if builder.name == "squad":
            yield from builder._generate_examples(file)
        elif name == "mrpc":
            file.write_text(f"\ufeff{text}")  # one file, and the ids of its development rows
            pairs = [line.split("\t")[1:3] for line in text.split("\n") if line]
            (tmp_path / "ids").write_text(tsv(*pairs))
            files = {"dev_ids": tmp_path / "ids", "train": file}
            yield from builder._generate_examples(None, split="dev", mrpc_files=files)
        else:
            yield from builder._generate_examples(file, split=split)

    def source(builder: Any, split: str, **_: Any) -> list[Any]:
        features = builder.info.features
        stored = [
            features.serialize_example(features.encode_example(row))
            for _, row in rows(builder, split)
        ]
        return [features.deserialize_example_np(one) for one in stored]

    with tfds.testing.mock_data(as_data_source_fn=source, policy=tfds.testing.MockPolicy.USE_CODE):
        yield lambda text: given.__setitem__(slice(None), [text])


def jsonl(*rows: Lines) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def tsv(*rows: Sequence[str]) -> str:
    return "".join("\t".join(row) + "\n" for row in rows)
