import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from softprompt import results
from softprompt.config import trial_id, trial_name
from softprompt.console import duration
from softprompt.errors import UserError
from softprompt.trials import shards, sweep
from softprompt.trials.experiment import load_experiment, make_trials
from softprompt.trials.lock import Locked
from softprompt.trials.outputs import write_outputs
from softprompt.trials.sweep_cost import sweep_cost
from tests.trials.rows import Runner, config, done_row, experiment_rows, run


def test_trials_run_in_order_and_a_rerun_runs_none(tmp_path):
    runner = Runner()
    trials = [config(1), config(5), config(20)]
    assert run(trials, tmp_path, runner) == []
    assert runner.ran == [1, 5, 20]
    assert run(trials, tmp_path, runner) == []
    assert runner.ran == [1, 5, 20]
    assert run([*trials, config(100)], tmp_path, runner) == []
    assert runner.ran == [1, 5, 20, 100]


def test_no_trial_starts_when_the_time_is_over(tmp_path, monkeypatch, capsys):
    """Breaks when a trial that began in time is cut off, or the next one begins."""
    now = [0.0]

    class Slow(Runner):
        def __call__(self, made, folder):
            now[0] += 50
            return super().__call__(made, folder)

    monkeypatch.setattr(sweep, "time", SimpleNamespace(monotonic=lambda: now[0]))
    trials, slow = [config(length) for length in (1, 5, 20)], Slow()
    assert run(trials, tmp_path, slow, minutes=1) == []
    assert slow.ran == [1, 5]
    said = capsys.readouterr().err
    assert "time limit reached: 1 of 3 trials are not started" in said
    assert "trial 2 of 3" in said and "trial 3 of 3" not in said
    run(trials, tmp_path, slow)
    assert slow.ran == [1, 5, 20]
    assert (shards.parse_minutes(""), shards.parse_minutes("1.5")) == (math.inf, 1.5)
    for text in ("0", "-1", "nan", "an hour"):
        with pytest.raises(UserError, match="--minutes is"):
            shards.parse_minutes(text)


def test_a_failed_trial_is_a_row_and_is_tried_again(tmp_path, capsys):
    trials = [config(1), config(5), config(20)]
    runner = Runner({5: FloatingPointError("the loss is NaN\nat step 7")})
    failed = run(trials, tmp_path, runner)
    assert runner.ran == [1, 5, 20]
    assert [row["error"] for row in failed] == ["FloatingPointError: the loss is NaN at step 7"]
    assert "failed: FloatingPointError: the loss is NaN at step 7" in capsys.readouterr().err
    folder = sweep.trial_folder(tmp_path, trials[1])
    stored = results.read_result(folder)
    assert (stored["status"], stored["metrics"]) == ("failed", {})
    assert "FloatingPointError" in (folder / "traceback.txt").read_text()
    again = Runner()
    assert run(trials, tmp_path, again) == []
    assert again.ran == [5]
    assert results.is_done(folder)


def test_an_error_after_the_row_keeps_the_row(tmp_path, capsys):
    """Mutations: a store that is not reached at a trial's end makes it a failed one; a row that is
    not readable ends the sweep."""

    class Late(Runner):
        def __call__(self, made, folder):
            super().__call__(made, folder)
            raise UserError("the store is not reached")

    trials = [config(1)]
    assert run(trials, tmp_path, Late()) == []
    stored = results.read_result(sweep.trial_folder(tmp_path, trials[0]))
    assert (stored["status"], stored["error"]) == ("done", "")
    assert "is done, but ended with an error: the store is not reached" in capsys.readouterr().err
    (tmp_path / "result.json").write_text("{")
    row = sweep.record_failure(trials[0], tmp_path, UserError("not JSON"), 1.0)
    assert results.read_result(tmp_path)["error"] == row["error"] == "not JSON"


def test_a_group_that_other_processes_have_taken(tmp_path, monkeypatch, capsys):
    """Mutation: a group of which every trial starts from a taken one is run, though it is empty."""
    trials = [config(1), config(5), config(20)]
    start = trial_id(trials[0])
    monkeypatch.setattr(sweep, "start_id", lambda made: "" if made.method.length == 1 else start)
    monkeypatch.setattr(sweep, "trial_groups", lambda session, some: [([0], 1), ([1, 2], 2)])
    runner = Runner({1: Locked("another process runs it")})
    assert run(trials, tmp_path, runner) == []
    assert runner.ran == [1]
    assert "3 of 3 trials are left to other processes" in capsys.readouterr().err


@pytest.mark.parametrize("stop", [SystemExit(75), KeyboardInterrupt()])
def test_an_interruption_passes_and_leaves_no_row(tmp_path, stop):
    trials = [config(1), config(5)]
    with pytest.raises(type(stop)):
        run(trials, tmp_path, Runner({5: stop}))
    assert [row["trial"] for row in results.read_rows(tmp_path)] == [trial_id(trials[0])]
    runner = Runner()
    run(trials, tmp_path, runner)
    assert runner.ran == [5]


def test_the_time_left_comes_from_the_estimates(tmp_path, capsys):
    def estimate(made):
        if made.method.length == 5:
            raise UserError("no data")
        return {"seconds": 60.0 * made.method.length}

    run([config(1), config(5), config(2)], tmp_path, Runner(), estimate=estimate)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trial 1 of 3: prompt-1-vocabulary-s0, about 3 min 0 s left"
    assert lines[1] == "prompt-1-vocabulary-s0: test accuracy 0.800 on 200 examples, 1 s"
    assert lines[4] == "trial 3 of 3: prompt-2-vocabulary-s0, about 0 s left"
    assert len(lines) == 6


def test_a_models_trials_are_estimated_when_its_turn_comes(tmp_path, capsys):
    """An estimate loads the model. Mutations: all are asked for first; a trial that was not counts
    nothing; the estimates of a model are made one by one."""
    asked, trials = [], [config(length) for length in (1, 2, 3, 4)]
    trials[1].model.name = trials[3].model.name = "other"

    def estimate(made):
        asked.append(made.method.length)
        return {"seconds": 60.0}

    class Looking(Runner):
        def __call__(self, made, folder):
            asked.append(f"run {made.method.length}")
            return super().__call__(made, folder)

    run(trials, tmp_path, Looking(), estimate=estimate)
    assert asked == [1, 3, "run 1", 2, 4, "run 2", "run 3", "run 4"]
    assert "about 4 min 0 s left" in capsys.readouterr().err.splitlines()[0]


def test_a_trials_folder_is_found_by_its_id(tmp_path):
    folder = sweep.trial_folder(tmp_path, config(5))
    assert folder.name == f"prompt-5-vocabulary-s0-{trial_id(config(5))}"
    others = config(5), config(5)
    others[0].task.name = "my task/1"
    others[1].data.mixture = "boolq, sms_spam"
    assert trial_name(others[0]) == "prompt-5-vocabulary-my_task_1-s0"
    assert trial_name(others[1]) == "prompt-5-vocabulary-boolq+sms_spam-s0"
    renamed = tmp_path / f"older-name-{trial_id(config(5))}"
    renamed.mkdir()
    assert Path(sweep.trial_folder(tmp_path, config(5))) == renamed


def test_shards_are_disjoint_and_complete():
    trials = [config(length) for length in range(1, 8)]
    parts = [shards.take_shard(trials, (part, 3)) for part in (1, 2, 3)]
    assert sorted(made.method.length for part in parts for made in part) == list(range(1, 8))
    assert shards.parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UserError, match="--shard is"):
            shards.parse_shard(text)


def test_the_same_trial_twice_is_an_error():
    experiment = load_experiment("prompt_length")
    with pytest.raises(UserError, match="trials 5 and 6 of the sweep are the same"):
        make_trials(experiment, "quickstart", [("method.length", "20")])


def test_an_override_is_for_the_trials_that_read_it():
    """Mutation: the prompts are other trials with other shots; a key that no trial reads passes."""
    experiment = load_experiment("prompt_length")
    plain, other = (
        make_trials(experiment, "quickstart", overrides)
        for overrides in ((), [("method.shots", "4")])
    )
    changed = [
        a.method.name for a, b in zip(plain, other, strict=True) if trial_id(a) != trial_id(b)
    ]
    assert changed == ["fewshot"] * 3
    with pytest.raises(UserError, match="'method.rank' is 4; method.name=.* has no such key"):
        make_trials(experiment, "quickstart", [("method.rank", "4")])


def test_an_override_of_training_is_for_what_is_trained():
    """And one of a start for the trials that start so, whatever the order of the words. Mutations:
    zero-shot is another trial with other steps; overrides are taken in their order; a start is not
    looked at."""
    experiment = load_experiment("prompt_length")

    def changed(*overrides):
        trials = make_trials(experiment, "quickstart", overrides)
        return [a.method.name for a, b in zip(trials, plain, strict=True) if trial_id(a) != b]

    plain = [trial_id(made) for made in make_trials(experiment, "quickstart")]
    assert changed(("train.dropout", "0.1")) == ["prompt"] * 2
    assert changed(("train.steps", "60"), ("eval.every", "20")) == ["prompt"] * 2
    assert changed(("method.common_tokens", "100")) == ["prompt"] * 2
    full = make_trials(experiment, "full")
    fewer = make_trials(experiment, "full", [("method.common_tokens", "100")])
    starts = {b.method.init for a, b in zip(full, fewer, strict=True) if trial_id(a) != trial_id(b)}
    assert starts == {"vocabulary", "labels"}
    words = [("method.init_text", "a film"), ("method.init", "text"), ("method.length", "2")]
    with pytest.raises(UserError, match="are the same"):  # but no complaint of init_text
        make_trials(experiment, "quickstart", words)


def test_mistakes_in_what_to_sweep(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown experiment 'prompt_lenght' .did you mean"):
        load_experiment("prompt_lenght")
    experiment = load_experiment("prompt_length")
    with pytest.raises(UserError, match="unknown subset 'half'; known: full, quickstart"):
        make_trials(experiment, "half")
    with pytest.raises(UserError, match="unknown config key 'method.lenght'"):
        make_trials(experiment, "full", [("method.lenght", "3")])
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("CAPTION = ''\n")
    with pytest.raises(
        UserError, match="mine.py: not an experiment: it lacks sweep, table, figure"
    ):
        load_experiment("mine.py")
    Path("mine.py").write_text("1/0\n")
    with pytest.raises(UserError, match="mine.py, line 1: ZeroDivisionError"):
        load_experiment("mine.py")


def test_a_mistake_in_an_experiment_is_one_line(tmp_path, monkeypatch):
    """Mutation: its functions are called as they are."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "CAPTION = ''\ndef sweep(subset):\n    yield [][0]\n"
        "def table(rows):\n    return rows.names\nfigure = table\n"
    )
    mine = load_experiment("mine.py")
    with pytest.raises(UserError, match="mine.py, line 3: IndexError: list index out of range"):
        make_trials(mine)
    with pytest.raises(UserError, match="mine.py, line 5: AttributeError: 'list' object"):
        write_outputs(mine, [], tmp_path)


def test_the_working_directorys_experiments_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/prompt_length.py").write_text(
        "CAPTION = 'mine'\nsweep = table = figure = print\n"
    )
    assert load_experiment("prompt_length").CAPTION == "mine"


def test_dry_run_says_what_each_trial_costs(tmp_path):
    trials = [config(1), config(5), config(20, name="none")]
    results.write_result(sweep.trial_folder(tmp_path, trials[0]), done_row(trials[0]))
    cost = {"trainable": 576, "flops": 2e12, "memory_bytes": 2**30, "seconds": 90.0}
    table, note = sweep_cost(trials, tmp_path, lambda made: cost, here="cpu", target="tpu")
    assert note.startswith("Times are estimates for this machine's cpu") and "on tpu" in note
    assert list(table["state"]) == ["done", "to run", "to run", ""]
    assert list(map(str, table["steps"])) == ["100", "100", "0", ""]
    assert list(table["time"])[:2] == ["1 min 30 s"] * 2
    assert (table["trial"].iloc[-1], table["time"].iloc[-1]) == ("2 to run", "3 min 0 s")
    assert table["FLOPs"].iloc[-1] == "4e+12"
    assert table["memory"].iloc[0] == "1.00 GiB"
    assert len(list(tmp_path.iterdir())) == 1


def test_finished_trials_of_the_target_correct_a_dry_run(tmp_path):
    """Mutations: rows of another backend correct it; so does compilation, or the time of trials
    that ran beside; the ratio of one program is used for others although theirs is known."""
    trials = [config(length) for length in (1, 1, 5, 5, 20)]
    for number, one in enumerate(trials):
        one.seed = number
    measured = {0: (60.0, "tpu", 1), 1: (1.0, "cpu", 1), 2: (900.0, "tpu", 2)}
    for number, (seconds, platform, members) in measured.items():
        row = done_row(trials[number]) | {"seconds": seconds + 7, "compile_seconds": 7.0}
        row |= {"members": members, "devices": {"platform": platform}}
        results.write_result(sweep.trial_folder(tmp_path, trials[number]), row)
    cost = {"trainable": 576, "flops": 2e12, "memory_bytes": 2**30, "seconds": 100.0}
    table, note = sweep_cost(trials, tmp_path, lambda made: cost, here="cpu", target="tpu")
    assert "corrected by 2 finished trials on tpu: 2.55 times as long" in note
    expected = [60, 60, 450, 450, 255, 450 + 255]
    assert list(table["time"]) == [duration(seconds) for seconds in expected]


def test_a_dry_run_says_which_trials_would_fail(tmp_path):
    """Mutations: one that fails ends all; models are loaded in the order of the trials."""
    asked, trials = [], [config(length) for length in (1, 2, 3)]
    trials[1].model.name = "other"

    def estimate(made):
        asked.append(made.method.length)
        if made.method.length == 3:
            raise UserError("no data")
        return {"trainable": 576, "flops": 2e12, "memory_bytes": 2**30, "seconds": 90.0}

    table, _ = sweep_cost(trials, tmp_path, estimate, here="cpu", target="cpu")
    assert list(table["state"]) == ["to run", "to run", "fails: no data", ""]
    assert list(table["steps"])[:3] == [100] * 3
    assert (table["trial"].iloc[-1], table["time"].iloc[-1]) == ("2 to run", "3 min 0 s")
    assert sorted(asked) == [1, 2, 3] and abs(asked.index(1) - asked.index(3)) == 1


def test_prompt_length_sweeps_what_it_says():
    experiment = load_experiment("prompt_length")
    full = make_trials(experiment, "full")
    assert len(full) == 4 * 3 * 3 + 4
    quick = make_trials(experiment, "quickstart")
    assert [made.method.name for made in quick] == ["none"] + ["fewshot"] * 3 + ["prompt"] * 2
    assert {made.method.length for made in quick if made.method.name == "prompt"} == {20, 100}
    assert {made.method.shots for made in quick if made.method.name == "fewshot"} == {8}


def test_rows_of_other_experiments_may_lie_beside():
    """Mutation: a method that is not this experiment's ends in an error."""
    experiment, rows = load_experiment("prompt_length"), experiment_rows("quickstart")
    table = experiment.table([done_row(config(name="lora")), *rows])
    assert table["method"].tolist()[-1] == "lora" and table["chosen"].tolist()[-1] == ""
    experiment.figure([done_row(config(name="lora")), *rows])
