import json
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from softprompt.data.sources import Columns, make_records, read_file
from softprompt.data.tfds_reader import TIMEOUT, _adapted_tfds, _plain_row, read_tfds
from softprompt.errors import UserError

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\t"), min_size=1).filter(
    lambda text: text.strip() and text[0] != "\ufeff"
)


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def read(path: str, **options: Any) -> list[dict[str, Any]]:
    columns = Columns(**{"texts": ("text",), "labels": ("neg", "pos"), **options})
    return read_file(path, path.rsplit(".", 1)[1], columns, id_prefix="test")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(TEXT, st.sampled_from(["neg", "pos"])), max_size=5))
def test_what_is_written_is_read_from_each_format(tmp_path: Path, rows: Any) -> None:
    """Breaks when lines are cut at Unicode line breaks (str.splitlines) or TSV reads quotes."""
    expected = [
        {"id": f"test-{n}", "text": text, "label": label} for n, (text, label) in enumerate(rows)
    ]
    lines = [json.dumps({"text": t, "label": y}, ensure_ascii=False) for t, y in rows]
    assert read(write(tmp_path / "a.jsonl", "\n".join(lines))) == expected
    lines = ["label\ttext", *(f"{y}\t{t}" for t, y in rows)]
    assert read(write(tmp_path / "a.tsv", "\r\n".join(lines) + "\r\n")) == expected
    quoted = [(text.replace('"', '""'), label) for text, label in rows]
    lines = ["text,label", *(f'"{t}",{y}' for t, y in quoted)]
    assert read(write(tmp_path / "a.csv", "\n".join(lines))) == expected


def test_csv_keeps_line_breaks_inside_quotes_and_names_the_line_a_row_begins(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.csv", 'text,label\n"one\ntwo",pos\n\n"three\nfour",bad\n')
    assert read(path, labels=None)[0]["text"] == "one\ntwo"
    with pytest.raises(UserError, match=rf"^{path}:5: label 'bad'"):
        read(path)


def test_blank_lines_of_a_csv_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "  \r\ntext,label\r\nx,pos\r\n   \r\n\r\ny,neg\r\n \r\n")
    assert [record["text"] for record in read(path)] == ["x", "y"]


def test_unlabelled_rows_have_no_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": null}\n{"text": "b", "label": ""}')
    assert [record["label"] for record in read(path)] == [None, None]
    path = write(tmp_path / "a.tsv", "text\tlabel\na\t\nb\tpos\n")
    assert [record["label"] for record in read(path)] == [None, "pos"]
    path = write(tmp_path / "b.tsv", "text\na\n")
    assert read(path, label="") == [{"id": "test-0", "text": "a", "label": None}]


def test_free_text_has_one_or_several_right_answers(tmp_path: Path) -> None:
    """Breaks when a list of answers is refused, loses one, or an empty one is an answer."""
    lines = [{"a": "Paris"}, {"a": ["Rome", "Roma"]}, {"a": 7}, {"a": []}, {"a": None}]
    rows = [json.dumps({"text": "t", **line}) for line in lines]
    records = read(write(tmp_path / "a.jsonl", "\n".join(rows)), labels=None, label="a")
    assert [(record["label"], record["answers"]) for record in records] == [
        ("Paris", ("Paris",)),
        ("Rome", ("Rome", "Roma")),
        ("7", ("7",)),
        (None, ()),
        (None, ()),
    ]
    path = write(tmp_path / "a.tsv", "text\ta\nt\tParis\nt\t\n")
    answers = [record["answers"] for record in read(path, labels=None, label="a")]
    assert answers == [("Paris",), ()]
    for value, reason in (([" "], "without text"), ([["a"]], "expected text"), ({}, "expected")):
        path = write(tmp_path / "b.jsonl", json.dumps({"text": "t", "a": value}))
        with pytest.raises(UserError, match=rf"^{path}:1: field 'a' .*{reason}"):
            read(path, labels=None, label="a")


def test_values_of_json_count_as_they_are_spelled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": 1.50, "label": true}\n{"text": 7, "label": 0}')
    records = read(path, labels=("true", "0"))
    assert [(record["text"], record["label"]) for record in records] == [
        ("1.5", "true"),
        ("7", "0"),
    ]


def test_ids_are_the_files_own_where_they_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "\ufeffkey\ttext\tlabel\nx9\ta\tpos\n\nx7\tb\tneg\n")
    assert [record["id"] for record in read(path, id="key")] == ["x9", "x7"]


GOOD = '{"text": "a", "label": "pos"}\n' * 6

BAD_LINES = {
    "broken": ("jsonl", '{"text": "a", "label": "pos"', "not valid JSON: .* at column"),
    "not an object": ("jsonl", '["a", "pos"]', "expected a JSON object, got list"),
    "huge number": ("jsonl", '{"text": ' + "1" * 5000 + "}", "not valid JSON"),
    "missing field": ("jsonl", '{"txet": "a", "label": "pos"}', r"missing field 'text' \(did you"),
    "missing label": ("jsonl", '{"text": "a"}', "missing field 'label'"),
    "null text": ("jsonl", '{"text": null, "label": "pos"}', "field 'text' is null, expected text"),
    "half an emoji": ("jsonl", r'{"text": "a\ud83d", "label": "pos"}', "field 'text' has half of"),
    "list as label": ("jsonl", '{"text": "a", "label": ["pos"]}', "field 'label' is .*pos"),
    "unknown label": (
        "jsonl",
        '{"text": "a", "label": "poss"}',
        r"label 'poss' has no verbalizer \(did",
    ),
    "not UTF-8": ("jsonl", b'{"text": "caf\xe9", "label": "pos"}', "not UTF-8"),
    "too few columns": ("tsv", "a", r"1 columns, expected 2 \(text, label\)"),
    "too many columns": ("tsv", "a\tpos\tpos", "3 columns, expected 2"),
    "unknown tsv label": ("tsv", "a\tmaybe", "label 'maybe' has no verbalizer.*known: neg, pos"),
    "open quote": ("csv", '"a,pos', "not valid CSV"),
    "not UTF-8 csv": ("csv", b"caf\xe9,pos", "not UTF-8"),
    "csv columns": ("csv", "a,b,pos", "3 columns, expected 2"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_7_is_reported_with_file_line_and_reason(name: str, tmp_path: Path) -> None:
    """Breaks when the line number counts from 0, skips blank lines, or the reason is lost."""
    form, line, reason = BAD_LINES[name]
    good = {
        "jsonl": '{"text": "a", "label": "pos"}\n' * 5,
        "tsv": "text\tlabel\n" + "a\tpos\n" * 4,
        "csv": "text,label\n" + "a,pos\n" * 4,
    }[form]
    line = line.encode() if isinstance(line, str) else line
    path = write(tmp_path / f"own.{form}", good.encode() + b"\n" + line + b"\n" + good.encode())
    with pytest.raises(UserError, match=rf"^{path}:7: {reason}") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_repeated_ids_and_columns_are_errors(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", "id\ttext\tlabel\nx\ta\tpos\ny\tb\tpos\nx\tc\tneg\n")
    with pytest.raises(UserError, match=rf"^{path}:4: id 'x' was already used in {path}:2"):
        read(path, id="id")
    path = write(tmp_path / "a.csv", "text,text,label\n")
    with pytest.raises(UserError, match=rf"^{path}:1: column 'text' appears twice"):
        read(path)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none.jsonl: No such file"):
        read(str(tmp_path / "none.jsonl"))
    (tmp_path / "folder.tsv").mkdir()
    with pytest.raises(UserError, match="cannot read .*folder.tsv: Is a directory"):
        read(str(tmp_path / "folder.tsv"))
    with pytest.raises(UserError, match="unknown file format 'xml'.*jsonl, tsv, csv"):
        read_file(str(tmp_path), "xml", Columns(()))


@pytest.fixture
def boolq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which super_glue/boolq is prepared, with five rows of our own."""
    import tensorflow_datasets as tfds

    class SuperGlue(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.2")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="boolq")]

        def _info(self) -> Any:
            features = {
                "question": tfds.features.Text(),
                "passage": tfds.features.Text(),
                "idx": np.int32,
                "label": tfds.features.ClassLabel(names=["False", "True"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
            return {"train": self._generate_examples(1), "test": self._generate_examples(-1)}

        def _generate_examples(self, label: int) -> Iterator[tuple[int, Any]]:
            for n in range(5):
                row = {"question": f"q\xe9{n}", "passage": f"p{n}", "idx": n}
                yield n, {**row, "label": label if label < 0 else n % 2}

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    builder = SuperGlue(config="boolq", data_dir=tmp_path / "tfds")
    with _adapted_tfds():
        builder.download_and_prepare(file_format="array_record")
    return tmp_path


BOOLQ = "super_glue/boolq:1.0.2"


def test_catalogue_dataset_is_read_under_its_own_name(boolq: Path) -> None:
    """Breaks when super_glue is not registered first or labels stay numbers."""
    records = read_tfds(BOOLQ, "train", Columns(("question", "passage", "idx")))
    assert [record["id"] for record in records] == [f"train-{n}" for n in range(5)]
    assert {(r["question"], r["passage"], r["idx"], r["label"]) for r in records} == {
        (f"q\xe9{n}", f"p{n}", str(n), str(n % 2 == 1)) for n in range(5)
    }
    assert len(read_tfds(BOOLQ, "train[:40%]", Columns(("question",)))) == 2
    named = read_tfds(BOOLQ, "train", Columns(("idx",), id="idx"))
    assert [record["id"] for record in named] == [record["idx"] for record in records]
    assert "tensorflow" not in sys.modules


def test_sequences_and_dicts_of_a_catalogue_dataset_are_what_they_are() -> None:
    """Breaks when a list's or a dict's spelling in Python becomes a text or an answer."""
    row = {
        "names": np.array([b"Rome", "Roma"], object),
        "answers": {"text": [b"Rome"], "answer_start": np.array([1])},
        "label": np.int64(-1),
        "n": np.int32(7),
    }
    plain = _plain_row(row, {"label": ["no", "yes"]})
    answers = {"text": ["Rome"], "answer_start": ["1"]}
    assert plain == {"names": ["Rome", "Roma"], "answers": answers, "label": None, "n": "7"}

    def made(**columns: Any) -> dict[str, Any]:
        return make_records([("here", plain)], Columns(**columns), id_prefix="a")[0]

    found = made(texts=("names", "n"), label="answers.text", group="n")
    assert found == {
        "id": "a-0",
        "names": "Rome, Roma",
        "n": "7",
        "label": "Rome",
        "answers": ("Rome",),
        "group": "7",
    }
    for label, reason in (("answers", "field 'answers' is .*text"), ("answers.txt", "missing fi")):
        with pytest.raises(UserError, match=f"^here: {reason}"):
            made(texts=("n",), label=label)
    with pytest.raises(UserError, match="^here: field 'answers' is .*expected text"):
        made(texts=("answers",), label="")


def test_hidden_label_is_none(boolq: Path) -> None:
    """Breaks when -1 indexes the class names: every hidden label would read "True"."""
    assert {r["label"] for r in read_tfds(BOOLQ, "test", Columns(("question",)))} == {None}


@pytest.mark.parametrize(
    ("name", "split", "options", "reason"),
    [
        (BOOLQ, "dev", {}, "has no split 'dev'; known: test, train|train, test"),
        (BOOLQ, "train", {"texts": ("pasage",)}, r"no field 'pasage' \(did you mean 'passage'\?\)"),
        (BOOLQ, "train", {"label": "y"}, "no field 'y'"),
        (BOOLQ, "train", {"id": "i"}, "no field 'i'"),
        (BOOLQ, "train", {"id": "label"}, "id 'False|True' was already used in .*train-"),
        (BOOLQ, "train", {"labels": ["True"]}, "train, example 'train-.*label 'False' has no verb"),
        ("super_glu/boolq", "train", {}, r"'super_glu/boolq' \(did you mean 'super_glue'\?\)"),
        ("super_glue/bolq:1.0.2", "train", {}, "BuilderConfig bolq not found"),
        ("super_glue/boolq:9.9.9", "train", {}, "cannot be loaded at version 9.9.9"),
        ("", "train", {}, "cannot open TFDS dataset ''"),
    ],
)
def test_unknown_names_are_one_line(
    boolq: Path, name: str, split: str, options: Any, reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        read_tfds(name, split, Columns(**{"texts": ("question",), **options}))
    assert "\n" not in str(caught.value)


@pytest.fixture
def local_boolq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """TFDS's own super_glue/boolq builder, its download address turned to a zip of our rows."""
    import tensorflow_datasets.text.super_glue as module

    archive = tmp_path / "BoolQ.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for name, count in (("train", 4), ("val", 3), ("test", 2)):
            rows = [{"question": f"{name}{n}", "passage": "p", "idx": n} for n in range(count)]
            if name != "test":
                rows = [{**row, "label": row["idx"] == 0} for row in rows]
            opened.writestr(f"BoolQ/{name}.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    config = next(c for c in module.SuperGlue.BUILDER_CONFIGS if c.name == "boolq")
    monkeypatch.setattr(config, "data_url", str(archive))
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    return archive


def test_catalogue_builder_prepares_adapted_tfds(local_boolq: Path) -> None:
    """Breaks when a module of TFDS still reaches for TensorFlow, or a fake one is installed."""
    import tensorflow_datasets.text.super_glue as module

    before = vars(module)["tf"]
    splits = {
        s: read_tfds(BOOLQ, s, Columns(("question",))) for s in ("train", "validation", "test")
    }
    assert {name: len(records) for name, records in splits.items()} == {
        "train": 4,
        "validation": 3,
        "test": 2,
    }
    assert sorted(r["label"] for r in splits["train"]) == ["False", "False", "False", "True"]
    assert "tensorflow" not in sys.modules
    assert vars(module)["tf"] is before


def test_a_download_without_a_network_fails_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Breaks when TFDS's ten retries, 200 seconds, or any come before the message; or none has a
    timeout.

    Nothing listens at the address.
    """
    import requests
    import tensorflow_datasets.text.super_glue as module

    config = next(c for c in module.SuperGlue.BUILDER_CONFIGS if c.name == "boolq")
    monkeypatch.setattr(config, "data_url", "http://127.0.0.1:9/BoolQ.zip")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    timeouts, get = [], requests.Session.get

    def spied(*arguments: Any, **options: Any) -> Any:
        timeouts.append(options.get("timeout"))
        return get(*arguments, **options)

    monkeypatch.setattr(requests.Session, "get", spied)
    started = time.monotonic()
    with pytest.raises(UserError, match=f"super_glue/boolq.*127.0.0.1.*copy.* to {tmp_path}"):
        read_tfds(BOOLQ, "train", Columns(("question",)))
    assert time.monotonic() - started < 10
    assert timeouts == [TIMEOUT]
    assert not [line for line in caplog.messages if "Retrying" in line]


def test_failed_preparation_is_one_line_and_leaves_nothing(local_boolq: Path) -> None:
    local_boolq.unlink()
    with pytest.raises(
        UserError, match="could not prepare TFDS dataset super_glue/boolq"
    ) as caught:
        read_tfds(BOOLQ, "train", Columns(("question",)))
    assert "\n" not in str(caught.value)
    assert not list((local_boolq.parent / "cache").rglob("dataset_info.json"))
