import json
from pathlib import Path

import matplotlib
import pytest

from softprompt import results
from softprompt.config import base_config, trial_id, trial_name
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.trials import outputs, sweep
from softprompt.trials.forecast import Forecast


def config(length=20, seed=0, name="prompt"):
    made = base_config()
    made.method.name = name
    made.method.length = length
    made.seed = seed
    made.model.dtype = "float32"
    return made


def done_row(made, accuracy=0.8):
    return results.make_row(
        made,
        status="done",
        seconds=1.0,
        steps=made.train.steps,
        trainable=made.method.length * 576,
        metrics={
            "validation": {"accuracy": accuracy, "examples": 100},
            "test": {"accuracy": accuracy, "examples": 200},
        },
    )


class Runner:
    """A run_trial that only writes the row, and remembers what it was asked for."""

    def __init__(self, errors=None):
        self.errors = errors or {}
        self.ran = []

    def __call__(self, made, folder):
        self.ran.append(made.method.length)
        if made.method.length in self.errors:
            raise self.errors[made.method.length]
        row = done_row(made)
        results.write_result(folder, row)
        return row


def run(trials, workdir, runner):
    with Progress() as progress:
        return sweep.run_sweep(trials, workdir, runner, progress=progress)


def test_trials_run_in_order_and_a_rerun_runs_none(tmp_path):
    runner = Runner()
    trials = [config(1), config(5), config(20)]
    assert run(trials, tmp_path, runner) == []
    assert runner.ran == [1, 5, 20]
    assert run(trials, tmp_path, runner) == []
    assert runner.ran == [1, 5, 20]
    assert run([*trials, config(100)], tmp_path, runner) == []
    assert runner.ran == [1, 5, 20, 100]


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

    with Progress() as progress:
        trials = [config(1), config(5), config(2)]
        sweep.run_sweep(trials, tmp_path, Runner(), progress=progress, estimate=estimate)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "trial 1 of 3: prompt-1-vocabulary-s0, about 3 min 0 s left"
    assert lines[1] == "prompt-1-vocabulary-s0: test accuracy 0.800 on 200 examples, 1 s"
    assert lines[4] == "trial 3 of 3: prompt-2-vocabulary-s0, about 0 s left"
    assert len(lines) == 6


@pytest.mark.parametrize("width", [1, 2, 4])
def test_trials_side_by_side_are_not_taken_for_one_after_another(width):
    """Breaks when the first of several that run at a time bears all of their time."""
    todo = {index: config(index + 1) for index in range(8)}
    forecast = Forecast(todo, lambda made: {"seconds": 10.0})
    forecast.estimate_model(todo[0])
    assert forecast.left() == 80
    left = []
    for index in range(8):
        first = index % width == 0  # of a round of 30 s, whose others end right behind
        beside = [other for other in todo if other in forecast.todo and other > index][: width - 1]
        forecast.end(index, 30.0 if first else 0.0, done=True, beside=beside)
        left.append(forecast.left())
    assert left == pytest.approx([30 * (7 - index) // width * 1.0 for index in range(8)], abs=30)
    assert left[width - 1] == pytest.approx(30 * (8 / width - 1))
    assert left[0] == left[width - 1]


def test_a_forecast_learns_from_the_last_trials_of_a_kind():
    """Breaks when what zero-shot scoring took is the scale of training, once a trained trial is
    finished; when all trials count alike, or failed ones count."""
    todo = {index: config(index + 1, name="prompt" if index else "none") for index in range(6)}
    forecast = Forecast(todo, lambda made: {"seconds": 10.0})
    forecast.estimate_model(todo[0])
    forecast.end(0, 100.0, done=True)
    assert forecast.left() == 500, "nothing better is known"
    forecast.end(1, 20.0, done=True)
    assert forecast.left() == 80
    forecast.end(2, 1.0, done=False)
    assert forecast.left() == 60
    forecast.end(3, 10.0, done=True)
    assert 20 < forecast.left() < 2 * 15, "the last one counts most"


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

    with Progress() as progress:
        sweep.run_sweep(trials, tmp_path, Looking(), progress=progress, estimate=estimate)
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
    parts = [sweep.take_shard(trials, (part, 3)) for part in (1, 2, 3)]
    assert sorted(made.method.length for part in parts for made in part) == list(range(1, 8))
    assert sweep.parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/2"):
        with pytest.raises(UserError, match="--shard is"):
            sweep.parse_shard(text)


def test_the_same_trial_twice_is_an_error():
    experiment = sweep.load_experiment("prompt_length")
    with pytest.raises(UserError, match="trials 5 and 7 of the sweep are the same"):
        sweep.make_trials(experiment, "quickstart", [("method.length", "20")])


def test_an_override_is_for_the_trials_that_read_it():
    """Mutation: the prompts are other trials with other shots; a key that no trial reads passes."""
    experiment = sweep.load_experiment("prompt_length")
    plain, other = (
        sweep.make_trials(experiment, "quickstart", overrides)
        for overrides in ((), [("method.shots", "4")])
    )
    changed = [
        a.method.name for a, b in zip(plain, other, strict=True) if trial_id(a) != trial_id(b)
    ]
    assert changed == ["fewshot"] * 3
    with pytest.raises(UserError, match="'method.rank' is 4; method.name=.* has no such key"):
        sweep.make_trials(experiment, "quickstart", [("method.rank", "4")])


def test_an_override_of_training_is_for_what_is_trained():
    """And one of a start for the trials that start so, whatever the order of the words. Mutations:
    zero-shot is another trial with other steps; overrides are taken in their order; a start is not
    looked at."""
    experiment = sweep.load_experiment("prompt_length")

    def changed(*overrides):
        trials = sweep.make_trials(experiment, "quickstart", overrides)
        return [a.method.name for a, b in zip(trials, plain, strict=True) if trial_id(a) != b]

    plain = [trial_id(made) for made in sweep.make_trials(experiment, "quickstart")]
    assert changed(("train.dropout", "0.1")) == ["prompt"] * 3
    assert changed(("train.steps", "60"), ("eval.every", "20")) == ["prompt"] * 3
    assert changed(("method.common_tokens", "100")) == ["prompt"] * 3
    full = sweep.make_trials(experiment, "full")
    fewer = sweep.make_trials(experiment, "full", [("method.common_tokens", "100")])
    starts = {b.method.init for a, b in zip(full, fewer, strict=True) if trial_id(a) != trial_id(b)}
    assert starts == {"vocabulary", "labels"}
    words = [("method.init_text", "a film"), ("method.init", "text"), ("method.length", "2")]
    with pytest.raises(UserError, match="are the same"):  # but no complaint of init_text
        sweep.make_trials(experiment, "quickstart", words)


def test_mistakes_in_what_to_sweep(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="unknown experiment 'prompt_lenght' .did you mean"):
        sweep.load_experiment("prompt_lenght")
    experiment = sweep.load_experiment("prompt_length")
    with pytest.raises(UserError, match="unknown subset 'half'; known: full, quickstart"):
        sweep.make_trials(experiment, "half")
    with pytest.raises(UserError, match="unknown config key 'method.lenght'"):
        sweep.make_trials(experiment, "full", [("method.lenght", "3")])
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("CAPTION = ''\n")
    with pytest.raises(UserError, match="mine.py: no experiment, it lacks sweep, table, figure"):
        sweep.load_experiment("mine.py")
    Path("mine.py").write_text("1/0\n")
    with pytest.raises(UserError, match="mine.py, line 1: ZeroDivisionError"):
        sweep.load_experiment("mine.py")


def test_a_mistake_in_an_experiment_is_one_line(tmp_path, monkeypatch):
    """Mutation: its functions are called as they are."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "CAPTION = ''\ndef sweep(subset):\n    yield [][0]\n"
        "def table(rows):\n    return rows.names\nfigure = table\n"
    )
    mine = sweep.load_experiment("mine.py")
    with pytest.raises(UserError, match="mine.py, line 3: IndexError: list index out of range"):
        sweep.make_trials(mine)
    with pytest.raises(UserError, match="mine.py, line 5: AttributeError: 'list' object"):
        outputs.write_outputs(mine, [], tmp_path)


MINE = """
import pandas
from softprompt.analysis.plots import named_points
from softprompt.config import base_config

CAPTION = "mine"
sweep = lambda subset: [base_config()]
table = lambda rows: pandas.DataFrame({"n": [len(rows)]})
figure = lambda rows: named_points({}, xlabel="", ylabel="")
"""


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("CAPTION = None", "CAPTION is None; allowed: a string"),
        ("table = 3", "table is 3; allowed: a function"),
        ("sweep = lambda subset: None", r"sweep\(\) returned None \(NoneType\); allowed: a list"),
        ("sweep = lambda subset: []", r"sweep\('full'\) returned no config; allowed: a list of"),
        (
            "sweep = lambda subset: [1]",
            r"sweep\('full'\) returned a list with 1 \(int\); allowed: a list of con",
        ),
        (
            "table = lambda rows: None",
            r"table\(\) returned None \(NoneType\); allowed: a DataFrame",
        ),
        ("figure = lambda rows: []", r"figure\(\) returned \[\] \(list\); allowed: a Figure"),
    ],
)
def test_what_an_experiment_returns_is_checked(tmp_path, monkeypatch, wrong, message):
    """Breaks when what it returns is taken as it is; when a wrong figure leaves a table behind."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(f"{MINE}\n{wrong}\n")
    with pytest.raises(UserError, match=f"{tmp_path}/mine.py: {message}"):
        mine = sweep.load_experiment("mine.py")
        sweep.make_trials(mine)
        outputs.write_outputs(mine, [], "out")
    assert not Path("out").exists()


def test_another_experiments_files_stand_beside_the_sweeps_own(tmp_path, monkeypatch):
    """Breaks when `table --experiment OTHER` overwrites the table of the sweep; when the caption
    says nothing of the rows, or of those that failed, or these reach the experiment's table."""
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "other"):
        Path(f"{name}.py").write_text(MINE)
    mine, other = (sweep.load_experiment(f"{name}.py") for name in ("mine", "other"))
    with pytest.raises(UserError, match="no folder 'out'"):
        outputs.write_trial_outputs(mine, "out")
    failed = results.make_row(config(5), status="failed", error="no memory", seconds=1.0)
    results.write_result(Path("out/failed"), failed)
    with pytest.raises(UserError, match="no finished trial below 'out': 1 of 1 trials failed"):
        outputs.write_trial_outputs(mine, "out")
    results.write_result(Path("out/done"), done_row(config(20)))
    outputs.claim_outputs(mine, "out")
    outputs.claim_outputs(other, "out")
    assert outputs.write_trial_outputs(mine, "out")[0] == "table.md"
    before = Path("out/table.md").read_text()
    assert "|   1 |" in before
    assert "mine 1 trials of movie_sentiment, smollm2-135m-instruct-q4. 1 of 2 trials" in before
    assert "failed: prompt-5-vocabulary-s0 (no memory)." in before
    Path("out/table.md").write_text("")
    assert outputs.write_trial_outputs(other, "out")[-1] == "other-figure.pdf"
    assert Path("out/table.md").read_text() == ""
    assert Path("out/other-table.md").read_text() == before
    Path("out/sweep.json").write_text("[]")
    with pytest.raises(UserError, match="out/sweep.json: not readable"):
        outputs.write_trial_outputs(mine, "out")


def test_the_working_directorys_experiments_come_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("experiments").mkdir()
    Path("experiments/prompt_length.py").write_text(
        "CAPTION = 'mine'\nsweep = table = figure = print\n"
    )
    assert sweep.load_experiment("prompt_length").CAPTION == "mine"


def test_dry_run_says_what_each_trial_costs(tmp_path):
    trials = [config(1), config(5), config(20, name="none")]
    results.write_result(sweep.trial_folder(tmp_path, trials[0]), done_row(trials[0]))
    cost = {"trainable": 576, "flops": 2e12, "memory_bytes": 2**30, "seconds": 90.0}
    table = sweep.dry_run(trials, tmp_path, lambda made: cost)
    assert list(table["state"]) == ["done", "to run", "to run", ""]
    assert list(map(str, table["steps"])) == ["100", "100", "0", ""]
    assert list(table["time"])[:2] == ["1 min 30 s"] * 2
    assert (table["trial"].iloc[-1], table["time"].iloc[-1]) == ("2 to run", "3 min 0 s")
    assert table["FLOPs"].iloc[-1] == "4e+12"
    assert table["memory"].iloc[0] == "1.00 GiB"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_dry_run_says_which_trials_would_fail(tmp_path):
    """Mutations: one that fails ends all; models are loaded in the order of the trials."""
    asked, trials = [], [config(length) for length in (1, 2, 3)]
    trials[1].model.name = "other"

    def estimate(made):
        asked.append(made.method.length)
        if made.method.length == 3:
            raise UserError("no data")
        return {"trainable": 576, "flops": 2e12, "memory_bytes": 2**30, "seconds": 90.0}

    table = sweep.dry_run(trials, tmp_path, estimate)
    assert list(table["state"]) == ["to run", "to run", "fails: no data", ""]
    assert list(table["steps"])[:3] == [100] * 3
    assert (table["trial"].iloc[-1], table["time"].iloc[-1]) == ("2 to run", "3 min 0 s")
    assert sorted(asked) == [1, 2, 3] and abs(asked.index(1) - asked.index(3)) == 1


def experiment_rows(subset):
    trials = sweep.make_trials(sweep.load_experiment("prompt_length"), subset)
    return [done_row(made, 0.7 + 0.005 * number) for number, made in enumerate(trials)]


def test_prompt_length_sweeps_what_it_says():
    experiment = sweep.load_experiment("prompt_length")
    full = sweep.make_trials(experiment, "full")
    assert len(full) == 4 * 3 * 3 + 4
    quick = sweep.make_trials(experiment, "quickstart")
    assert [made.method.name for made in quick] == ["none"] + ["fewshot"] * 3 + ["prompt"] * 3
    assert {made.method.length for made in quick if made.method.name == "prompt"} == {20, 100}
    assert {made.method.shots for made in quick if made.method.name == "fewshot"} == {8}


@pytest.mark.parametrize("subset", ["full", "quickstart"])
def test_outputs_are_written_and_pure_functions_of_the_rows(tmp_path, subset):
    experiment, rows = sweep.load_experiment("prompt_length"), experiment_rows(subset)
    before = json.dumps(rows)
    table = experiment.table(rows)
    assert json.dumps(rows) == before
    assert table.equals(experiment.table(rows[::-1]))
    assert (table["chosen"] == "yes").sum() == 1
    assert table["method"].tolist()[:3] == ["zero-shot", "few-shot", "soft prompt"]
    outputs.write_outputs(experiment, rows, tmp_path)
    names = {"table.md", "table.csv", "table.tex", "figure.png", "figure.pdf"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert experiment.CAPTION in (tmp_path / "table.md").read_text()
    assert matplotlib.rcParams["axes.grid"] is False


def test_rows_of_other_experiments_may_lie_beside():
    """Mutation: a method that is not this experiment's ends in an error."""
    experiment, rows = sweep.load_experiment("prompt_length"), experiment_rows("quickstart")
    table = experiment.table([done_row(config(name="lora")), *rows])
    assert table["method"].tolist()[-1] == "lora" and table["chosen"].tolist()[-1] == ""
    experiment.figure([done_row(config(name="lora")), *rows])
