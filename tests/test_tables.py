import io
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from softprompt.analysis import plots, tables
from softprompt.config import base_config, set_key, to_dict


def row(accuracy=0.8, *, status="done", error="", **keys):
    config = base_config()
    for key, value in keys.items():
        set_key(config, key.replace("__", "."), value)
    scores, again = ({"accuracy": accuracy, "macro_f1": accuracy, "examples": 100} for _ in "ab")
    return {
        "trial": "0123456789",
        "name": "a trial",
        "status": status,
        "error": error,
        "config": to_dict(config),
        "seconds": 10.0,
        "steps": 100,
        "trainable": 11520,
        "metrics": {"validation": scores, "test": again} if status == "done" else {},
    }


@pytest.mark.parametrize(("right", "examples"), [(0, 10), (10, 10), (1_700, 2_000)])
def test_wilson_interval_is_scipys(right, examples):
    found = stats.binomtest(right, examples).proportion_ci(method="wilson")
    assert tables.wilson_interval(right / examples, examples) == pytest.approx(
        (found.low, found.high), abs=1e-12
    )


def test_seeds_that_agree_leave_the_interval_of_the_examples():
    """Breaks when the seeds' spread alone makes the interval, whose width is then zero; when three
    seeds count as three test sets."""
    wilson = pytest.approx(tables.wilson_interval(0.8, 100), abs=1e-12)
    for seeds in (1, 2, 3):
        assert tables.seeds_interval([[(0.8, 100)]] * seeds) == wilson


def test_few_seeds_that_differ_little_have_no_interval_from_0_to_1():
    """Breaks when Student's quantile for one degree of freedom multiplies the examples' part too;
    when the seeds' part is left out."""
    low, high = tables.seeds_interval([[(0.70, 200)], [(0.76, 200)]])
    alone = tables.wilson_interval(0.73, 200)
    assert 0.6 < low < alone[0] and alone[1] < high < 0.85
    assert tables.seeds_interval([[(0.2, 10**6)], [(0.9, 10**6)]]) == (0.0, 1.0)
    many = tables.seeds_interval([[(0.8, 10**9)], [(0.82, 10**9)], [(0.87, 10**9)]])
    wanted = stats.t.interval(0.95, 2, loc=0.83, scale=stats.sem([0.8, 0.82, 0.87]))
    assert many == pytest.approx(wanted, abs=1e-4)


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.05])
def test_the_interval_over_seeds_covers_the_mean(spread):
    """Breaks when either part is left out, or the normal quantile is taken for few seeds."""
    random, covered = np.random.default_rng(0), []
    for _ in range(1000):
        rates = np.clip(0.8 + spread * random.standard_normal(3), 0, 1)
        right = random.random(200)[:, None] < rates  # seeds share the test examples
        low, high = tables.seeds_interval([[(float(share), 200)] for share in right.mean(axis=0)])
        covered.append(low <= 0.8 <= high)
    assert 0.94 < np.mean(covered) < 0.99


def test_a_mixture_is_as_uncertain_as_its_smallest_task():
    """The variance of a mean of tasks; mutation: the examples of all count as of one task."""
    tasks = [(0.9, 1000), (0.5, 10)]
    low, high = tables.mean_interval(tasks)
    deviation = math.sqrt(sum(share * (1 - share) / n for share, n in tasks)) / 2
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.15)
    draws = np.random.default_rng(0).binomial(
        [n for _, n in tasks], [s for s, _ in tasks], (999, 2)
    )
    found = [tables.mean_interval([(x / 1000, 1000), (y / 10, 10)]) for x, y in draws]
    assert 0.93 < np.mean([one[0] <= 0.7 <= one[1] for one in found]) < 0.99
    own = {"accuracy": 0.7, "examples": 1010, "large/accuracy": 0.9, "large/examples": 1000}
    own |= {"small/accuracy": 0.5, "small/examples": 10, "empty/accuracy": 0.0, "empty/examples": 0}
    mixed = row() | {"metrics": {"validation": own, "test": own}}
    table = tables.summarise([mixed], {"name": lambda row: row["name"]})
    assert (table["low"][0], table["high"][0]) == pytest.approx((low, high))
    without = tables.summarise([mixed], {"name": len}, metric="macro_f1")
    assert without["low"].tolist() == [None], "no mean over examples"
    del mixed["metrics"]["test"]["small/accuracy"]
    table = tables.summarise([mixed], {"name": len})
    assert (table["test accuracy"][0], table["low"][0]) == (0.7, None), "a task lacks the metric"


def test_summary_groups_seeds():
    rows = [row(0.80), row(0.84, seed=1), row(0.70, method__length=5)]
    table = tables.summarise(rows, {"length": lambda row: row["config"]["method"]["length"]})
    assert table["length"].tolist() == [20, 5]
    assert table["seeds"].tolist() == [2, 1]
    assert table["test accuracy"].tolist() == pytest.approx([0.82, 0.70])
    both = tables.seeds_interval([[(0.8, 100)], [(0.84, 100)]])
    assert (table["low"][0], table["high"][0]) == both
    one = pytest.approx(tables.wilson_interval(0.70, 100))
    assert (table["low"][1], table["high"][1]) == one
    assert table["test examples"].tolist() == [100, 100]
    assert not {"also", "note", "status"} & set(table.columns)
    assert table["values"].tolist() == [(0.80, 0.84), (0.70,)]
    assert tables.summarise([], {"length": len}).columns[0] == "length"


def test_steps_that_differ_within_a_group_are_a_range():
    """Breaks when a group's steps are its first seed's; when seeds that agree are a range."""
    rows = [row(0.8), row(0.8, seed=1), row(0.7, method__length=5)]
    rows[1]["steps"] = 50
    for one, step in zip(rows, (75, 25, 100), strict=True):
        one["metrics"]["selected_step"] = step
    table = tables.summarise(rows, {"length": lambda row: row["config"]["method"]["length"]})
    assert table["steps"].tolist() == ["50 to 100", 100]
    assert table["selected step"].tolist() == ["25 to 75", 100]


def test_scores_that_mislead_are_noted():
    """Breaks when a prompt of step 0, or a constant prediction, looks like any other."""
    rows = [row(0.8), row(0.8, seed=1), row(0.7, method__length=5)]
    rows[1]["metrics"]["selected_step"] = 0
    rows[2]["metrics"]["test"]["large/classes_predicted"] = 1
    rows[2]["shared_texts"] = 1200
    by = {"length": lambda row: row["config"]["method"]["length"]}
    assert tables.summarise(rows, by)["note"].tolist() == [
        "step 0 selected: untrained (1 of 2 seeds)",
        "one class predicted; 1,200 texts in two splits",
    ]
    overview = tables.overview(rows)
    assert overview["note"].tolist()[:2] == ["", "step 0 selected: untrained"]
    assert overview["note"].tolist()[2].startswith("one class predicted; ")
    assert overview["selected step"].tolist()[1] == 0
    assert "test large/classes_predicted" not in overview


def test_what_differs_in_more_than_the_seed_is_no_group():
    """As after another run of a sweep with other steps. Mutations: all of them are seeds; the
    column is always there; what else is measured tells trials apart."""
    by = {"length": lambda row: row["config"]["method"]["length"]}
    rows = [row(0.8), row(0.9, seed=1, train__steps=50), row(0.7, seed=1, eval__latency=True)]
    table = tables.summarise([*rows, row(0.6, method__length=5)], by)
    assert table.columns[:3].tolist() == ["length", "also", "seeds"]
    assert table["also"].tolist() == ["train.steps=100", "train.steps=50", ""]
    assert table["values"].tolist() == [(0.8, 0.7), (0.9,), (0.6,)]
    assert "also" not in tables.summarise(rows[::2], by)


def test_a_failed_or_unscored_trial_counts_for_nothing():
    unlabelled = row(method__length=5)
    unlabelled["metrics"]["test"] = {"examples": 0}
    rows = [row(0.8), row(status="failed", error="out of\nmemory", seed=1), unlabelled]
    table = tables.summarise(rows, {"length": lambda row: row["config"]["method"]["length"]})
    assert table["seeds"].tolist() == [1, 1]
    assert table["test accuracy"].tolist() == [0.8, None]
    assert table["status"].tolist() == ["1 of 2 failed: out of memory", ""]


def test_the_best_line_is_chosen_among_the_eligible():
    table = pd.DataFrame({"score": [0.9, 0.7, None, 0.8]}, dtype=object)
    among = pd.Series([False, True, True, True])
    marked = tables.mark_best(table, by="score", among=among)
    assert marked["chosen"].tolist() == ["", "", "", "yes"]
    nobody = tables.mark_best(table, by="score", among=pd.Series([False] * 4))
    assert nobody["chosen"].tolist() == [""] * 4


def test_overview_shows_what_varies():
    rows = [row(0.8), row(0.7, seed=1), row(status="failed", error="no memory", seed=2)]
    table = tables.overview(rows)
    assert table["seed"].tolist() == [0, 1, 2]
    assert "method.length" not in table
    assert table["test accuracy"].tolist()[:2] == [0.8, 0.7]
    assert math.isnan(table["test accuracy"][2])
    assert table["status"].tolist()[2] == "failed: no memory"


TABLE = pd.DataFrame(
    {"name": ["a|b", "50 % & more_of #1"], "n": [11520, None], "share": [0.83, 1e-5]}, dtype=object
)


def test_markdown():
    assert tables.to_markdown(TABLE, "What it is.").splitlines() == [
        "| name              |      n | share |",
        "| ----------------- | -----: | ----: |",
        "| a\\|b              | 11,520 | 0.830 |",
        "| 50 % & more_of #1 |        | 1e-05 |",
        "",
        "What it is.",
    ]


def test_csv_keeps_every_digit():
    again = pd.read_csv(io.StringIO(tables.to_csv(TABLE)))
    assert again["name"].tolist() == TABLE["name"].tolist()
    assert again["share"].tolist() == [0.83, 1e-5]


def test_latex_escapes():
    text = tables.to_latex(TABLE, "95 % of #1")
    assert "50 \\% \\& more\\_of \\#1" in text
    assert "\\caption{95 \\% of \\#1}" in text
    assert "\\begin{tabular}{lrr}" in text


def test_labels_are_spread_apart_in_order():
    found = plots.separate([0.8, 0.5, 0.81, 0.79], gap=0.1)
    assert found == pytest.approx([0.5, 0.7, 0.8, 0.9])
    assert plots.separate([0.1, 0.9], gap=0.1) == [0.1, 0.9]
    many = plots.separate(np.random.default_rng(0).random(30).tolist(), gap=0.05)
    assert np.diff(many).min() > 0.05 - 1e-9


def test_length_plot_draws_every_point_and_band():
    point = plots.Point(20, 0.8, 0.7, 0.9, (0.75, 0.85))
    figure = plots.length_plot(
        {"labels": [point], "uniform": [], "vocabulary": [plots.Point(5, 0.6, 0.5, 0.7, (0.6,))]},
        {"zero-shot": point},
        xlabel="length",
        ylabel="accuracy",
    )
    (axes,) = figure.axes
    assert {text.get_text() for text in axes.texts} == {"labels", "vocabulary", "zero-shot"}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5", "20"]
    colours = {text.get_text(): text.get_color() for text in axes.texts}
    assert colours["vocabulary"] == plots.COLOURS[2]
    assert {text.xy[0] for text in axes.texts} == {1.0}, "beside the axes, where nothing is drawn"


def test_category_plot_draws_a_dot_in_each_category():
    """Breaks when series stand on one another, or a baseline beyond the second is left out."""
    point = plots.Point(0, 0.8, 0.7, 0.9, (0.75, 0.85))
    figure = plots.category_plot(
        {"few": {"prompt": point, "LoRA": point}, "all": {"LoRA": point}},
        dict.fromkeys(("zero-shot", "few-shot", "guess"), point),
        ylabel="accuracy",
    )
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["prompt", "LoRA"]
    few, every = (line[0].get_xdata() for line in axes.containers)
    assert list(few) == pytest.approx([-0.15, 0.85]) and list(every) == pytest.approx([1.15])
    assert {text.get_text() for text in axes.texts} == {"zero-shot", "few-shot", "guess"}


def test_the_subject_of_rows():
    """Breaks when it is that of the first row, or has a folder in it."""
    rows = [row(), row(task__name="sms_spam", model__name="runs/models/tiny/")]
    assert tables.subject(rows[:1]) == "movie_sentiment, smollm2-135m-instruct-q4"
    both = "movie_sentiment and sms_spam, smollm2-135m-instruct-q4 and tiny"
    assert tables.subject(rows) == both
    mixed = row(data__mixture="boolq, sarcasm")
    assert tables.subject([*rows, mixed]).startswith("3 tasks, ")
    assert tables.subject([mixed]).startswith("boolq+sarcasm, ")
    assert tables.subject([{"config": {}}]) == ", ", "an older version's"


def test_html_has_the_cells_of_markdown():
    """Breaks when a cell is not escaped, a missing number is shown, or a column is turned round."""
    table = pd.DataFrame({"name": ["a < b", "c"], "score": [0.5, None], "count": [1234, 5]})
    assert tables.to_html(table) == (
        '<table><thead><tr><th>name</th><th class="number">score</th><th class="number">count</th>'
        '</tr></thead>\n<tbody><tr><td>a &lt; b</td><td class="number">0.500</td>'
        '<td class="number">1,234</td></tr>\n<tr><td>c</td><td class="number"></td>'
        '<td class="number">5</td></tr></tbody></table>'
    )
