"""Verdicts of the artefacts on simulated trials: true effects hold, false ones are refuted."""

import numpy as np
import pytest

from experiments.paper import (
    continual,
    data_size,
    everything,
    figure3_length,
    figure3_pretraining,
    figure3_start,
    section7,
    spot,
    steps,
    study,
    table1,
    table2,
    table3,
    table5,
    table6,
)
from softprompt.config import resolve, to_dict, trial_id
from softprompt.errors import UserError
from softprompt.trials.outputs import experiment_name
from softprompt.trials.records import vote
from tests.paper.simulated import answers, record, seeds
from tests.paper.test_figure1 import PROMPT

TIERS = ("full", "laptop")
LARGE = study.SMOLLM2
LONGER = {1: (0.75, 0.76, 0.75), 20: PROMPT[LARGE], 100: (0.835, 0.84, 0.835)}


def verdicts(artefact, rows):
    return [finding.verdict for finding in artefact.findings(rows)]


def lengths(scores, **more):
    """Trials of Figure 3a with these accuracies by length."""
    return [
        row
        for length, accuracies in scores.items()
        for row in seeds(LARGE, "prompt", accuracies, method__length=length, **more)
    ]


def test_length():
    """Breaks when the shorter prompt's lead counts for the longer one."""
    assert verdicts(figure3_length, lengths(LONGER)) == ["holds"] * 2
    turned = {1: LONGER[20], 20: LONGER[1], 100: LONGER[100]}
    assert verdicts(figure3_length, lengths(turned)) == ["refuted"] * 2
    assert figure3_length.table(lengths(LONGER))["seeds"].tolist() == [3, 3, 3]


def test_start():
    """Breaks when an order is turned round."""
    scores = {"uniform": 0.60, "vocabulary": 0.66, "labels": 0.72}

    def trials(names):
        return [
            row
            for start, accuracy in zip(names, scores.values(), strict=True)
            for row in seeds(LARGE, "prompt", [accuracy] * 3, method__init=start)
        ]

    assert verdicts(figure3_start, trials(scores)) == ["holds"] * 2
    assert verdicts(figure3_start, trials(list(scores)[::-1])) == ["refuted"] * 2
    assert figure3_start.table(trials(scores))["start"].tolist() == list(scores)


def test_a_start_from_another_task():
    """Breaks when the usual start's lead counts, tasks are mixed up, or another dtype's start is
    another trial."""

    def trials(**accuracies):
        rows = []
        for seed in range(3):
            for config in spot.targets(seed):
                keys = {"method__init": config.method.init}
                if config.method.init == "file":
                    keys["method__init_file"] = "trial:0123456789"
                usual, gain = accuracies[config.task.name]
                accuracy = usual + gain * (config.method.init == "file")
                keys |= {"data__train_examples": 100, "data__subset_seed": seed}
                keys |= {"task__name": config.task.name}
                rows.append(record(LARGE, "prompt", seed, accuracy, **keys))
        return rows

    helped = trials(amazon_sentiment=(0.7, 0.08), question_type=(0.6, -0.05))
    assert verdicts(spot, helped) == ["holds"] * 2
    hurt = trials(amazon_sentiment=(0.7, -0.08), question_type=(0.6, 0.1))
    assert verdicts(spot, hurt) == ["refuted"] * 2
    assert spot.table(helped)["start"].tolist() == ["labels", "movie prompt"] * 2
    assert spot.table(helped)["score"].str[:4].tolist() == ["40.0", "56.0", "20.0", "10.0"]


def test_another_domain():
    """Breaks when the score there counts without the one at home, or methods change places."""

    def trials(prompt, full):
        rows = seeds(LARGE, "prompt", (0.86, 0.85, 0.86), shifted=prompt)
        return rows + seeds(LARGE, "full", (0.90, 0.91, 0.90), shifted=full)

    assert verdicts(table1, trials(0.80, 0.75)) == ["holds"]
    assert verdicts(table1, trials(0.80, 0.89)) == ["refuted"]
    assert verdicts(table1, trials(0.80, 0.845)) == ["undecided"]  # both lose about as much
    found = table1.table(trials(0.80, 0.75)).to_dict("records")
    assert [line["tested on"] for line in found] == list(table1.TASKS)
    assert found[1]["prompt - full"].startswith("10.0 (")
    assert verdicts(table1, trials(0.8, 0.7)[:3]) == ["not run"]


def test_verses():
    """Breaks when the score at home counts, or full fine-tuning's lead is the prompt's."""

    def trials(**accuracies):
        return [
            row
            for task, (other, _) in table2.OTHER.items()
            for method, accuracy in accuracies.items()
            for row in seeds(
                table2.MODEL,
                method,
                (0.6, 0.6, 0.6),
                shifted=accuracy,
                task__name=task,
                eval__transfer=other,
                data__test_examples=0,
            )
        ]

    assert verdicts(table2, trials(prompt=0.8, full=0.7)) == ["holds"] * 6
    found = trials(prompt=0.7, full=0.8)
    assert verdicts(table2, found) == ["refuted"] * 2 + ["holds"] * 4
    assert table2.findings(found)[2].found.value == pytest.approx(40 - 92, abs=0.5)
    good = trials(prompt=0.75, full=0.999)  # 7.8 and 6.1 points above the thresholds
    assert verdicts(table2, good)[2:] == ["holds", "refuted"] * 2
    near = trials(prompt=0.98, full=0.75)  # 4 and 2.3 above them
    assert verdicts(table2, near)[2:] == ["undecided", "holds", "holds", "holds"]
    assert table2.table(found)["threshold"].tolist() == ["92.0", "92.0", "93.7", "93.7"]


def test_thresholds_on_overlap():
    """Breaks when the verses change, or the threshold is chosen where it is tested."""
    for task, (other, score) in table2.OTHER.items():
        assert table2.threshold_score(task, other) == pytest.approx(score, abs=0.05)


def test_tasks_in_turn():
    """Breaks when the score on the last task counts, or a seed's trials are another's."""
    first = seeds(continual.MODEL, "full", (0.75, 0.76, 0.75))
    for accuracy, verdict in ((0.55, "holds"), (0.74, "refuted")):
        later = [
            record(
                f"runs/continual/s{seed}/question_type/start",
                "full",
                seed,
                0.9,
                shifted=accuracy,
                task__name="question_type",
                eval__transfer=study.TASK,
            )
            for seed in range(3)
        ]
        assert verdicts(continual, [*first, *later]) == [verdict]
    assert continual.table([*first, *later])["seeds"].tolist() == [3, 3]
    assert verdicts(continual, first) == ["not run"]


def test_a_vote():
    """Breaks when the vote is one member's answers, or a majority that is wrong counts."""
    members = [record(LARGE, "prompt", n, 0.85) for n in range(5)]
    assert verdicts(table3, members) == ["holds"]
    assert verdicts(table3, members[:4]) == ["not run"]
    lead = table3.findings(members)[0].found.value
    scores = [study.mean([row]).value for row in members]
    voted = 100 * vote(members, study.TASK).mean()
    assert lead == pytest.approx(voted - np.mean(scores))
    bad = [record(LARGE, "prompt", n, 0.95) for n in range(5)]
    for row in bad[:3]:  # three equal prompts, wrong on half of the examples, outvote two
        row["answers"] = record(LARGE, "prompt", 9, 0.5)["answers"]
    assert table3.findings(bad)[0].found.value < -30
    assert table3.table(members)["five prompts"].tolist() == ["mean", "best by validation", "vote"]


def test_time():
    """Breaks when the time of the best counts, or seeds are paired by their place in a list."""
    slow = lengths({100: LONGER[100]}, seconds=60)
    quick = lengths({1: LONGER[1], 20: LONGER[20]})
    for n, row in enumerate(slow):
        row["curve"][1][1] += n
    for n, row in enumerate(quick[:3]):  # of one vector
        row["curve"][1][1] += 10 * n
    assert [table5.seconds(row) for row in slow] == [60, 61, 62]
    assert verdicts(table5, quick + slow) == ["holds"]
    slow[0]["members"] = 2  # it shared the processor with another
    assert table5.findings(quick + slow)[0].found.value == pytest.approx((61 - 20 + 62 - 30) / 2)
    back = lengths({1: LONGER[1]}, seconds=90) + slow
    assert verdicts(table5, back) == ["refuted"]
    assert table5.table(quick + slow)["seeds"].tolist() == [3, 3, 2]


def test_search():
    """Breaks when trials are given another's values, chance or a few trials decide, or equal scores
    count as a lead."""

    drawn, whole = table6.settings(), []
    for seed, one in enumerate(drawn):
        config = to_dict(resolve(table6.config(LARGE, seed, one)))
        whole.append(record(LARGE, "prompt", seed, 0.7) | {"config": config})

    def search(name, effect, count=table6.COUNT):
        noise = np.random.default_rng(0).normal(0, 0.02, count)
        steps = [table6.LEVELS[name].index(one[name]) - 1 for one in drawn[:count]]
        return [
            row | {"answers": {study.TASK: answers(seed, 0.7 + effect * step + noise[seed])}}
            for seed, (row, step) in enumerate(zip(whole, steps, strict=False))
        ]

    assert verdicts(table6, search("rate", 0.1)) == ["not run", "holds"]
    assert verdicts(table6, search("rate", 0.1)[3:])[1] == "holds"
    assert verdicts(table6, search("length", 0.1)) == ["not run", "refuted"]
    assert verdicts(table6, search("rate", 0.1, count=20))[1] == "undecided"
    assert verdicts(table6, search("rate", 0.0))[1] == "undecided"
    assert verdicts(table6, whole)[1] == "undecided"
    lines = table6.table(search("rate", 0.1))
    assert lines["hyperparameter"].tolist() == list(table6.LEVELS)
    assert lines["mean score at"][0].startswith("0.1: 19.")


def test_pretraining():
    """Breaks when states of pretraining are mixed up, or the sentinel's whole gain is compared."""

    def trials(scores, tasks=study.TASKS):
        return [
            row
            for (state, model), accuracy in zip(
                figure3_pretraining.STATES.items(), scores, strict=True
            )
            for task in tasks
            for row in seeds(
                model, "prompt", [accuracy] * 3, **figure3_pretraining.keys(state, task)
            )
        ]

    paper = trials((0.60, 0.61, 0.66, 0.68, 0.72))
    assert verdicts(figure3_pretraining, paper) == ["holds"] * 3
    large = trials((0.60, 0.71, 0.78, 0.76, 0.72))
    assert verdicts(figure3_pretraining, large) == ["holds", "refuted", "refuted"]
    behind = trials(
        (0.72, 0.60, 0.66, 0.66, 0.60)
    )  # there is no lead that a sentinel could recover
    assert verdicts(figure3_pretraining, behind) == ["refuted", "undecided", "refuted"]
    found = figure3_pretraining.table(paper)
    assert found["pretraining"].tolist() == [*figure3_pretraining.STATES]
    assert set(found["tasks"]) == {"movie_sentiment, question_type"}
    one = trials((0.60, 0.61, 0.66, 0.68, 0.72), tasks=(study.TASK,))
    assert verdicts(figure3_pretraining, one) == ["holds"] * 3
    assert set(figure3_pretraining.table(one)["tasks"]) == {"movie_sentiment"}


def test_steps():
    """Breaks when the usual steps' lead counts, or the longer trials are taken for Figure 1's."""
    more = {"train__steps": 1600, "optimizer__warmup": 160, "eval__every": 400}
    usual = seeds(steps.MODEL, "prompt", (0.60, 0.61, 0.60))
    for gain, verdict in ((-0.05, "holds"), (0.1, "refuted")):
        long = [0.60 + gain] * 3
        rows = usual + seeds(steps.MODEL, "prompt", long, **more)
        assert verdicts(steps, rows) == [verdict]
    assert steps.table(rows)["steps"].tolist() == [400, 1600]
    other = {"task__name": "question_type"}
    once = [*rows, *seeds(steps.MODEL, "prompt", (0.5, 0.5, 0.5), **other)]
    assert steps.table(once)["score"].tolist() == steps.table(rows)["score"].tolist()
    both = [*once, *seeds(steps.MODEL, "prompt", [0.5], **other, **more)]
    assert set(steps.table(both)["tasks"]) == {"movie_sentiment, question_type"}
    assert steps.table(both)["seeds"].tolist() == [3, 1]
    assert steps.findings(both)[0].found.value == pytest.approx(10, abs=0.5)  # the mean of 20 and 0
    assert verdicts(steps, both) == ["undecided"]


def test_nothing_learnt_decides_nothing():
    """Breaks when labels that are always given decide a comparison, but for the control's."""
    low, high = (0.47, 0.47, 0.47), (0.5, 0.5, 0.5)
    found = figure3_length.findings(lengths({1: low, 20: high, 100: low}))
    assert [(one.verdict, one.found) for one in found] == [("undecided", None)] * 2
    more = {"train__steps": 1600, "optimizer__warmup": 160, "eval__every": 400}
    long = seeds(steps.MODEL, "prompt", low, **more)
    assert verdicts(steps, [*seeds(steps.MODEL, "prompt", high), *long]) == ["holds"]
    assert verdicts(table3, [record(LARGE, "prompt", n, 0.47) for n in range(5)]) == ["undecided"]


def test_data_size():
    """Breaks when a size's trials count for another, or all seeds train on the same examples."""

    def trials(prompt, full):
        return [
            record(LARGE, method, seed, accuracy, **keys(count, seed))
            for method, scores in (("prompt", prompt), ("full", full))
            for count, accuracy in zip(data_size.SIZES, scores, strict=True)
            for seed in range(3)
        ]

    def keys(count, seed):
        return {"data__train_examples": count, "data__subset_seed": seed}

    usual = trials((0.80, 0.81, 0.82), (0.70, 0.85, 0.90))
    assert verdicts(data_size, usual) == ["holds"] * 3
    assert verdicts(data_size, trials((0.7, 0.9, 0.9), (0.8, 0.8, 0.8))) == ["refuted"] * 3
    lines = data_size.table(usual).to_dict("records")
    assert [line["examples"] for line in lines] == [*data_size.SIZES] * 2
    assert [line["score"][:4] for line in lines] == ["60.0", "62.0", "64.0", "40.0", "70.0", "80.0"]


def test_geometry():
    """Breaks when vectors of a prompt are taken for independent, prompts that agree for certainty,
    another share for the verdict's, or prompts of another model or start are counted."""
    starts = [figure3_length.sweep(), spot.sweep(), data_size.sweep(), figure3_start.sweep()]
    starts += [table2.sweep(), table6.sweep("smollm2"), table3.sweep()]
    rows = list({row["trial"]: row for some in starts for row in map(made, some)}.values())
    assert verdicts(section7, rows) == ["not run"]
    numbers = dict.fromkeys(section7.NUMBERS, 0.4) | {"labels": 100}
    numbers["nearest"] = [[" positive", " good"], [" negative"]]
    for count, share, verdict in (
        (33, 1.0, "undecided"),
        (35, 1.0, "holds"),
        (35, 0.0, "refuted"),
        (35, 0.6, "undecided"),
    ):
        for row in rows:
            row["geometry"] = numbers | {section7.SHARES[0]: share}
        some = section7.measured(rows)[:count]
        assert verdicts(section7, some) == [verdict]
        assert f"{count} prompts, {100 * count} vectors" in section7.findings(some)[0].claim
    assert {study.value(row, "method.init") for row in section7.measured(rows)} == {"labels"}
    assert {study.value(row, "model.name") for row in section7.measured(rows)} == {LARGE}
    assert len(section7.trials(rows)) == 3
    lines = section7.table(rows)
    assert lines["prompts"].sum() == len(section7.measured(rows)) > 35
    assert lines["nearest to the first two"][0] == "positive; good | negative"


@pytest.mark.parametrize("artefact", everything.ARTEFACTS, ids=experiment_name)
def test_records_that_lack_a_part(artefact):
    """Breaks when a trial that failed, or whose answers or curve are lost, stops the report."""
    whole = [record(LARGE, method, 0, 0.8) for method in ("prompt", "full")]
    whole += lengths({1: (0.7, 0.7), 100: (0.8, 0.8)})
    without = [{k: v for k, v in row.items() if k not in ("answers", "curve")} for row in whole]
    failed = [row | {"status": "failed", "metrics": {}} for row in without]
    for rows in ([], without, failed, [*whole[:1], *without, *failed]):
        assert set(verdicts(artefact, rows)) <= {"not run", "undecided"}
        artefact.table(rows)


def test_the_study_for_a_laptop():
    """Mutations: other trials than the study's; a length, or all of table3, is left out; the whole
    study begins with trials of Figure 1 that the laptop's has not."""
    ids = {name: [trial_id(resolve(c)) for c in everything.sweep(name)] for name in TIERS}
    assert ids["full"][: len(ids["laptop"])] == ids["laptop"] != ids["full"]
    with pytest.raises(UserError, match="subset.*'small'.*full, laptop"):
        everything.sweep("small")
    rows = [made(config) for config in everything.sweep("laptop")]
    lacking = {
        experiment_name(artefact): sum(one.seeds < 2 for one in artefact.findings(rows))
        for artefact in everything.ARTEFACTS
    }
    alone = {"section7", "continual", "spot", "figure2", "data_size", "domain", "style"}
    some = {"figure1": 2, "scaling_law": 3, "table6": 1}
    assert {name for name, count in lacking.items() if count} == alone | some.keys()
    assert {name: lacking[name] for name in some} == some


def made(config):
    """A simulated record of a trial."""
    tasks = [config.task.name, *filter(None, config.eval.transfer.split(","))]
    row = record(config.model.name, config.method.name, config.seed, 0.8)
    curve = [[step, float(step), 0.1 * step] for step in (1, 2)]
    found = {"answers": dict.fromkeys(tasks, row["answers"][study.TASK]), "curve": curve}
    return row | found | {"config": to_dict(resolve(config)), "trial": trial_id(resolve(config))}
