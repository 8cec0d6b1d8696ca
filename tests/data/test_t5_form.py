"""The paper's sets in T5's form, from lines of their released files: exact texts, by hand."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from softprompt.config import base_config
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.data.row_forms import (
    join_highlights,
    mark_pronoun,
    space_punctuation,
    without_markup,
)
from softprompt.data.splits import read_split
from softprompt.errors import UserError
from tests.data.released import in_form, jsonl, mock, texts, tsv

__all__ = ["mock"]  # a fixture

MULTIRC = {
    "idx": 4,
    "passage": {
        "text": "<b>Sent 1: </b>A dog ran.<br><b>Sent 2: </b>It barked.",
        "questions": [
            {
                "question": "Who ran?",
                "idx": 9,
                "answers": [
                    {"text": "A <b>dog</b>", "idx": 20, "label": 1},
                    {"text": "A cat", "idx": 21, "label": 0},
                ],
            }
        ],
    },
}
RECORD = {
    "idx": 3,
    "passage": {
        "text": 'Ann met Bo. "Hi"\n@highlight\nAnn left\n@highlight\nBo stayed!\n@highlight\nEnd',
        "entities": [{"start": 8, "end": 9}, {"start": 0, "end": 2}, {"start": 28, "end": 30}],
    },
    "qas": [
        {
            "idx": 7,
            "query": "@placeholder was there.",
            "answers": [
                {"start": 8, "end": 9, "text": "Bo"},
                {"start": 0, "end": 2, "text": "Ann"},
                {"start": 28, "end": 30, "text": "Ann"},
            ],
        }
    ],
}
WSC = {
    "idx": 1,
    "text": "Mitchell asked Tom if he could lend some money.",
    "target": {"span1_index": 2, "span1_text": "Tom", "span2_index": 4, "span2_text": "he"},
}
PASSAGE = 'Ann met Bo. "Hi" Ann left. Bo stayed! End'
SQUAD = {
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "It's \"Zoé's\" U.S.-made, 3.5 m bridge.",
                    "qas": [
                        {
                            "id": "5a-b",
                            "question": " What's  3.5 m?",
                            "answers": [
                                {"text": "U.S.-made", "answer_start": 13},
                                {"text": "bridge", "answer_start": 29},
                            ],
                        }
                    ],
                }
            ],
        }
    ]
}
SQUAD_INPUT = (
    "question: What ' s 3 . 5 m ? context: It ' s \" Zo é ' s \" U . S . - made , 3 . 5 m bridge ."
)

# name -> lines of the released file, the text before the target in T5's form, and the target.
EXAMPLES: dict[str, tuple[str, list[tuple[str, str]]]] = {
    "boolq": (
        jsonl({"question": "is it so", "passage": "It -- is so.", "label": True, "idx": 0}),
        [("passage: It -- is so. question: is it so", " True")],
    ),
    "cb": (
        jsonl({"premise": "A is B.", "hypothesis": "B is A", "label": "neutral", "idx": 0}),
        [("hypothesis: B is A premise: A is B.", " neutral")],
    ),
    "rte": (
        jsonl({"premise": "P.", "hypothesis": "H.", "label": "not_entailment", "idx": 0}),
        [("hypothesis: H. premise: P.", " not_entailment")],
    ),
    "copa": (
        jsonl(
            {"premise": "It fell.", "choice1": "It broke.", "choice2": "It flew."}
            | {"question": "effect", "label": 0, "idx": 0}
        ),
        [("choice1: It broke. choice2: It flew. premise: It fell. question: effect", " choice1")],
    ),
    "wic": (
        jsonl(
            {"word": "feel", "sentence1": "I feel.", "sentence2": "It felt.", "idx": 0}
            | {"label": False, "start1": 2, "end1": 6, "start2": 3, "end2": 7}
        ),
        [("sentence1: I feel. sentence2: It felt. word: feel", " False")],
    ),
    "multirc": (
        jsonl(MULTIRC),
        [
            (
                f"question: Who ran? answer: A {answer} "
                "paragraph: Sent 1: A dog ran. Sent 2: It barked.",
                label,
            )
            for answer, label in (("dog", " True"), ("cat", " False"))
        ],
    ),
    "record": (
        jsonl(RECORD),
        [(f"query: @placeholder was there. entities: Ann, Bo passage: {PASSAGE}", " Ann")],
    ),
    "wsc": (
        jsonl(WSC | {"label": False}),
        [("Mitchell asked Tom if *he* could lend some money.", " Tom")],
    ),
    "sst2": (
        tsv(("sentence", "label"), ("a fine film", "1")),
        [("sentence: a fine film", " positive")],
    ),
    "qqp": (
        tsv(
            ("id", "qid1", "qid2", "question1", "question2", "is_duplicate"),
            ("0", "1", "2", "Why?", "How so?", "1"),
        ),
        [("question1: Why? question2: How so?", " duplicate")],
    ),
    "mrpc": (
        tsv(
            ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"),
            ("0", "1", "2", 'He "said" so.', "He went."),
        ),
        [('sentence1: He "said" so. sentence2: He went.', " not_equivalent")],
    ),
    "squad": (json.dumps(SQUAD), [(SQUAD_INPUT, " U . S . - made")]),
}
PAPER = [name for name, task in TASKS.items() if task.counts and not name.endswith("_dev")]


def test_every_set_of_the_paper_is_here() -> None:
    """Breaks when a set has no example below."""
    assert {name for name in PAPER if not name.startswith("mrqa_")} | {"sst2"} == EXAMPLES.keys()
    assert sum(name.startswith("mrqa_") for name in PAPER) == 6


@pytest.mark.parametrize("name", EXAMPLES)
def test_input_and_target_are_t5s(name: str, mock: Callable[..., None]) -> None:
    """Derived by hand from T5's preprocessors. Breaks when a field moves, markup or a highlight
    stays, or punctuation is not spaced out."""
    lines, expected = EXAMPLES[name]
    mock(lines)
    assert texts(in_form(name)) == texts(in_form(f"{name}_dev")) == expected
    prose = in_form(name, "prose")
    assert prose.template == TASKS[name].template != in_form(name).template
    assert [target for _, target in texts(prose)] == [
        " U.S.-made" if name == "squad" else target for _, target in expected
    ]


def test_own_data_may_be_any_set_of_tfds(mock: Callable[..., None]) -> None:
    """Breaks when a sequence or a dict of a set becomes its spelling in Python, or a set without a
    label, which is for tests alone, cannot be read."""
    own = {"name": "mine", "source": "tfds:super_glue/record:1.0.2", "template": "{entities}|"}
    own |= {"label_field": "answers", "group_field": "idx.passage"}
    mock(jsonl(RECORD))
    (record,) = read_split(get_task({**base_config().task.to_dict(), **own}), "test")
    assert (record["entities"], record["answers"]) == ("Ann, Bo", ("Ann", "Bo"))
    assert (record["label"], record["group"]) == ("Ann", "3")
    own |= {"label_field": "", "group_field": ""}
    (record,) = read_split(get_task({**base_config().task.to_dict(), **own}), "test")
    assert (record["label"], record["answers"]) == (None, ())
    mock(json.dumps(SQUAD))
    own |= {"source": "tfds:squad/v1.1:3.0.0", "template": "{title}", "label_field": "answers.text"}
    (record,) = read_split(get_task({**base_config().task.to_dict(), **own}), "test")
    assert (record["id"], record["answers"]) == ("test-0", ("U.S.-made", "bridge"))
    assert read_split(TASKS["squad"], "test")[0]["id"] == "5a-b"
    own["label_field"] = "answers"
    with pytest.raises(UserError, match="example 'test-0': field 'answers' is .*expected text"):
        read_split(get_task({**base_config().task.to_dict(), **own}), "test")


def test_training_examples_of_record_and_wsc(mock: Callable[..., None]) -> None:
    """Breaks when ReCoRD trains on one answer, or WSC on wrong referents."""
    mock(jsonl(RECORD))
    train, test = (read_split(in_form("record_dev"), split) for split in ("train", "test"))
    assert [(one["id"], one["label"]) for one in train] == [("train-0", "Ann"), ("train-0-2", "Bo")]
    assert [one["answers"] for one in (*train, *test)] == [("Ann", "Bo")] * 3
    assert [one["candidates"] for one in test] == [("Ann", "Bo")]
    mock(jsonl(WSC | {"label": True}, WSC | {"label": False}))
    train, test = (read_split(in_form("wsc_dev"), split) for split in ("train", "test"))
    assert [one["correct"] for one in train] == [True]
    assert [one["correct"] for one in test] == [True, False]


def test_answers_of_a_question_have_a_group_and_stay_together(mock: Callable[..., None]) -> None:
    """Breaks when the tenth of train that validates takes some of a question's answers."""
    passages = []
    for number in range(20):
        one = json.loads(json.dumps(MULTIRC))
        one["idx"] = one["passage"]["questions"][0]["idx"] = number
        passages.append(one)
    mock(jsonl(*passages))
    train, held = (read_split(TASKS["multirc"], split) for split in ("train", "validation"))
    assert {one["group"] for one in train}.isdisjoint(one["group"] for one in held)
    assert (len(train), len(held)) == (36, 4)


MRQA = {
    "context": SQUAD["data"][0]["paragraphs"][0]["context"],  # type: ignore[index]
    "context_tokens": [["It", 0]],
    "qas": [
        {
            "qid": "q-1",
            "question": " What's  3.5 m?",
            "answers": ["U.S.-made", "bridge"],
            "detected_answers": [{"text": "U.S.-made", "char_spans": [[13, 21]]}],
        }
    ],
}


def test_mrqa_is_read_from_its_released_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when the header is an example, or a test-only set is trained on."""
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    task = in_form("mrqa_drop")
    with pytest.raises(UserError, match=f"no file {tmp_path}/mrqa/DROP.jsonl.gz; download it from"):
        read_split(task, "test")
    (tmp_path / "mrqa").mkdir()
    lines = jsonl({"header": {"dataset": "DROP", "split": "dev"}}, MRQA)
    (tmp_path / "mrqa" / "DROP.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert texts(task) == [(SQUAD_INPUT, " U . S . - made")]
    (record,) = read_split(task, "test")
    assert (record["id"], record["answers"]) == ("q-1", ("U . S . - made", "bridge"))
    with pytest.raises(UserError, match="'mrqa_drop' has no train split; allowed: test"):
        read_split(task, "train")
    (tmp_path / "mrqa" / "DROP.jsonl.gz").write_bytes(b"\x1f\x8b not gzip")
    with pytest.raises(UserError, match="cannot read .*DROP.jsonl.gz"):
        read_split(task, "test")


def test_own_files_may_be_mrqas(tmp_path: Path) -> None:
    """Breaks when a line without questions is a traceback."""
    (tmp_path / "a.jsonl").write_text(jsonl(MRQA, {"context": "x"}))
    own = {"name": "mine", "source": f"mrqa:{tmp_path}/a.jsonl", "template": "{context} {question}"}
    task = get_task({**base_config().task.to_dict(), **own, "label_field": "answers"})
    with pytest.raises(UserError, match=r"a.jsonl:2: has no 'context' and 'qas'"):
        read_split(task, "train")


def test_text_rules_by_hand() -> None:
    """Breaks when a rule changes more than T5's does."""
    assert without_markup("a<br>b<b>c</b> <i>d</i>") == "a bc <i>d</i>"
    assert join_highlights("A\n@highlight\nB.\n@highlight\nC'\n@highlight\n") == "A. B. C' "
    assert space_punctuation(" a_b-c  ü9.\n") == "a_b - c ü 9 ."
    assert space_punctuation("") == ""
    assert space_punctuation("a\u00a0b\tc") == "a \u00a0 b c"
    row = {"span1_text": "S", "label": "True", "text": 'Good for him," he said. '}
    assert mark_pronoun(row | {"span2_text": "him", "span2_index": "2"})["text"] == (
        'Good for *him* ," he said.'
    )
    row["text"] = "want to use it , but"
    moved = mark_pronoun(row | {"span2_text": "it", "span2_index": "2"})
    assert moved == {"text": "want to use *it* , but", "referent": "S", "correct": "True"}
    with pytest.raises(UserError, match="word 0 of 'want to use it , but' is not 'it'"):
        mark_pronoun(row | {"span2_text": "it", "span2_index": "0"})


def test_t5s_form_of_a_set_without_one_is_its_fields() -> None:
    """Breaks when a set of this library has no T5 form, or own data loses its template to it."""
    assert in_form("sms_spam").template == "text: {text}"
    assert in_form("sms_spam").exact and not in_form("sms_spam", "prose").exact
    own = {"name": "mine", "source": "jsonl:x", "template": "{a}", "form": "t5"}
    with pytest.raises(UserError, match="'task.form' is 't5'; allowed: 'prose' with a task.source"):
        get_task({**base_config().task.to_dict(), **own})
    given = {"name": "boolq", "form": "t5", "template": "{question}"}
    mine = get_task({**base_config().task.to_dict(), **given})
    assert replace(mine, template=in_form("boolq").template) == in_form("boolq")
