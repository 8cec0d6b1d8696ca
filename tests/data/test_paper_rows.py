"""The paper's sets at their real sizes, and real rows of them read by rules written twice."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from softprompt.data.builtin_tasks import TASKS
from softprompt.data.splits import read_split
from tests.data.released import Lines, in_form, jsonl, mock, texts

__all__ = ["mock"]  # a fixture

SIZES = {  # Table 7; SQuAD's and SuperGLUE's own, train and development
    "boolq": (9427, 3270),
    "cb": (250, 56),
    "copa": (400, 100),
    "multirc": (27243, 4848),
    "record": (100730, 10000),
    "rte": (2490, 277),
    "wic": (5428, 638),
    "wsc": (259, 104),
    "mrpc": (3668, 408),
    "qqp": (363849, 40430),
    "squad": (87599, 10570),
}
ROW: Lines = {"idx": {"question": 1}, "label": 1, "text": b"a he", "span1_text": b"b"}
ROW |= {"span2_text": b"he", "span2_index": 1, "answers": [b"e"], "entities": [b"e"]}


class Rows(Sequence[Lines]):
    """Equal rows of any data set, as many as its split has; WSC's first 295 are negative."""

    def __init__(self, builder: Any, count: int) -> None:
        self.count, names = count, list(builder.info.features)
        self.row = {name: ROW.get(name, b"x") for name in names}
        if "answers" in names and "entities" not in names:
            self.row["answers"] = {"text": [b"e"]}
        self.negative = 295 if "span1_text" in names and count > 104 else 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: Any) -> Any:
        return self.row | {"label": int(index >= self.negative), "id": str(index).encode()}


def test_sizes_are_the_papers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Breaks when a split loses rows on the way, or a set of another size passes unsaid."""
    import tensorflow_datasets as tfds

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    source = {name: SIZES[name] for name in SIZES} | {"wsc": (554, 104)}
    current, missing = [""], [0]

    def rows(builder: Any, split: str, **_: Any) -> Rows:
        return Rows(builder, source[current[0]][split == "validation"] - missing[0])

    with tfds.testing.mock_data(as_data_source_fn=rows, policy=tfds.testing.MockPolicy.USE_CODE):
        for name, sizes in SIZES.items():
            assert TASKS[name].counts == source[name]
            if sizes[0] > 30_000:  # as all others, and slow
                continue
            current[0], task = name, TASKS[f"{name}_dev"]
            found = tuple(len(read_split(task, split)) for split in ("train", "validation"))
            assert found == sizes, name
        assert "warning" not in capsys.readouterr().err
        current[0], missing[0] = "cb", 1
        assert len(read_split(TASKS["cb_dev"], "test")) == 55
    said = capsys.readouterr().err
    assert "super_glue/cb:1.0.2, validation has 55 rows; in the paper it has 56" in said


# The rules of T5's preprocessors, written a second time, for real rows.


def reference(name: str, row: Lines) -> list[tuple[str, str]]:
    """Input and target of a line of SuperGLUE's files."""
    if name == "MultiRC":
        joined = [
            (f"question: {q['question']} answer: {a['text']} paragraph: ", bool(a["label"]))
            for q in row["passage"]["questions"]
            for a in q["answers"]
        ]
        texts = [(start + row["passage"]["text"], f" {label}") for start, label in joined]
        return [
            ("".join(re.split("<b>|</b>", text.replace("<br>", " "))), label)
            for text, label in texts
        ]
    if name == "ReCoRD":
        text, parts = row["passage"]["text"], []
        entities = sorted({text[e["start"] : e["end"] + 1] for e in row["passage"]["entities"]})
        for piece in text.split("\n@highlight\n"):
            parts += [piece, " " if piece[-1:] in ".?!\"'" and piece else ". "]
        passage = "".join(parts[:-1])
        return [
            (
                f"query: {q['query']} entities: {', '.join(entities)} passage: {passage}",
                f" {min(a['text'] for a in q['answers'])}",
            )
            for q in row["qas"]
        ]
    if name == "WSC":
        target = row["target"]
        index, pronoun = target["span2_index"], target["span2_text"]
        words = row["text"].strip().split(" ")
        before = " ".join(words[:index])
        marked = before + row["text"].strip()[len(before) :].replace(pronoun, f"*{pronoun}*", 1)
        span = target["span1_text"]
        if span not in row["text"]:  # wsc.fixed
            first = row["text"].split()[target["span1_index"]][0]
            span = (first + span[1:]).rstrip(".")
        return [(marked.replace('*him*,"', '*him* ,"'), f" {span}")]
    order = {
        "BoolQ": ("passage", "question"),
        "CB": ("hypothesis", "premise"),
        "RTE": ("hypothesis", "premise"),
        "COPA": ("choice1", "choice2", "premise", "question"),
        "WiC": ("sentence1", "sentence2", "word"),
    }[name]
    label = ["choice1", "choice2"][row["label"]] if name == "COPA" else row["label"]
    return [(" ".join(f"{key}: {row[key]}" for key in order), f" {label}")]


REAL = {
    "superglue": ("BoolQ", "RTE", "WiC", "COPA"),
    "superglue_fewglue32": ("BoolQ", "CB", "COPA", "MultiRC", "ReCoRD", "RTE", "WSC", "WiC"),
}


@pytest.mark.parametrize("folder", REAL)
def test_real_rows_read_as_the_rules_say(
    folder: str, shared_data: Path, mock: Callable[..., None]
) -> None:
    """Breaks when a rule fails on a text that nobody thought of."""
    for name in REAL[folder]:
        for file in sorted((shared_data / folder / name).glob("*.jsonl")):
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            lines = lines if folder.endswith("32") else lines[:300]
            mock(jsonl(*lines))
            expected = [pair for line in lines for pair in reference(name, line)]
            assert texts(in_form(name.lower())) == expected, file


def test_real_questions_of_squads_format(shared_data: Path, mock: Callable[..., None]) -> None:
    """Breaks when an answer is not where its context has it, once both are spaced out."""
    mock((shared_data / "xquad_en" / "xquad.en.json").read_text())
    records = read_split(in_form("squad"), "test")
    assert len(records) == 1190
    for record in records:
        assert record["label"] in record["context"]
        assert "  " not in record["context"] + record["question"]
        assert all(re.fullmatch(r"\w+|\W", word, re.A) for word in record["context"].split())


def test_real_pairs_of_mrpc(shared_data: Path, mock: Callable[..., None]) -> None:
    """Breaks when quotes of MRPC's lines are not text."""
    lines = (shared_data / "mrpc" / "msr_paraphrase_test.txt").read_text("utf-8-sig").splitlines()
    mock("\n".join(lines[:200]) + "\n")
    rows = [line.split("\t") for line in lines[1:200]]
    assert texts(in_form("mrpc")) == [
        (
            f"sentence1: {row[3]} sentence2: {row[4]}",
            " equivalent" if row[0] == "1" else " not_equivalent",
        )
        for row in rows
    ]
