import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from softprompt.config import base_config, from_dict
from softprompt.config.schema import SELECTING
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.data.splits import overlaps, read_split
from softprompt.data.subsets import balanced_subset, label_counts, seeded_order, seeded_sample
from softprompt.data.tasks import SPLITS, SplitRule, generated, parse_template, target_text
from softprompt.errors import UserError

CATALOGUE = [name for name, task in TASKS.items() if "glue/" in task.source and task.verbalizers]


def records(*labels: str) -> list[dict[str, str]]:
    return [{"id": str(n), "label": label} for n, label in enumerate(labels)]


def config(**values: Any) -> dict[str, Any]:
    return {**base_config().task.to_dict(), **values}


def own(source: str, **values: Any) -> dict[str, Any]:
    defaults = {"name": "mine", "template": "{text} =>", "verbalizers": {"n": " no", "y": " yes"}}
    return config(source=source, **(defaults | values))


def write(path: Path, count: int, **more: Any) -> str:
    rows = [{"text": f"t{n}", "label": "ny"[n % 2], **more} for n in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_default_config_names_a_task() -> None:
    task = get_task(base_config().task)
    assert task is not None and task.name == "movie_sentiment"
    assert (task.labels, task.fields) == (("negative", "positive"), ("text",))


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_used(name: str) -> None:
    task = get_task(config(name=name))
    assert task.fields and task.about and "test" in task.splits
    assert task.name.startswith("mrqa") or set(task.splits) == set(SPLITS)
    assert not task.template[-1].isspace()
    assert all(target[0] == " " and target[1] != " " for target in task.verbalizers.values())


@pytest.mark.parametrize("name", CATALOGUE)
def test_catalogue_tasks_fit_the_features_of_tfds(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when a template's field, a label or a split is not the dataset's own."""
    import tensorflow_datasets as tfds

    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path))
    with tfds.testing.mock_data(num_examples=20, policy=tfds.testing.MockPolicy.USE_CODE):
        splits = {split: read_split(TASKS[name], split) for split in SPLITS}
    whole = name.endswith("_dev")
    assert [len(splits[split]) for split in SPLITS] == ([20, 20, 20] if whole else [18, 2, 20])
    for record in splits["test"]:
        assert record["label"] in TASKS[name].labels
        assert all(isinstance(record[field], str) for field in TASKS[name].fields)
    if not whole:
        assert not {r["id"] for r in splits["train"]} & {r["id"] for r in splits["validation"]}
        assert {r["id"].split("-")[0] for r in splits["validation"]} == {"train"}


def test_own_task_reads_a_file_per_split(tmp_path: Path) -> None:
    for split, count in zip(SPLITS, (4, 3, 2), strict=True):
        write(tmp_path / f"{split}.jsonl", count)
    task = get_task(own(f"jsonl:{tmp_path}/{{split}}.jsonl"))
    assert [len(read_split(task, split)) for split in SPLITS] == [4, 3, 2]
    assert read_split(task, "validation")[0] == {"id": "validation-0", "text": "t0", "label": "n"}


def one_file(path: Path, rows: list[dict[str, Any]], **values: Any) -> dict[str, list[Any]]:
    """The splits of rows that are written into one file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task(own(f"jsonl:{path}", **values))
    return {split: read_split(task, split) for split in SPLITS}


ROWS = [{"key": f"k{n}", "text": f"t{n}", "label": "ny"[n % 2]} for n in range(400)]


@pytest.mark.parametrize("id_field", ["", "key"])
def test_a_line_more_moves_no_other_to_another_split(tmp_path: Path, id_field: str) -> None:
    """Breaks when one file is divided by line numbers, or by ranks: a new line at the top would
    move lines from train to test, and rename them."""
    new = {"key": "new", "text": "new", "label": "n"}
    before = one_file(tmp_path / "a.jsonl", ROWS, id_field=id_field)
    after = one_file(tmp_path / "a.jsonl", [new, *ROWS], id_field=id_field)
    turned = one_file(tmp_path / "a.jsonl", ROWS[::-1], id_field=id_field)
    ids = [record["id"] for split in SPLITS for record in before[split]]
    assert len(set(ids)) == 400, "every line is in one split, under an id of its own"
    for split, share in zip(SPLITS, (0.8, 0.1, 0.1), strict=True):
        assert len(before[split]) == pytest.approx(400 * share, abs=24)  # four standard deviations
        assert [record for record in after[split] if record["text"] != "new"] == before[split]
        assert turned[split] == before[split][::-1]


def test_equal_texts_share_a_split_and_have_ids_of_their_own(tmp_path: Path) -> None:
    """Breaks when texts are compared with their case and white space, or equal ids are given."""
    doubled = [*ROWS, *({**row, "text": f" {row['text'].upper()} "} for row in ROWS)]
    splits = one_file(tmp_path / "a.jsonl", doubled)
    ids = [record["id"] for split in SPLITS for record in splits[split]]
    assert len(ids) == len(set(ids)) == 800
    assert overlaps(get_task(own("jsonl:x")), splits) == (0, [])


def test_a_group_is_in_one_split_and_sampled_whole(tmp_path: Path) -> None:
    """Breaks when the hash is of a text, or a sample takes some of a question's answers."""
    rows = [{**row, "group": n // 4} for n, row in enumerate(ROWS)]
    for id_field in ("", "key"):
        splits = one_file(tmp_path / "a.jsonl", rows, id_field=id_field, group_field="group")
        groups = [{record["group"] for record in splits[split]} for split in SPLITS]
        assert sum(map(len, groups)) == len(set.union(*groups)) == 100
        assert sum(map(len, splits.values())) == 400
    sample = seeded_sample(splits["train"], 10)
    assert len(sample) == 12 and len({record["group"] for record in sample}) == 3
    assert sample == [record for record in splits["train"] if record in sample]


def test_texts_in_two_splits_are_counted(tmp_path: Path) -> None:
    """Breaks when a leak goes unsaid, or the development set that selects is called one."""
    task = get_task(own(f"jsonl:{tmp_path}/{{split}}.jsonl"))
    for split, count in zip(SPLITS, (4, 3, 2), strict=True):
        write(tmp_path / f"{split}.jsonl", count)
    (tmp_path / "test.jsonl").write_text(
        '{"text": "T0 ", "label": "n"}\n{"text": "other", "label": "n"}\n'
    )
    splits = {split: read_split(task, split) for split in SPLITS}
    assert overlaps(task, splits)[1] == [
        "warning: 3 of 3 validation texts of task 'mine' also stand in train",
        "warning: 1 of 2 test texts of task 'mine' also stand in train",
        "warning: 1 of 2 test texts of task 'mine' also stand in validation",
    ]
    same = {"train": SplitRule("train"), **dict.fromkeys(SPLITS[1:], SplitRule("test"))}
    assert len(overlaps(replace(task, splits=same), splits)[1]) == 2


def test_one_file_for_two_splits_is_a_user_error(tmp_path: Path) -> None:
    """Breaks when links to one file pass for three splits."""
    path = write(tmp_path / "all.jsonl", 9)
    (tmp_path / "train.jsonl").symlink_to(path)
    write(tmp_path / "validation.jsonl", 9)
    (tmp_path / "test.jsonl").symlink_to(path)
    with pytest.raises(UserError, match=f"train and test are the same file, {path}; allowed"):
        read_split(get_task(own(f"jsonl:{tmp_path}/{{split}}.jsonl")), "train")


def test_empty_split_is_a_user_error(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", 1)
    with pytest.raises(UserError, match=rf"test split of task 'mine' is empty: {path}"):
        read_split(get_task(own(f"jsonl:{path}")), "test")
    (tmp_path / "empty.tsv").write_text("text\tlabel\n")
    with pytest.raises(UserError, match="test split of task 'mine' is empty: .*empty.tsv"):
        read_split(get_task(own(f"tsv:{tmp_path}/empty.tsv")), "test")


def test_unlabelled_rows_are_for_test_alone(tmp_path: Path) -> None:
    rows = ['{"text": "a", "label": "n"}', '{"text": "b", "label": null}']
    for split in SPLITS:
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    task = get_task(own(f"jsonl:{tmp_path}/{{split}}.jsonl"))
    assert [record["label"] for record in read_split(task, "test")] == ["n", None]
    with pytest.raises(UserError, match="train split .* example 'train-1' of .* has no label"):
        read_split(task, "train")


def test_own_data_without_verbalizers_is_a_free_text_task(tmp_path: Path) -> None:
    """Breaks when verbalizers are demanded, or a task names metrics that it cannot have."""
    path = tmp_path / "all.jsonl"
    rows = [{"q": f"q{n}", "answers": [f"a{n}", "b"]} for n in range(40)]
    path.write_text("\n".join(map(json.dumps, rows)))
    keys = {"verbalizers": {}, "template": "{q}", "label_field": "answers"}
    values = {f"task.{key}": value for key, value in own(f"jsonl:{path}", **keys).items()}
    task = get_task(from_dict(values).task)
    record = read_split(task, "train")[0]
    assert record["answers"] == (record["label"], "b")
    assert dict(label_counts(read_split(task, "train"))).keys() == {"answered"}
    assert list(task.metrics) == ["generation", "likelihood"]
    assert "f1" in task.metrics["generation"]
    assert "accuracy" in TASKS["rte"].metrics["ranking"]


def test_metrics_of_the_papers_sets() -> None:
    """Breaks when a set lacks a metric that the paper reports, or has one that it cannot have."""
    reported = {
        "boolq": ("accuracy",),
        "cb": ("macro_f1", "accuracy"),
        "multirc": ("f1", "group_match"),
        "record": ("exact_match", "f1"),
        "wsc": ("accuracy",),
        "mrpc": ("f1", "accuracy"),
        "qqp": ("f1", "accuracy"),
        "sst2": ("accuracy",),
        "squad": ("exact_match", "f1"),
        "mrqa_race": ("exact_match", "f1"),
    }
    for name, metrics in reported.items():
        task = TASKS[name]
        assert task.reported == metrics and "generated_task_score" in task.metrics["generation"]
        free = not task.verbalizers and name != "wsc"
        named = metrics if free else generated(metrics)
        assert set(named) <= set(task.metrics["generation"]), name
        assert set(task.metrics["generation"]) - {"illegal"} <= set(SELECTING)
    assert {name for name, task in TASKS.items() if "ranking" not in task.metrics} == {
        *("wsc", "wsc_dev", "squad", "squad_dev"),
        *(name for name in TASKS if name.startswith("mrqa_")),
    }
    assert "illegal" in TASKS["record"].metrics["generation"]
    assert "task_score" not in TASKS["sms_spam"].metrics["ranking"]


def test_label_outside_the_verbalizers_names_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path / "all.jsonl", 9)
    task = get_task(own(f"jsonl:{path}", verbalizers={"n": " no", "N": " never"}))
    with pytest.raises(UserError, match=rf"^{path}:2: label 'y' has no verbalizer"):
        read_split(task, "train")


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"name": "movie_sentimnt"}, r"unknown task 'movie_sentimnt' \(did you mean 'movie_sent"),
        ({"template": "Review: {text"}, "template 'Review: {text': .*brace"),
        ({"template": "Review: {}"}, "not a field's name"),
        ({"template": "{text!r}"}, "not a field's name"),
        ({"template": "{text:>9}"}, "not a field's name"),
        ({"template": "Review:"}, "names no {field}"),
        ({"verbalizers": {"negative": " bad"}}, "has one verbalizer"),
        ({"verbalizers": {"negative": " bad", "positive": " "}}, "label 'positive' is ' '"),
        ({"verbalizers": {"negative": " a", "positive": " a"}}, "more than one label"),
        ({"source": "jsonl:x"}, "'movie_sentiment' is a built-in task"),
        (
            {"source": "jsnl:x", "name": "m"},
            r"'jsnl:x' \(did you mean 'jsonl'\?\); allowed: jsonl:P",
        ),
        ({"source": "tsv:", "name": "m"}, "task.source 'tsv:'"),
        ({"label_field": "y"}, "'task.label_field' is 'y'; allowed: 'label' without a task.source"),
        ({"group_field": "g"}, "'task.group_field' is 'g'; allowed: '' without a task.source"),
        ({"candidates_field": "c"}, "'task.candidates_field' is 'c'; allowed: '' without a task"),
        (
            {"source": "tsv:x", "name": "m", "template": "{candidates}", "candidates_field": "c"},
            "names {candidates}, as records call their own candidates",
        ),
        ({"id_field": "key"}, "'task.id_field' is 'key'; allowed: '' without a task.source"),
        ({"template": "{text} {label}"}, "names {label}, which is the label"),
        ({"template": "{text} {id}"}, "names {id}, as records call their own id"),
        ({"source": "tsv:x", "name": "m", "template": "{answers}"}, "call their own answers"),
        (
            {"source": "tsv:x", "name": "m", "label_field": "y", "template": "{text} {label}"},
            "names {label}, as records call their own label",
        ),
    ],
)
def test_config_that_names_no_task_is_one_line(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        get_task(config(**values))
    assert "\n" not in str(caught.value)


def test_template_and_verbalizers_of_a_config_replace_the_tasks() -> None:
    task = get_task(
        config(template="{text} is", verbalizers={"positive": " good", "negative": " bad"})
    )
    assert (task.template, task.labels) == ("{text} is", ("positive", "negative"))
    assert task.source == TASKS["movie_sentiment"].source


def test_a_template_may_have_doubled_braces() -> None:
    assert (
        "".join(a + (f"<{b}>" if b else "") for a, b in parse_template("{{x}} {a}{b}."))
        == "{x} <a><b>."
    )


def test_generated_target_follows_one_space() -> None:
    mine = get_task(own("jsonl:x", verbalizers={}))
    assert target_text(mine, "Paris") == " Paris"
    assert (
        target_text(get_task(own("jsonl:x", verbalizers={}, template="{text}\n")), "Paris")
        == "Paris"
    )
    assert target_text(TASKS["sms_spam"], "spam") == " yes"


LABELS = st.lists(st.sampled_from("abc"), min_size=1, max_size=40)


@given(LABELS, st.integers(0, 40), st.integers(0, 5), st.randoms())
def test_subset_is_balanced_nested_and_seeded(labels: Any, n: int, seed: int, random: Any) -> None:
    """Breaks when a subset is a plain sample, or depends on the order of the records."""
    pool = records(*labels)
    n = min(n, len(pool))
    subset = balanced_subset(pool, n, seed)
    ids = [record["id"] for record in subset]
    assert len(ids) == len(set(ids)) == n
    counts, whole = Counter(r["label"] for r in subset), Counter(labels)
    for a in whole:
        for b in whole:
            assert counts[a] + 1 >= counts[b] or counts[a] == whole[a]
    assert balanced_subset(random.sample(pool, len(pool)), n, seed) == subset
    assert balanced_subset(pool, len(pool), seed)[:n] == subset


def test_seeds_draw_different_subsets() -> None:
    pool = records(*"ab" * 50)
    assert len({tuple(r["id"] for r in balanced_subset(pool, 7, seed)) for seed in range(9)}) == 9


def test_a_subset_of_free_text_is_drawn_without_regard_to_answers() -> None:
    """Breaks when each answer is a label of its own, so that rare answers are drawn first."""
    pool = [
        {**record, "answers": (record["label"],)} for record in records(*"a" * 90, *"bcdefghijk")
    ]
    assert Counter(r["label"] for r in balanced_subset(pool, 20, 0))["a"] > 10


def test_subset_larger_than_the_data_is_a_user_error() -> None:
    with pytest.raises(UserError, match="'data.train_examples' is 4; allowed: at most 3,"):
        balanced_subset(records(*"aab"), 4, 0)


def test_a_sample_keeps_order_and_goes_by_ids() -> None:
    # Breaks if: the first n records are taken, which in a file sorted by label are of one label.
    pool = records(*"aaaabbbb")
    sample = seeded_sample(pool, 4)
    assert sample == [record for record in pool if record in sample] and len(sample) == 4
    assert {record["label"] for record in sample} == {"a", "b"}
    assert seeded_sample(pool, 0) == seeded_sample(pool, 9) == pool


def test_seeded_order_is_fixed_for_all_time() -> None:
    """Breaks when the hash or its text changes: every split and subset would change with it."""
    assert seeded_order(list("abcdefgh"), 0) == [6, 5, 2, 1, 4, 3, 0, 7]


def test_label_counts_are_most_common_first() -> None:
    pool = [*records(*"abb"), {"id": "x", "label": None}]
    assert list(label_counts(pool).items()) == [("b", 2), ("a", 1), ("unlabelled", 1)]


def test_real_rows_of_boolq_become_records(shared_data: Path) -> None:
    source = f"jsonl:{shared_data}/superglue/BoolQ/val.jsonl"
    verbalizers = {"false": " False", "true": " True"}
    task = get_task(own(source, template="{passage} {question}?", verbalizers=verbalizers))
    whole = [record for split in SPLITS for record in read_split(task, split)]
    assert label_counts(whole) == {"true": 2033, "false": 1237}
