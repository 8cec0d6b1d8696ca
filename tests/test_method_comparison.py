"""The comparison of methods: its trials, and its table and figure of made-up rows."""

import collections

import pytest

from softprompt.config import to_dict
from softprompt.errors import UserError
from softprompt.trials.experiment import load_experiment, make_trials
from softprompt.trials.outputs import write_outputs

PARAMETERS = 1_000_000


@pytest.fixture(scope="module")
def experiment():
    return load_experiment("method_comparison")


def row_of(experiment, config, number):
    """A row whose numbers say which trial it is of; the rate's place in the grid is its score."""
    name = experiment._name({"config": to_dict(config)})
    rates = experiment.RATES.get(name, ())
    place = rates.index(config.optimizer.rate) if config.optimizer.rate in rates else 0
    validation = (0.7, 0.9, 0.8)[place]
    trained = {"full": PARAMETERS, "zero-shot": 0}.get(name, 1000)
    metrics = {
        "validation": {"accuracy": validation, "examples": 200},
        "test": {"accuracy": validation - 0.05 + config.seed / 100, "examples": 500},
    }
    if config.eval.text:
        metrics["text"] = {"perplexity": 20.0 + (0 if name == "zero-shot" else 1 + config.seed)}
    if config.eval.latency:
        parts = {"overhead": 0.012, "low": -0.005, "high": 0.03}
        metrics["latency"] = {f"prefill_{key}": value for key, value in parts.items()}
        metrics["latency"] |= {f"token_{key}": 10 * value for key, value in parts.items()}
    return {
        "name": f"{name} {number}",
        "status": "done",
        "error": "",
        "config": to_dict(config),
        "weight_bytes": 0 if name == "full" else 2 * PARAMETERS,
        "delta_bytes": 4 * trained + 80,
        "trainable": trained,
        "seconds": 60.0,
        "steps": 50 if trained else None,
        "flops": 50 * 3e9 if trained else None,
        "step_seconds": 0.5 + config.seed if trained else None,
        "step_memory_bytes": 6 * 10**8 if trained else None,
        "metrics": metrics,
    }


def rows_of(experiment, subset):
    trials = make_trials(experiment, subset, [("model.dtype", "bfloat16")])
    return [row_of(experiment, config, number) for number, config in enumerate(trials)]


def test_every_method_has_the_same_budget(experiment):
    """Mutation: a method gets a rate more, or other steps, examples or seeds."""
    trials = make_trials(experiment, "full")
    assert len(trials) == 1 + 9 * 3 * 3 * 5
    seen = collections.Counter()
    for config in trials[1:]:
        name = experiment._name({"config": to_dict(config)})
        seen[name, config.optimizer.rate] += 1
        assert (config.train.steps, config.train.batch) == (240, 16)
    assert list(dict(seen)) == [
        (n, rate) for n, rates in experiment.RATES.items() for rate in rates
    ]
    assert set(seen.values()) == {3 * 5}
    units = {c.optimizer.rate_unit for c in trials if c.method.name == "prompt"}
    assert units == {"embedding_rms"}


def test_quick_and_search(experiment):
    """Mutation: a method is left out of a subset; the seeds of the four are not run."""
    quick = make_trials(experiment, "quick")
    seen = collections.Counter(experiment._name({"config": to_dict(c)}) for c in quick)
    assert seen == {
        "zero-shot": 1,
        **dict.fromkeys(experiment.RATES, 2),
        **dict.fromkeys(experiment.SEEDED, 6),
    }
    timed = [config for config in quick if config.eval.latency]
    assert len(timed) == 9
    assert {config.data.train_examples for config in timed} == {0}
    assert len(make_trials(experiment, "search")) == 1 + 9 * 3
    with pytest.raises(UserError, match="unknown subset 'half'; known: full, quick, search"):
        make_trials(experiment, "half")
    for name, rate in experiment.QUICK.items():
        assert rate in experiment.RATES[name], "not one that was searched"


def test_the_best_rate_is_chosen_on_validation(experiment):
    """Mutation: the first rate's line; the best on test; the mean over rates."""
    rows = rows_of(experiment, "full")
    for row in rows:  # the rate that validates worst tests best
        if row["metrics"]["validation"]["accuracy"] == 0.7:
            row["metrics"]["test"]["accuracy"] = 1.0
    table = experiment.table(rows).set_index("method")
    for name, rates in experiment.RATES.items():
        assert table["rate"][name] == rates[1]
        for column in ("100", "300", "1,000", "3,000", "all"):
            assert table[column][name] == pytest.approx(0.86)
        assert table["seeds"][name] == 3


def test_measured_and_claimed(experiment):
    """Mutation: a share of the frozen weights; a server with one delta, or with the frozen model
    beside full ones; the change of perplexity against something else than the base."""
    table = experiment.table(rows_of(experiment, "quick")[::-1]).set_index("method")
    assert list(table.index) == list(experiment.METHODS)
    prompt, full, base = (table.loc[name] for name in ("prompt", "full", "zero-shot"))
    assert (prompt["trained"], prompt["share"], prompt["claimed share"]) == (
        1000,
        "0.1 %",
        "< 0.1 %",
    )
    assert (full["share"], full["claimed share"]) == ("100 %", "100 %")
    assert prompt["MB a task"] == pytest.approx(0.00408)
    assert prompt["claimed MB"] == "1 to 5"
    assert (prompt["step s"], prompt["step GB"], prompt["step GFLOP"]) == (1.5, 0.6, 3)
    assert prompt["prefill"] == "+1.2 % (-0.5 to +3.0)"
    assert prompt["token"] == "+12.0 % (-5.0 to +30.0)"
    assert table["claimed latency"]["LoRA"] == "10 to 20 %"
    assert prompt["text"] == "+10.0%"
    assert table["text"]["BitFit"] == "+5.0%"
    assert prompt["server GB"] == pytest.approx((2e6 + 100 * 4080) / 1e9)
    assert full["server GB"] == pytest.approx(100 * 4_000_080 / 1e9)
    assert base["server GB"] == pytest.approx(2e6 / 1e9, rel=0.01)
    assert (base["trained"], base["token"]) == (0, None)
    assert base["all"] == pytest.approx(0.65)
    assert "note" not in table


def test_half_a_sweep(experiment, tmp_path):
    """Breaks when what is missing is an error, or a number."""
    rows = rows_of(experiment, "quick")
    for key in ("weight_bytes", "delta_bytes", "trainable", "step_seconds", "flops", "steps"):
        rows[1][key] = None  # an older version's row
    del rows[3]["step_memory_bytes"]
    rows[1]["metrics"] = {}
    alone = experiment.table(rows[1:2])
    assert alone.iloc[0].dropna().to_dict().keys() <= {
        *("method", "claimed share", "claimed MB", "claimed latency")
    }
    for part in (rows[1:4], rows[1:2], [], rows):
        write_outputs(experiment, part, tmp_path)


def test_the_figure_has_a_dot_for_each_method_and_number_of_examples(experiment):
    """Breaks when two series look alike; when a method is left out, or stands elsewhere."""
    (axes,) = experiment.figure(rows_of(experiment, "full")).axes
    looks = [(line[0].get_color(), line[0].get_marker()) for line in axes.containers]
    assert len(looks) == len(set(looks)) == 5
    names = [tick.get_text() for tick in axes.get_xticklabels()]
    assert names == list(experiment.METHODS)[1:]
    assert {len(line[0].get_xdata()) for line in axes.containers} == {len(names)}
    series = [text.get_text() for text in axes.get_legend().get_texts()]
    assert (series[0], series[-1]) == ("100 examples", "7,070 examples")
    assert axes.get_title(loc="left") == "movie_sentiment, smollm2-135m-instruct-q4"
