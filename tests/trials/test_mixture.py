"""Several tasks in one trial: what is trained on, what is scored, and what is not allowed."""

import json

import numpy as np
import pytest

from softprompt.analysis.flops import ContextLengths, train_work
from softprompt.config import trial_id, validate
from softprompt.data.rows import RowLayout
from softprompt.errors import UserError
from softprompt.trials.estimate import estimate
from softprompt.trials.measure import measure
from softprompt.trials.prepare import initial_state, prepare, step_work
from softprompt.trials.run import run_trial
from tests.contracts.examples import session, trial_config, two_tasks, write_task
from tests.tiny_t5 import write_complete_t5


@pytest.fixture(scope="module")
def shared():
    with session() as made:
        yield made


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


def test_any_method_trains_on_a_mixture(tiny_folder, source, shared, tmp_path):
    """Mutations: only the first task is trained on, or scored; a task's answers are the other's."""
    changes = {"data__mixture": two_tasks(source), "eval__every": 2}
    config = trial_config(tiny_folder, source, **changes)
    assert trial_id(config) != trial_id(trial_config(tiny_folder, source))
    row = run_trial(config, tmp_path, session=shared)
    names, metrics = ("own", "other"), row["metrics"]["test"]
    assert metrics["accuracy"] == np.mean([metrics[f"{name}/accuracy"] for name in names])
    assert [metrics[f"{name}/examples"] for name in names] == [12, 12]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum("validation/other/accuracy" in line for line in lines) == 3
    told = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [line["task"] for line in told] == ["own"] * 12 + ["other"] * 12
    prepared = prepare(config, shared)
    decode = prepared.loaded.tokenizer.decode
    texts = {
        name: [decode(ids) for ids in prepared.for_task(name).data.train.inputs] for name in names
    }
    assert [decode(ids) for ids in prepared.data.train.inputs] == texts["own"] + texts["other"]
    train = prepared.data.train
    said = {(train.task(n), decode(ids)) for n, ids in enumerate(train.targets)}
    assert said == {(0, " negative"), (0, " positive"), (1, " not at all"), (1, " yes")}


def test_each_task_is_scored_with_its_own_prompt(tiny_folder, source, shared):
    """Mutation: examples of validation and test have the number of another task."""
    changes = {"data__mixture": two_tasks(source), "method__name": "multitask"}
    prepared = prepare(trial_config(tiny_folder, source, **changes), shared)
    delta = initial_state(prepared).delta
    cols_NPZ = delta["task_cols"]
    other = {**delta, "task_cols": cols_NPZ.at[1].set(3 * cols_NPZ[1])}
    for split in ("validation", "test"):
        (first, second), (same, changed) = (
            measure(prepared, one, split)[1] for one in (delta, other)
        )
        assert same == first and changed != second


def test_a_cap_bounds_a_task(tiny_folder, source, shared):
    """Mutation: it bounds the mixture, or validation, or refuses a task that is smaller."""
    changes = {"data__mixture": two_tasks(source), "data__cap": 10}
    prepared = prepare(trial_config(tiny_folder, source, **changes), shared)
    assert np.bincount(prepared.data.train.tasks).tolist() == [10, 10]
    assert [np.bincount(one.train.labels).tolist() for one in prepared.tasks] == [[5, 5]] * 2
    assert [len(one.validation.ids) for one in prepared.tasks] == [12, 12]
    wide = prepare(trial_config(tiny_folder, source, data__cap=1000), shared)
    assert len(wide.data.train.ids) == 40


def test_costs_count_every_tasks_context(tiny_folder, source, shared):
    """Mutation: one context of several; the second task is not scored."""
    mixture = two_tasks(source)
    config = trial_config(tiny_folder, source, data__mixture=mixture, method__name="multitask")
    prepared = prepare(config, shared)
    plain = train_work(prepared.data.train, RowLayout(), ContextLengths(0, 5), 8)
    assert step_work(prepared).tokens == plain.tokens + 5
    assert step_work(prepared).keys == plain.keys + 5 * 6 / 2
    assert estimate(config, shared)["trainable"] == 5 * 48 + 2 * 8 * (5 + 48)
    alone = ["own", json.dumps([json.loads(mixture)[1]])]
    flops = [
        estimate(trial_config(tiny_folder, source, data__mixture=m, method__name="none"), shared)
        for m in (mixture, *alone)
    ]
    assert flops[0]["flops"] == flops[1]["flops"] + flops[2]["flops"]


def test_what_a_t5s_tasks_cannot_have(source, shared, tmp_path):
    """Mutation: a place or a form is passed over in silence."""
    write_complete_t5(tmp_path / "t5")
    config = trial_config(tmp_path / "t5", source, method__name="multitask")
    config.method.prompt_to_input = False
    with pytest.raises(UserError, match="'method.prompt_to_input' is False; allowed"):
        prepare(config, shared)
    config.method.place = "both"
    with pytest.raises(UserError, match="'method.place' is 'both'; allowed for .*: encoder$"):
        validate(config)
