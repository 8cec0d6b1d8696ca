import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from softprompt.data.builtin_tasks import TASKS
from softprompt.data.encode import check_ranking, encode, mix, summary, target_advice
from softprompt.data.subsets import check_digests, records_digest
from softprompt.data.tasks import Task
from softprompt.errors import UserError
from softprompt.pretrained.tokenizer import Tokenizer

SENTENCES = [
    "Review: a warm, funny film that never loses its way.\nSentiment: positive",
    "Premise: the plot is thin.\n\nHypothesis: the plot is a mess.\nRelation: negative",
] * 3


def tokenizer(*, trim: bool = False, specials: bool = True) -> Tokenizer:
    """A byte-level BPE with a few merges; `trim` leaves leading spaces out of the offsets."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if trim:
        backend.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    bos, eos = (0, 1) if specials else (None, None)
    return Tokenizer(backend=backend, bos_id=bos, eos_id=eos, add_bos=specials)


PLAIN, TRIMMED = tokenizer(), tokenizer(trim=True)
MOVIE = TASKS["movie_sentiment"]
PAIR = replace(MOVIE, template="Premise: {a}\n\nHypothesis: {b}\nRelation:")
FREE = replace(MOVIE, verbalizers={})


def run(records: Any, task: Task = MOVIE, tokens: Tokenizer = PLAIN, **options: Any) -> Any:
    settings = {"max_input": 64, "max_target": 8, "bos": False, "eos": False}
    return encode(records, task, tokens, **(settings | options))


def movie(*texts: str, label: str | None = "positive") -> list[dict[str, Any]]:
    return [{"id": f"test-{n}", "text": text, "label": label} for n, text in enumerate(texts)]


def test_input_is_the_template_and_target_the_verbalizer() -> None:
    encoded = run([*movie("fine"), *movie("bad", label="negative"), *movie("so", label=None)])
    assert PLAIN.decode(encoded.inputs[0]) == "Review: fine\nSentiment:"
    assert [PLAIN.decode(tokens) for tokens in encoded.candidates] == [" negative", " positive"]
    assert [PLAIN.decode(tokens) for tokens in encoded.targets] == [" positive", " negative", ""]
    assert encoded.labels.tolist() == [1, 0, -1]
    assert encoded.inputs[0].dtype == encoded.targets[2].dtype == encoded.labels.dtype == np.int32


def test_bos_begins_inputs_and_eos_ends_targets_and_candidates() -> None:
    plain, special = run(movie("fine")), run(movie("fine"), bos=True, eos=True)
    assert special.inputs[0].tolist() == [0, *plain.inputs[0]]
    assert special.targets[0].tolist() == [*plain.targets[0], 1]
    assert [c.tolist() for c in special.candidates] == [[*c, 1] for c in plain.candidates]


def test_tokenizer_without_bos_is_a_user_error() -> None:
    bare = tokenizer(specials=False)
    with pytest.raises(UserError, match="no BOS"):
        run(movie("fine"), tokens=bare, bos=True)
    with pytest.raises(UserError, match="no EOS"):
        run(movie("fine"), tokens=bare, eos=True)


TEXT = st.text(st.sampled_from("ab .\n\u00e9\u20ac\U0001f600 lm"), max_size=60)


@pytest.mark.parametrize("tokens", [PLAIN, TRIMMED], ids=["offsets", "trimmed offsets"])
@given(text=TEXT, room=st.integers(0, 50), bos=st.booleans())
def test_cut_input_keeps_the_template_and_a_beginning_of_the_field(
    tokens: Tokenizer, text: str, room: int, bos: bool
) -> None:
    """Breaks when the input's end is cut, a piece of the template goes or a character is split.

    For instance when `_tokens_to_keep` loses its last loop.
    """
    limit = len(run(movie(""), tokens=tokens, bos=bos).inputs[0]) + room
    encoded = run(movie(text), tokens=tokens, max_input=limit, bos=bos)
    (tokens_T,) = encoded.inputs
    whole = run(movie(text), tokens=tokens, max_input=10_000, bos=bos).inputs[0]
    assert len(tokens_T) <= limit
    assert encoded.truncated == (len(whole) > limit)
    decoded = tokens.decode(tokens_T[bos:])
    assert decoded.startswith("Review: ") and decoded.endswith("\nSentiment:")
    middle = decoded.removeprefix("Review: ").removesuffix("\nSentiment:")
    # A token that holds the field's last white space and the template's line break stays.
    cuts = [n for n in range(len(middle) + 1) if not middle[n:].strip()]
    assert any(text.startswith(middle[:n]) and text.endswith(middle[n:]) for n in cuts)
    rest = iter(whole.tolist())
    assert all(token in rest for token in tokens_T.tolist()), "tokens are dropped, never changed"


def test_exactly_as_much_is_cut_as_needed() -> None:
    """Breaks when `over` is off by one."""
    words = " ".join(f"w{n}" for n in range(40))
    whole = len(run(movie(words), max_input=10_000).inputs[0])
    for limit in range(20, whole + 2):
        encoded = run(movie(words), max_input=limit)
        assert len(encoded.inputs[0]) == min(limit, whole)
        assert encoded.truncated == (limit < whole)


def test_longest_fields_are_cut_in_equal_measure() -> None:
    """Breaks when the last field, or every field, is cut instead of the longest."""
    long, short = "x" * 60, "y" * 5
    for a, b in ((long, short), (short, long)):
        (tokens_T,) = run([{"id": "0", "a": a, "b": b, "label": None}], PAIR).inputs
        decoded = PLAIN.decode(tokens_T)
        assert short in decoded and long not in decoded and decoded.endswith("\nRelation:")
    (tokens_T,) = run([{"id": "0", "a": long, "b": "y" * 60, "label": None}], PAIR).inputs
    decoded = PLAIN.decode(tokens_T).replace("Hypothesis", "")
    assert abs(decoded.count("x") - decoded.count("y")) <= 1 and len(tokens_T) == 64


def test_template_that_does_not_fit_names_the_example() -> None:
    with pytest.raises(
        UserError, match=r"example 'test-1': the template alone takes .*max_input is 5"
    ):
        run([*movie(""), *movie("", "a long text")][2:], max_input=5)


@pytest.mark.parametrize("tokens", [PLAIN, TRIMMED], ids=["offsets", "trimmed offsets"])
def test_token_with_a_space_of_the_template_is_not_cut(tokens: Tokenizer) -> None:
    """Breaks when `_inside` trusts offsets from which spaces were trimmed: "Review:" loses one."""
    template = len(run(movie(""), tokens=tokens).inputs[0])
    (tokens_T,) = run(movie("a b"), tokens=tokens, max_input=template).inputs
    assert tokens.decode(tokens_T) == "Review: a\nSentiment:"
    with pytest.raises(UserError, match=f"takes {template} tokens"):
        run(movie("a b"), tokens=tokens, max_input=template - 1)


def test_target_is_never_cut() -> None:
    """Breaks when a target longer than max_target is shortened."""
    task = replace(MOVIE, verbalizers={"negative": " negative", "positive": " 123"})
    with pytest.raises(UserError, match="verbalizer ' 123' has .*max_target is 2"):
        run(movie("fine"), task, max_target=2)
    with pytest.raises(UserError, match="target of example 'test-0' has .*max_target is 8"):
        run(movie("fine", label="x" * 9), FREE)


def test_free_text_has_targets_and_answers_and_no_candidates() -> None:
    """Breaks when another answer than the first is the target, or only the target is right."""
    answers = ("a mess", "mess")
    records = [{**movie("What?", label="a mess")[0], "answers": answers}, *movie("x", label=None)]
    encoded = run(records, FREE)
    assert [PLAIN.decode(ids) for ids in encoded.targets] == [" a mess", ""]
    assert encoded.answers == (answers, ())
    assert encoded.candidates == () and encoded.labels.tolist() == [-1, -1]
    assert run(movie("fine")).answers == ()
    mixed = mix({"labels": run(movie("fine")), "free": encoded})
    assert mixed.answers == ((), answers, ()) and mixed.labels.tolist() == [1, -1, -1]


def test_verbalizers_of_equal_tokens_are_a_user_error() -> None:
    lower = tokenizer()
    from tokenizers import normalizers

    lower.backend.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="two of its verbalizers have the same tokens"):
        run(movie("x"), replace(MOVIE, verbalizers={"negative": " A", "positive": " a"}), lower)


def test_a_verbalizer_that_goes_on_from_another_needs_eos_or_the_mean() -> None:
    """Breaks when a class that a sum can never choose is scored without a word."""
    task = replace(MOVIE, verbalizers={"negative": " xy", "positive": " x"})
    with pytest.raises(UserError, match=r"'negative' begins with that of 'positive'.*task.eos"):
        check_ranking(run(movie("x"), task), "sum")
    check_ranking(run(movie("x"), task), "mean")
    check_ranking(run(movie("x"), task, eos=True), "sum")
    check_ranking(run(movie("x")), "sum")


def test_targets_that_suit_the_config_badly_are_said() -> None:
    """Breaks when EOS counts as a label's token, equal lengths or a mean give advice, or unequal
    ones or answers without an end give none."""
    task = replace(MOVIE, verbalizers={"negative": " x", "positive": " xyz"})
    assert "have 2 to 4 tokens" in target_advice(run(movie("x"), task, eos=True), "sum")
    assert target_advice(run(movie("x"), task), "mean") == ""
    even = replace(MOVIE, verbalizers={"negative": " xyz", "positive": " qjk"})
    assert target_advice(run(movie("x"), even), "sum") == ""
    assert "task.eos=True" in target_advice(run(movie("x"), FREE), "mean")
    assert target_advice(run(movie("x"), FREE, eos=True), "sum") == ""


def test_a_digest_knows_the_data() -> None:
    """Breaks when an id, a text, a label, an answer or the order leaves no trace, or fields that
    the task does not read leave one."""
    records = [*movie("fine", "bad"), *movie("so", label=None)]
    changed = [
        records[::-1],
        records[:2],
        [{**records[0], "id": "x"}, *records[1:]],
        [{**records[0], "text": "fines"}, *records[1:]],
        [{**records[0], "label": "negative"}, *records[1:]],
        [{**records[0], "answers": ("positive", "good")}, *records[1:]],
    ]
    digests = [records_digest(one, ["text"]) for one in (records, *changed)]
    assert len(set(digests)) == 7 and {len(digest) for digest in digests} == {16}
    assert run(records).digest == records_digest([{**r, "more": 1} for r in records], ["text"])
    assert mix({"a": run(records)}).digest != mix({"a": run(changed[4])}).digest


def test_other_data_than_before_is_a_user_error() -> None:
    """Breaks when a changed split passes, or a folder without digests is refused."""
    check_digests({"train": "a", "test": "b"}, {"train": "a", "test": "b"}, made="run/checkpoints")
    check_digests({"train": "a"}, {}, made="run/checkpoints")
    with pytest.raises(UserError, match="^run/c.* other data: .*test was b, and now is c; allowed"):
        check_digests({"train": "a", "test": "c"}, {"train": "a", "test": "b"}, made="run/c")


def test_an_input_without_tokens_is_a_user_error() -> None:
    """Breaks when the token before it, of another example, is what is scored."""
    bare = replace(MOVIE, template="{text}")
    with pytest.raises(UserError, match=r"example 'test-1': its input, of '{text}', has no tokens"):
        run(movie("fine", ""), bare)
    assert [len(one) for one in run(movie(""), bare, bos=True).inputs] == [1]


def test_encoding_depends_on_the_example_alone() -> None:
    """Breaks when a batch is padded or its order changes the ids."""
    records = movie("fine", "a warm, funny film " * 9, "bad")
    together = run(records)
    for place, record in enumerate(records):
        assert np.array_equal(together.inputs[place], run([record]).inputs[0])


def test_a_mixture_has_each_tasks_examples() -> None:
    """Mutation: labels are those of the task's own candidates; ids that clash; tasks in turns."""
    one = run([*movie("fine"), *movie("bad", label="negative")])
    yes = replace(MOVIE, verbalizers={"positive": " positive", "yes": " yes"})
    other = run(movie("so", label="yes"), yes)
    mixed = mix({"one": one, "other": other})
    assert mixed.ids == [f"one/{n}" for n in one.ids] + [f"other/{n}" for n in other.ids]
    assert [mixed.task(n) for n in range(3)] == [0, 0, 1]
    assert len(mixed.candidates) == 3  # " positive" is one of both
    for n, (label, target) in enumerate(zip(mixed.labels, mixed.targets, strict=True)):
        assert mixed.candidates[label].tolist() == target.tolist()
        assert target.tolist() == [*one.targets, *other.targets][n].tolist()
    judged = [*movie("he", label="Ann"), *movie("she", label="Bo")]
    judged = [{**record, "answers": ("a",), "correct": True} for record in judged]
    third = run(judged, replace(FREE, correct_field="c", words=("pronoun",)))
    mixed = mix({"one": one, "third": third})
    assert mixed.labels.tolist() == [1, 0, -1, -1] and len(mixed.words) == 1


def test_summary_counts() -> None:
    records = [*movie("fine", "x" * 90), *movie("bad", label="negative"), *movie("so", label=None)]
    report = summary(run(records))
    assert report["examples"] == 4 and report["truncated"] == 1 and report["unlabelled"] == 1
    assert report["labels"] == {"negative": 1, "positive": 2}
    assert report["input_tokens_max"] == 64
    assert summary(run([]))["examples"] == 0


def test_ten_thousand_examples_take_seconds() -> None:
    records = movie(*[f"a warm, funny film {n} that never loses its way" for n in range(10_000)])
    started = time.perf_counter()
    run(records, max_input=30)
    assert time.perf_counter() - started < 10


def test_real_reviews_keep_their_template(shared_data: Path) -> None:
    lines = (shared_data / "sst2" / "stsa.binary.dev").read_text(encoding="latin-1").splitlines()
    encoded = run(movie(*[line[2:] for line in lines]), max_input=40)
    assert encoded.truncated > 100
    for tokens_T in encoded.inputs:
        assert len(tokens_T) <= 40 and PLAIN.decode(tokens_T).endswith("\nSentiment:")


def test_what_only_some_tasks_have() -> None:
    """Breaks when groups, own candidates or whether an answer is right are lost, or a digest does
    not tell them apart."""
    one = {"id": "a", "text": "x", "label": "no", "answers": ("no", "yes")}
    records = [one | {"group": "g", "candidates": ("no", "maybe yes")}]
    task = replace(FREE, candidates_field="c", group_field="g", words=("common", "sense"))
    found = run(records, task, eos=True, max_target=16)
    assert (found.groups, found.choices) == (("g",), (("no", "maybe yes"),))
    assert [PLAIN.decode(ids[:-1]) for ids in found.ranked(0)] == [" no", " maybe yes"]
    assert [ids[-1] for ids in found.ranked(0)] == [1, 1]
    assert [PLAIN.decode(ids) for ids in found.words] == [" common", " sense"]
    plain = run([one], FREE)
    assert plain.groups == plain.choices == plain.choice_ids == plain.words == ()
    judged = [one | {"id": f"{value}", "correct": value} for value in (True, False, None)]
    assert run(judged, replace(FREE, correct_field="c")).labels.tolist() == [1, 0, -1]
    digests = {
        records_digest([changed], ["text"])
        for changed in (one, *records, one | {"group": "h"}, *judged)
    }
    assert len(digests) == 6


def test_own_candidates_that_can_never_win_are_refused() -> None:
    """Breaks when only a task's verbalizers are compared."""
    records = [
        {"id": "a", "text": "x", "label": "no", "answers": ("no",), "candidates": given}
        for given in (("no", "yes"), ("no", "no more"))
    ]
    task = replace(FREE, candidates_field="c")
    with pytest.raises(UserError, match="candidate 'no more' begins with that of 'no'"):
        check_ranking(run(records, task, max_target=16), "sum")
    check_ranking(run(records, task, max_target=16), "mean")
    check_ranking(run(records, task, max_target=16, eos=True), "sum")


def test_a_target_of_t5_is_the_bare_label_and_eos() -> None:
    """Breaks when the space that sets a decoder's target off becomes a token of T5's."""
    pieces = ["<pad>", "</s>", "<unk>", "\u2581True", "\u2581False", "\u2581", "True", "False"]
    backend = Backend(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # as T5's tokenizer.json
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="always"),
        ]
    )
    t5 = Tokenizer(backend=backend, bos_id=None, eos_id=1, add_bos=False, add_eos=True)
    task = TASKS["boolq"].in_t5_form()
    records = [{"id": "a", "passage": "p", "question": "q", "label": "True"}]
    encoded = run(records, task, t5, eos=True, input_eos=True)
    assert [ids.tolist() for ids in encoded.candidates] == [[4, 1], [3, 1]]
    assert encoded.targets[0].tolist() == [*t5.encode("True"), 1] == [3, 1]
    assert encoded.inputs[0][-1] == 1
