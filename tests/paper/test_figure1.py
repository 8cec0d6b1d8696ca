"""Figure 1's verdicts on simulated trials: true effects hold, false ones do not."""

import pytest

from experiments.paper import figure1, rates, study
from softprompt.config import resolve, trial_id
from tests.paper.simulated import seeds

SMALL, MIDDLE, LARGE = "ladder/d0", "ladder/d3", study.SMOLLM2
PROMPT = {SMALL: (0.58, 0.60, 0.59), MIDDLE: (0.69, 0.70, 0.71), LARGE: (0.858, 0.860, 0.862)}
FULL = {SMALL: (0.76, 0.77, 0.75), MIDDLE: (0.77, 0.78, 0.76), LARGE: (0.866, 0.864, 0.865)}


def simulated(prompt=PROMPT, full=FULL):
    """Trials of both methods on three models."""
    pairs = [(model, "prompt", prompt[model]) for model in prompt]
    pairs += [(model, "full", full[model]) for model in full]
    return [row for pair in pairs for row in seeds(*pair)]


def mixed(method, accuracies):
    """Trials of the largest model on both tasks at once, whose accuracies are equal."""
    rows = seeds(LARGE, method, accuracies, **figure1.BOTH)
    for row in rows:
        row["answers"]["question_type"] = row["answers"][study.TASK]
    return rows


def verdicts(rows):
    """Those of the gap."""
    return [finding.verdict for finding in figure1.findings(rows)][:3]


def other_verdicts(rows):
    """Those of the other lines."""
    return [finding.verdict for finding in figure1.findings(rows)][3:]


def test_a_gap_that_closes():
    """Breaks when the gap is the prompt's lead, scores are not paired, or a share is no point."""
    rows = simulated()
    found = figure1.gaps(rows)
    assert list(found) == [SMALL, MIDDLE, LARGE]
    assert [gap.value for gap in found.values()] == pytest.approx([34, 14, 1], abs=0.5)
    assert verdicts(rows) == ["holds"] * 3
    lines = figure1.table(rows).to_dict("records")
    assert [(line["model"], line["trained"]) for line in lines[:3]] == [
        (SMALL, "prompt"),
        (SMALL, "full"),
        (MIDDLE, "prompt"),
    ]
    assert {(line["seeds"], line["tasks"]) for line in lines} == {(3, "movie_sentiment")}
    assert lines[0]["score"].startswith("18.0 (")
    assert lines[1]["minus a prompt"].startswith("34.0 (")
    assert figure1.figure(rows).axes[0].get_xscale() == "log"


def test_false_results_change_the_verdicts():
    """A swapped label, a shrunken effect, a seed alone, and trials that did not run."""
    assert verdicts(simulated(prompt=FULL, full=PROMPT)) == ["refuted", "refuted", "holds"]
    widest = dict(PROMPT) | {LARGE: (0.60, 0.61, 0.59)}
    assert verdicts(simulated(prompt=widest))[::2] == ["refuted", "refuted"]
    shrunken = dict(PROMPT) | {SMALL: (0.70, 0.66, 0.72)}
    assert verdicts(simulated(prompt=shrunken))[1] == "undecided"
    noisy = dict(PROMPT) | {LARGE: (0.84, 0.80, 0.86)}
    assert verdicts(simulated(prompt=noisy))[2] == "undecided"
    alone = [row for row in simulated() if "smollm2-135m-instruct-q4-full-s" not in row["name"]]
    assert verdicts(alone + seeds(LARGE, "full", FULL[LARGE][:1]))[::2] == ["undecided"] * 2
    assert verdicts([row for row in simulated() if "d0" not in row["name"]])[1] == "not run"
    assert verdicts(simulated()[:3]) == ["not run"] * 3


def test_the_other_lines():
    """Breaks when lines change places, a mixture counts as one of its tasks, or a trial on both
    tasks is another line's."""
    rows, shots = simulated(), figure1.LINES["few-shot"][1]
    assert other_verdicts(rows) == ["not run"] * 3
    good = [*seeds(LARGE, "fewshot", (0.7, 0.72, 0.71), **shots), *mixed("full", (0.9, 0.9, 0.9))]
    good += [*mixed("prompt", (0.85, 0.86, 0.85)), *seeds(LARGE, "none", [0.6])]
    assert other_verdicts([*rows, *good]) == ["holds"] * 3
    bad = [*seeds(LARGE, "fewshot", (0.9, 0.92, 0.91), **shots), *mixed("full", (0.7, 0.7, 0.7))]
    assert other_verdicts([*rows, *bad, *mixed("prompt", (0.6, 0.6, 0.6))]) == ["refuted"] * 3
    table = figure1.table([*rows, *good])
    found = table[table["model"] == LARGE].set_index("trained")
    assert found.index.tolist() == list(figure1.LINES)
    assert found["seeds"].tolist() == [3, 3, 3, 3, 3, 1]
    assert set(found["tasks"]) == {study.TASK}
    assert found["score"]["full, both tasks"].startswith("80.0 (")


def test_the_score_is_the_mean_of_both_tasks_once_all_have_both():
    """Breaks when a task counts that a model, or a line, has not, or one counts twice."""
    rows = [row for row in simulated() if study.value(row, "model.name") != MIDDLE]
    other = {"task__name": "question_type"}
    small = [*seeds(SMALL, "prompt", [0.5] * 3, **other), *seeds(SMALL, "full", [0.7] * 3, **other)]
    large = [*seeds(LARGE, "prompt", [0.8] * 3, **other), *seeds(LARGE, "full", [0.8] * 2, **other)]
    assert figure1.gaps([*rows, *small])[SMALL].value == pytest.approx(34, abs=0.5)
    for more in ([], mixed("prompt", [0.8, 0.8])):
        both = figure1.by_line([*rows, *small, *large, *more])
        gaps = figure1.differences(both, "full", "prompt")
        assert [gap.value for gap in gaps.values()] == pytest.approx([37, 0.5], abs=0.5)
        found = figure1.findings([*rows, *small, *large, *more])
        assert [one.seeds for one in found[:3]] == [2, 3, 2]
    mixture = both["prompt, both tasks"][LARGE]
    assert [study.value(row, "task.name") for row in mixture] == [*study.TASKS] * 2


def test_pairs_have_one_seed():
    """Breaks when a missing seed pairs the others with their neighbours."""
    prompt, full = seeds(SMALL, "prompt", (0.6, 0.7)), seeds(SMALL, "full", (0.9, 0.8))
    assert figure1.gaps([*prompt, full[1]])[SMALL].value == pytest.approx(20, abs=0.5)
    assert figure1.gaps([prompt[0], full[1]]) == {}


def test_trials_are_distinct_and_searched_alike():
    """Breaks when a method has more rates to choose from, or two trials are one."""
    for configs in (figure1.sweep("full"), rates.sweep()):
        for config in configs:
            config.model.dtype = "float32"
        assert len({trial_id(resolve(config)) for config in configs}) == len(configs)
    counts = [len(rates) for rates in study.SEARCHED.values()]
    assert min(counts) == max(counts)
