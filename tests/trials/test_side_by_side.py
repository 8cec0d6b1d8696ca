"""Trials scored side by side, and which are: against one at a time."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from softprompt import cli
from softprompt.console import Progress
from softprompt.data.builtin_tasks import TASKS, get_task
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.trials import side_by_side as many
from softprompt.trials.evaluate import evaluate_trials, for_task, trained_delta
from softprompt.trials.measure import measure
from softprompt.trials.prepare import first_delta, prepare
from softprompt.trials.run import DELTA, provenance, read_config, write_config
from softprompt.trials.session import Session
from tests.contracts.examples import trial_config
from tests.own_task import Lines, make_config, write_task
from tests.tiny_t5 import write_complete_t5

TRIALS = {  # "a" to "c" differ in what they were trained from alone
    "a": {"seed": 0},
    "b": {"seed": 1, "method__init": "uniform", "train__steps": 3},
    "c": {"seed": 2, "method__init": "labels", "optimizer__rate": 0.3},
    "longer": {"method__length": 5},
    "prefix": {"method__name": "prefix", "method__init": "noise"},
    "prefix too": {"method__name": "prefix", "method__init": "zeros", "seed": 1},
    "full": {"method__name": "full"},
    "full too": {"method__name": "full", "seed": 1},
}


@pytest.fixture(autouse=True)
def budget(monkeypatch):
    """A CPU's is too small for several rows on each of eight devices."""
    monkeypatch.setattr(many, "scoring_budget", lambda: 10_000)


def write_trial(folder, model, place, shared, **changes):
    """A trial's folder with a delta far off its start, as if it had been trained."""
    config = make_config(place, model, **changes)
    prepared, random = prepare(config, shared), np.random.default_rng(config.seed)
    delta = first_delta(prepared.step, jax.random.key(config.seed), prepared.loaded.weights)
    moved = jax.tree.map(lambda x: x + random.standard_normal(x.shape, np.float32), delta)
    write_config(epath.Path(folder), config)
    save_delta(folder / DELTA, jax.device_get(moved), provenance(config, prepared.loaded))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """The folders of trials by name."""
    place, shared = write_task(tmp_path_factory.mktemp("many")), Session(Progress())
    return {
        name: write_trial(place / name, tiny_folder, place, shared, **one)
        for name, one in TRIALS.items()
    }


def together(folders, task=None):
    """Trials of one program, with what each one's rows share and its delta, in one session."""
    shared = Session(Lines())
    made = [prepare(read_config(folder), shared) for folder in folders]
    assert len({many.program_key(one) for one in made}) == 1
    made = [one.for_task(task) if task else one for one in made]
    deltas = [trained_delta(folder, one) for folder, one in zip(folders, made, strict=True)]
    parts = [one.shared(delta) for one, delta in zip(made, deltas, strict=True)]
    return made, parts, deltas


def check_same(folders, task=None):
    """Scores a test split of trials side by side, and one at a time."""
    made, parts, deltas = together(folders, task)
    results = many.score_deltas(made[0], parts, "test")
    for one, delta, result in zip(made, deltas, results, strict=True):
        metrics, predictions = measure(one, delta, "test")
        assert result[0] == metrics
        for of_many, alone in zip(result[1], predictions, strict=True):
            for ours, theirs in zip(of_many, alone, strict=True):
                assert ours["predicted"] == theirs["predicted"]
                found_C, scores_C = (list(p["scores"].values()) for p in (ours, theirs))
                np.testing.assert_allclose(found_C, scores_C, atol=2e-5)  # rounded to 1e-5
    assert results[0][1] != results[1][1]


def test_side_by_side_is_one_at_a_time(runs):
    """Mutation: all have the first one's context, or its place; scores are keyed by place."""
    check_same([runs[name] for name in ("a", "b", "c")])
    check_same([runs["prefix"], runs["prefix too"]])


def test_several_tasks_side_by_side(tiny_folder, tmp_path):
    """Prompts for each of two tasks. Mutation: a task's examples see the other's prompt."""
    place, shared = write_task(tmp_path), Session(Progress())
    other = {"name": "other", "source": f"jsonl:{place}/{{split}}.jsonl", "template": "{text}\nOk:"}
    other["verbalizers"] = {"good": " yes", "bad": " not at all"}
    more = {"method__name": "multitask", "data__mixture": json.dumps(["mine", other])}
    folders = [
        write_trial(place / str(n), tiny_folder, place, shared, seed=n, **more) for n in range(2)
    ]
    check_same(folders)
    check_same(folders, "mine")


def test_an_encoder_decoder_side_by_side(tmp_path):
    """Its prompt stands inline. Mutation: the encoder's variables are those of the first."""
    write_complete_t5(tmp_path / "model")
    place, shared = write_task(tmp_path), Session(Progress())
    folders = [
        write_trial(place / str(n), tmp_path / "model", place, shared, seed=n) for n in range(2)
    ]
    check_same(folders)


def test_which_are_scored_together(runs):
    """Mutation: trials of other lengths or methods share a program; trained weights are stacked."""
    progress = Lines()
    results = evaluate_trials(list(runs.values()), progress=progress)
    alone = [evaluate_trials([folder], progress=Lines())[0] for folder in runs.values()]
    assert results == alone
    said = [line for line in progress.said if "side by side" in line]
    assert said == [
        "3 trials like prompt-3-vocabulary-mine-s0 are scored side by side, 3 at a time",
        "2 trials like prefix-3-noise-mine-s0 are scored side by side, 2 at a time",
    ]
    assert not any("side by side" in line for line in progress.said if "full" in line)


def test_parts_of_a_group(runs, monkeypatch):
    """Mutation: parts are as large as can be, so that the last is almost empty; a row of every
    device, or the second copy of contexts, is not counted."""
    made, _, _ = together([runs["a"], runs["b"]])
    one, budget = made[0], many.scoring_budget
    shape = one.data.eval_shape("test", mesh=one.mesh, layout=one.layout)
    width = shape.tokens * 8
    assert many.chunk_sizes(one, 1, "test") == [1]
    for most, wanted in ((3, [3, 3, 1]), (5, [4, 3]), (7, [7]), (100, [7])):
        monkeypatch.setattr(many, "scoring_budget", lambda most=most: most * width)
        assert many.chunk_sizes(one, 7, "test") == wanted
    monkeypatch.setattr(many, "scoring_budget", budget)
    each, weights = many.shared_bytes(one), sum(x.nbytes for x in jax.tree.leaves(one.frozen))
    assert each == 3 * 48 * 4 + 2 * 3 * 3 * 2 * 12 * 4, "the prompt, and keys and values"
    for room, wanted in ((4.5 * each, [2, 2, 2, 1]), (-weights, [1] * 7)):
        bytes_there = (weights + room) / many.MEMORY_SHARE
        monkeypatch.setattr(many, "device_memory", lambda there=bytes_there: there)
        assert many.chunk_sizes(one, 7, "test") == wanted


def test_the_last_part_is_short(runs, monkeypatch):
    """Mutation: its spare places are told; trials of a part are mixed up; one is left out."""
    folders, widths = [runs[name] for name in ("a", "b", "c")], []

    def say_which(prepared, shared, split):
        widths.append(len(shared))
        return [({"sum": float(own["prompt"].sum())}, []) for own, _ in shared]

    monkeypatch.setattr(many, "chunk_sizes", lambda *_: [2, 1])
    monkeypatch.setattr(many, "score_deltas", say_which)
    found = evaluate_trials(folders, progress=Lines())
    sums = [load_delta(folder / DELTA)[0]["prompt"].sum() for folder in folders]
    assert [one["sum"] for one in found] == pytest.approx(sums, abs=1e-3)
    assert widths == [2, 2], "one program"


def test_the_longest_example_is_of_the_split_that_is_scored(tiny_folder, tmp_path):
    """Breaks when the rows are shaped by validation and test alone: it fits into none of them."""
    place, shared = write_task(tmp_path), Session(Progress())
    with open(place / "train.jsonl", "a") as opened:
        opened.write(json.dumps({"text": "a warm film " * 20, "label": "good"}) + "\n")
    folders = [write_trial(place / str(n), tiny_folder, place, shared, seed=n) for n in range(2)]
    together = evaluate_trials(folders, split="train", progress=Lines())
    (alone,) = evaluate_trials(folders[:1], split="train", progress=Lines())
    assert alone == together[0] and alone["examples"] == 49


def test_what_a_prompt_started_from_may_be_gone(runs, tiny_folder, tmp_path):
    """Mutation: the file is read again, or has to be of the model's weights."""
    place, shared, file = write_task(tmp_path), Session(Progress()), tmp_path / "d.safetensors"
    source = {"method__init": "file", "method__init_file": str(file)}
    save_delta(file, load_delta(runs["a"] / DELTA)[0], {"fingerprint": "others"})
    allowed = {"method__init_any_weights": True}
    write_trial(tmp_path / "run", tiny_folder, place, shared, **source, **allowed)
    file.unlink()
    (found,) = evaluate_trials([tmp_path / "run"], progress=Lines())
    assert found["examples"] == 20


def test_a_trial_of_another_machine(runs, tmp_path):
    """Mutation: it is asked for the devices that it was trained on."""
    shutil.copytree(runs["a"], tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    config = json.loads(file.read_text())
    config["mesh"] |= {"data": 3, "model": 4}
    config["compute"]["attention"] = "splash"
    file.write_text(json.dumps(config))
    (here,) = evaluate_trials([runs["a"]], progress=Lines())
    (found,) = evaluate_trials([tmp_path / "a"], progress=Lines())
    assert found == here


def test_the_command(runs, capsys):
    """Mutation: one trial's scores come in a list; several are not told apart."""
    folders = [str(runs[name]) for name in ("b", "longer", "a")]
    assert cli.main(["evaluate", "--run", *folders, "--split", "validation"]) == 0
    written = capsys.readouterr()
    found = json.loads(written.out)
    assert [one.pop("run") for one in found] == folders
    said = "2 trials like prompt-3-uniform-mine-s1 are scored side by side, 2 at a time"
    assert said in written.err
    assert cli.main(["evaluate", "--run", folders[1], "--split", "validation"]) == 0
    assert json.loads(capsys.readouterr().out) == found[1]
    assert cli.main(["evaluate", "--run", folders[0], "nowhere"]) == 2
    assert "nowhere: not a trial's folder" in capsys.readouterr().err


def test_another_task_keeps_what_is_not_a_tasks_own():
    """Mutation: its targets end without the EOS that the prompt was trained with."""
    keys = {"task__eos": True, "task__max_input": 48, "task__label_field": "y"}
    config, known = for_task(trial_config("tiny", "jsonl:x", **keys), "sms_spam")
    assert known == ["sms_spam"]
    assert (config.task.eos, config.task.max_input, config.task.max_target) == (True, 48, 8)
    assert get_task(config.task) == TASKS["sms_spam"]
