"""How rows of the paper's data sets become the texts that T5 reads, and records become examples.

Source: preprocessors.py of google-research/text-to-text-transfer-transformer (glue, record,
wsc_simple, squad), which google-research/prompt-tuning uses without the leading task word.
"""

import re

from softprompt.data.sources import Record, Row
from softprompt.errors import UserError


def without_markup(text: str) -> str:
    """Returns a text of MultiRC with spaces for line breaks, and without bold type."""
    return re.sub("</?b>", "", text.replace("<br>", " "))


def join_highlights(passage: str) -> str:
    """Returns a passage of ReCoRD whose highlights are sentences: each ends with a full stop."""
    ended = re.sub(r"([.?!\"'])\n@highlight\n", r"\1 ", passage)
    return ended.replace("\n@highlight\n", ". ")


def space_punctuation(text: str) -> str:
    """Returns a text with a space on both sides of everything but ASCII letters, digits and "_".

    As in T5's pattern language, accented letters are not letters. Spaces at the ends, which T5's
    tokenizer drops, are left out.
    """
    spaced = re.sub(r"(\W)", r" \1 ", text, flags=re.ASCII)
    return re.sub(r"\s+", " ", spaced, flags=re.ASCII).strip(" ")


def mark_pronoun(row: Row) -> Row:
    """Returns a row of WSC with its pronoun between asterisks in `text`.

    Two of its rows are known to have the index of the word before, or a word with punctuation.

    Fields: `text`, `referent` (the noun phrase, which T5 generates), and `correct` ("True" or
    "False", None where it is hidden): whether the pronoun refers to it.

    Raises:
        UserError: the pronoun is not at its index.
    """
    words, index, pronoun = row["text"].split(" "), int(row["span2_index"]), row["span2_text"]
    for number, word in enumerate(words[index : index + 2], index):
        rest = word.removeprefix(pronoun)
        if word.startswith(pronoun) and not rest[:1].isalnum():
            words[number] = f"*{pronoun}* {rest}".rstrip()
            marked = " ".join(words).strip()
            return {"text": marked, "referent": row["span1_text"], "correct": row["label"]}
    raise UserError(f"word {index} of {row['text']!r} is not {pronoun!r}, its span2_text")


def one_per_answer(record: Record) -> list[Record]:
    """Returns a record of a free-text task once for each of its answers, which is its label."""
    key, answers = record["id"], record["answers"]
    return [
        record | {"id": f"{key}-{number}" if number > 1 else key, "label": answer}
        for number, answer in enumerate(dict.fromkeys(answers), 1)
    ]


def only_correct(record: Record) -> list[Record]:
    """Returns the record if its answer is the right one."""
    return [record] if record["correct"] else []
