"""The experiment on rounding: its trials, and its table of made-up rows."""

import copy

import pytest

from softprompt.config import base_config, to_dict
from softprompt.errors import UserError
from softprompt.trials.experiment import load_experiment, make_trials
from softprompt.trials.outputs import write_outputs


def rows_of(experiment, trials):
    """Rows whose perplexity says which form they are of."""
    made = []
    for number, config in enumerate(trials):
        plain = config.method.name == "none"
        text = {"text": {"perplexity": 10.0 + number}} if plain else {}
        made.append(
            {
                "status": "done",
                "config": to_dict(config),
                "weight_bytes": 10**8 * (number + 1),
                "step_seconds": None if plain else 0.5,
                "metrics": {"test": {"accuracy": 0.8 + number / 1000, "examples": 1000}, **text},
            }
        )
    return made


def test_trials():
    """Mutation: a form is left out; a subset has the other model's trials."""
    experiment = load_experiment("quantization")
    trials = make_trials(experiment, "full")
    assert len(trials) == 2 * 4 * 2
    small = make_trials(experiment, "smollm2")
    assert {made.model.name for made in small} == {"smollm2-135m-instruct-q4"}
    with pytest.raises(UserError, match="unknown subset 'half'"):
        make_trials(experiment, "half")


def test_table_and_figure(tmp_path):
    """Mutation: a change is measured against the line above, not against float32; a perplexity is
    a number, of which a table shows three digits."""
    experiment = load_experiment("quantization")
    rows = rows_of(experiment, make_trials(experiment, "smollm2"))
    table = experiment.table(rows[::-1])
    assert list(table["quantize"]) == ["none", "none", "int8", "int4"]
    assert list(table["perplexity"]) == ["10.00", "12.00", "14.00", "16.00"]
    assert list(table["change"]) == ["+0.00%", "+20.00%", "+40.00%", "+60.00%"]
    assert list(table["prompt"]) == [0.801, 0.803, 0.805, 0.807]
    assert list(table["step seconds"]) == [0.5] * 4
    write_outputs(experiment, rows, tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_table_of_half_a_sweep():
    """Breaks when a missing trial, or one without scores, is an error, or a number."""
    experiment = load_experiment("quantization")
    rows = rows_of(experiment, make_trials(experiment, "smollm2"))
    rows[2] |= {"metrics": {}}
    table = experiment.table(rows[1:3])
    assert list(table["perplexity"]) == [None, None]
    assert list(table["prompt"]) == [0.801, None]
    experiment.figure(rows[1:3])
    assert experiment.table([]).empty


def test_seeds_are_averaged_and_other_differences_are_lines():
    """Mutation: the last of two rows of a form stands for both; another text is averaged in."""
    experiment = load_experiment("quantization")
    rows = rows_of(experiment, make_trials(experiment, "smollm2")[:4])
    again, longer = copy.deepcopy(rows), copy.deepcopy(rows)
    for row in again:
        row["config"]["seed"] = 1
        row["metrics"]["test"]["accuracy"] += 0.1
    table = experiment.table(rows + again)
    assert list(table["prompt"]) == pytest.approx([0.851, 0.853])
    assert list(table["zero-shot"]) == pytest.approx([0.85, 0.852])
    assert "also" not in table
    for row in longer:
        row["config"]["train"]["steps"] = 100
        row["config"]["eval"]["text"] = "other.txt"
        row["metrics"].get("text", {})["perplexity"] = 20.0
    prompts = [row for row in longer if row["config"]["method"]["name"] == "prompt"]
    table = experiment.table(rows + prompts)
    assert list(table["also"]) == ["train.steps=50", "train.steps=100"] * 2
    assert list(table["change"]) == ["+0.00%"] * 2 + ["+20.00%"] * 2
    texts = [row for row in longer if row["config"]["method"]["name"] == "none"]
    for row in texts:
        row["config"]["train"]["steps"] = base_config().train.steps
    table = experiment.table(rows + texts)
    assert list(table["perplexity"]) == ["10.00", "20.00", "12.00", "20.00"]
    assert list(table["change"]) == ["+0.00%", "+0.00%", "+20.00%", "+0.00%"]
    assert list(table["also"])[1] == "eval.text=other.txt"
