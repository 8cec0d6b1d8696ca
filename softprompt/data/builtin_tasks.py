"""The tasks that are known by name, and the task that a config describes.

Source: Lester et al. 2021 (arXiv 2104.08691), sections 3 and 5 and Table 7, for the paper's sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from softprompt.data import row_forms
from softprompt.data.sources import FORMATS
from softprompt.data.tasks import DEVELOPMENT, HIDDEN_TEST, ONE_FILE, OWN_SPLITS, TEST_ONLY, Task
from softprompt.errors import UserError, nearest, unknown


def _snippets(config: str, name: str, about: str) -> Task:
    """A sentiment task. All four share a template, so a prompt for one can be tried on another."""
    return Task(
        name=name,
        source=f"tfds:snippet_sentiment/{config}:1.0.0",
        template="Review: {text}\nSentiment:",
        verbalizers={"negative": " negative", "positive": " positive"},
        about=about,
    )


def _verses(config: str, about: str) -> Task:
    """A paraphrase task. Both share a template, so a prompt for one can be tried on the other."""
    return Task(
        name=f"{config}_verses",
        source=f"tfds:verse_pairs/{config}:1.0.0",
        template="Verse 1: {sentence1}\nVerse 2: {sentence2}\nSame verse:",
        verbalizers={"different": " no", "same": " yes"},
        about=about,
        positive="same",
        reported=("f1", "accuracy"),
    )


def _catalogue(
    name: str, dataset: str, template: str, labels: Sequence[str] = (), **more: Any
) -> Task:
    """A task of TFDS's catalogue, with the labels' names as verbalizers, as in the paper."""
    return Task(
        name=name,
        source=f"tfds:{dataset}",
        template=template,
        verbalizers={label: f" {label}" for label in labels},
        splits=HIDDEN_TEST,
        about=f"TFDS {dataset}; test is its development set, validation a tenth of train",
        **{"reported": ("accuracy",), **more},
    )


_ANSWER = "{context}\nQuestion: {question}\nAnswer:"
_T5_ANSWER = {
    "template": "question: {question} context: {context}",
    "clean": row_forms.space_punctuation,
}
_MRQA = "https://s3.us-east-2.amazonaws.com/mrqa/release/v2/dev"


def _mrqa(name: str, file: str, count: int, url: str = "") -> Task:
    """A set of MRQA 2019 from another domain than SQuAD's: its development file is the test."""
    return Task(
        name=f"mrqa_{name}",
        source=f"mrqa:{{cache}}/mrqa/{file}.jsonl.gz",
        template=_ANSWER,
        verbalizers={},
        splits=TEST_ONLY,
        label_field="answers",
        id_field="qid",
        about=f"MRQA's {file}, {count:,} questions to test on; its file is to be downloaded",
        reported=("exact_match", "f1"),
        t5=_T5_ANSWER,
        counts=(0, count),
        url=url or f"{_MRQA}/{file}.jsonl.gz",
    )


_PREMISE = "Premise: {premise}\nHypothesis: {hypothesis}\nRelation:"

_TASKS = (
    _snippets("movie", "movie_sentiment", "sentiment of movie snippets, 2 classes"),
    _snippets("amazon", "amazon_sentiment", "sentiment of product review sentences, 2 classes"),
    _snippets("tweets", "tweets_sentiment", "sentiment of tweets, 2 classes"),
    _snippets("nyt", "nyt_sentiment", "sentiment of editorial sentences, 2 classes"),
    Task(
        name="sarcasm",
        source="tfds:sarcastic_headlines:1.0.0",
        template="Headline: {text}\nSarcastic:",
        verbalizers={"serious": " no", "sarcastic": " yes"},
        about="sarcastic or serious headlines, 2 classes",
    ),
    Task(
        name="sms_spam",
        source="tfds:sms_spam:1.0.0",
        template="Message: {text}\nSpam:",
        verbalizers={"ham": " no", "spam": " yes"},
        about="spam among text messages, 2 classes, 13 % spam",
    ),
    Task(
        name="question_type",
        source="tfds:question_type:1.0.0",
        template="Question: {text}\nAnswer type:",
        verbalizers={
            "abbreviation": " abbreviation",
            "description": " description",
            "entity": " entity",
            "human": " person",
            "location": " location",
            "number": " number",
        },
        about="what kind of answer a question asks for, 6 classes",
    ),
    _verses("law", "the same Bible verse in two translations or not, books of Moses, 2 classes"),
    _verses("gospel", "the same Bible verse in two translations or not, Gospels, 2 classes"),
    _catalogue(
        "sst2", "glue/sst2:2.0.0", "Review: {sentence}\nSentiment:", ["negative", "positive"]
    ),
    _catalogue(
        "mrpc",
        "glue/mrpc:2.0.0",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nRelation:",
        ["equivalent", "not_equivalent"],
        positive="equivalent",
        reported=("f1", "accuracy"),
        counts=(3668, 408),
    ),
    _catalogue(
        "qqp",
        "glue/qqp:2.0.0",
        "Question 1: {question1}\nQuestion 2: {question2}\nRelation:",
        ["duplicate", "not_duplicate"],
        positive="duplicate",
        reported=("f1", "accuracy"),
        counts=(363_849, 40_430),
    ),
    _catalogue(
        "glue_rte",
        "glue/rte:2.0.0",
        "Premise: {sentence1}\nHypothesis: {sentence2}\nRelation:",
        ["entailment", "not_entailment"],
    ),
    _catalogue(
        "rte",
        "super_glue/rte:1.0.2",
        _PREMISE,
        ["entailment", "not_entailment"],
        t5={"template": "hypothesis: {hypothesis} premise: {premise}"},
        counts=(2490, 277),
    ),
    _catalogue(
        "cb",
        "super_glue/cb:1.0.2",
        _PREMISE,
        ["entailment", "contradiction", "neutral"],
        reported=("macro_f1", "accuracy"),
        t5={"template": "hypothesis: {hypothesis} premise: {premise}"},
        counts=(250, 56),
    ),
    _catalogue(
        "boolq",
        "super_glue/boolq:1.0.2",
        "Passage: {passage}\nQuestion: {question}\nAnswer:",
        ["False", "True"],
        counts=(9427, 3270),
    ),
    _catalogue(
        "copa",
        "super_glue/copa:1.0.2",
        "Premise: {premise}\nchoice1: {choice1}\nchoice2: {choice2}\n"
        "Which is the {question} of the premise?",
        ["choice1", "choice2"],
        t5={
            "template": "choice1: {choice1} choice2: {choice2} premise: {premise} "
            "question: {question}"
        },
        counts=(400, 100),
    ),
    _catalogue(
        "wic",
        "super_glue/wic:1.0.2",
        "Sentence 1: {sentence1}\nSentence 2: {sentence2}\nThe word {word} means the same in both:",
        ["False", "True"],
        counts=(5428, 638),
    ),
    _catalogue(
        "multirc",
        "super_glue/multirc:1.0.2",
        "Paragraph: {paragraph}\nQuestion: {question}\nAnswer: {answer}\nIs the answer right?",
        ["False", "True"],
        clean=row_forms.without_markup,
        group_field="idx.question",
        positive="True",
        reported=("f1", "group_match"),
        t5={"template": "question: {question} answer: {answer} paragraph: {paragraph}"},
        counts=(27_243, 4848),
    ),
    _catalogue(
        "record",
        "super_glue/record:1.0.2",
        "Passage: {passage}\nEntities: {entities}\nQuery: {query}\n@placeholder is",
        clean=row_forms.join_highlights,
        label_field="answers",
        candidates_field="entities",
        reported=("exact_match", "f1"),
        expand_record=row_forms.one_per_answer,
        words=("commonsense", "reasoning", "reading", "comprehension"),
        t5={"template": "query: {query} entities: {entities} passage: {passage}"},
        counts=(100_730, 10_000),
    ),
    _catalogue(
        "wsc",
        "super_glue/wsc.fixed:1.0.2",
        "{text}\nThe word between asterisks stands for",
        transform_row=row_forms.mark_pronoun,
        label_field="referent",
        correct_field="correct",
        expand_record=row_forms.only_correct,
        words=("commonsense", "pronoun", "resolution"),
        t5={"template": "{text}"},
        counts=(554, 104),
    ),
    _catalogue(
        "squad",
        "squad/v1.1:3.0.0",
        _ANSWER,
        label_field="answers.text",
        id_field="id",
        reported=("exact_match", "f1"),
        t5=_T5_ANSWER,
        counts=(87_599, 10_570),
    ),
    _mrqa("bioasq", "BioASQ", 1504, "http://participants-area.bioasq.org/MRQA2019/"),
    _mrqa("drop", "DROP", 1503),
    _mrqa("duorc", "DuoRC.ParaphraseRC", 1501),
    _mrqa("race", "RACE", 674),
    _mrqa("re", "RelationExtraction", 2948),
    _mrqa("textbookqa", "TextbookQA", 1503),
)


def _with_development(task: Task) -> list[Task]:
    """A task, and for catalogue data also "NAME_dev", which selects as the paper does."""
    if task.splits is not HIDDEN_TEST:
        return [task]
    about = f"{task.name}, selected and reported on its development set as in the paper"
    return [task, replace(task, name=f"{task.name}_dev", splits=DEVELOPMENT, about=about)]


TASKS: dict[str, Task] = {task.name: task for first in _TASKS for task in _with_development(first)}


def get_task(config: Mapping[str, Any]) -> Task:
    """Returns the task that a config's `task` section describes.

    With a `source` it is a task over the user's own data: a free-text task unless the config has
    verbalizers. Otherwise it is the built-in task of that name, in the form of `form`; a template
    or verbalizers of the config replace the task's.

    Args:
        config: the keys of the section `task`.

    Raises:
        UserError: the name or source is unknown, or the template or verbalizers cannot be used.
    """
    verbalizers = dict(config["verbalizers"])
    if config["source"]:
        task = _own_task(config, verbalizers)
    elif config["name"] not in TASKS:
        raise unknown("task", config["name"], TASKS)
    else:
        task = TASKS[config["name"]]
        for key in ("label_field", "id_field", "group_field", "candidates_field"):
            if config[key] != (usual := getattr(Task, key)):
                raise UserError(
                    f"config key 'task.{key}' is {config[key]!r}; allowed: {usual!r} without a "
                    "task.source"
                )
        if config["form"] == "t5":
            task = task.in_t5_form()
        template = config["template"] or task.template
        task = replace(task, template=template, verbalizers=verbalizers or task.verbalizers)
    _check(task)
    return task


def _own_task(config: Mapping[str, Any], verbalizers: dict[str, str]) -> Task:
    """The task over a user's own data."""
    name, source = config["name"], config["source"]
    if name in TASKS:
        raise UserError(f"task.name {name!r} is a built-in task; give own data a name of its own")
    kind, _, path = source.partition(":")
    if kind not in (*FORMATS, "tfds") or not path:
        allowed = ", ".join(f"{form}:PATH" for form in FORMATS)
        raise UserError(
            f"task.source {source!r}{nearest(kind, FORMATS)}; allowed: {allowed} or tfds:NAME"
        )
    if config["form"] != "prose":
        raise UserError(
            f"config key 'task.form' is {config['form']!r}; allowed: 'prose' with a task.source, "
            "whose text is task.template"
        )
    if verbalizers and config["candidates_field"]:
        raise UserError(
            f"config key 'task.candidates_field' is {config['candidates_field']!r}; allowed: '' "
            "with task.verbalizers, which are the candidates"
        )
    return Task(
        name=name,
        source=source,
        template=config["template"],
        verbalizers=verbalizers,
        splits=OWN_SPLITS if kind == "tfds" or "{split}" in path else ONE_FILE,
        label_field=config["label_field"],
        id_field=config["id_field"],
        group_field=config["group_field"],
        candidates_field=config["candidates_field"],
    )


def _check(task: Task) -> None:
    """Checks what can be known of template and verbalizers without the data."""
    if not task.fields and task.verbalizers:
        raise UserError(f"template {task.template!r} of task {task.name!r} names no {{field}}")
    for name in task.fields:
        said = f"template {task.template!r} of task {task.name!r} names {{{name}}}"
        if name == task.label_field:
            raise UserError(f"{said}, which is the label; allowed: fields of the input")
        own = {"answers": not task.verbalizers, "group": bool(task.group_field)}
        own |= {"candidates": bool(task.candidates_field), "correct": bool(task.correct_field)}
        reserved = {"id", "label", *(part for part, used in own.items() if used)}
        if name in reserved - {task.id_field, task.group_field}:
            raise UserError(f"{said}, as records call their own {name}; allowed: another name")
    targets = list(task.verbalizers.values())
    for label, target in task.verbalizers.items():
        if not target.strip():
            raise UserError(f"verbalizer of label {label!r} is {target!r}; expected some text")
        if targets.count(target) > 1:
            raise UserError(f"verbalizer {target!r} stands for more than one label")
    if len(targets) == 1:
        raise UserError(f"task {task.name!r} has one verbalizer, {targets[0]!r}; expected two")
