"""Figure 2: one batch of three tasks; verdicts on numbers that are given, and how it is made."""

import numpy as np
import pytest

from experiments.paper import figure2, spot, study
from softprompt.config import resolve
from softprompt.methods import multitask
from softprompt.methods.multitask import MultitaskConfig
from tests.paper.simulated import record

TASKS = tuple(figure2.trained())


def trials(difference, changed):
    """The first task's trial, in whose record the last task has these numbers."""
    row = record(study.SMOLLM2, "prompt", figure2.SEED, 0.8)
    one = {"examples": 60, "difference": 1e-6, "packed otherwise": 1e-6, "changed": 0}
    last = one | {"difference": difference, "changed": changed}
    found = dict.fromkeys(TASKS, one) | {TASKS[-1]: last}
    return [row | {"mixed": {"tasks": found, "rows": 74, "mixed rows": 45}}]


def verdicts(rows):
    return [one.verdict for one in figure2.findings(rows)]


def test_verdicts():
    """Breaks when one task's difference is averaged away, or one text that differs is allowed."""
    assert verdicts([]) == ["not run"] * 2
    assert verdicts(trials(9e-6, 0)) == ["holds", "holds"]
    assert verdicts(trials(3e-5, 0)) == ["refuted", "holds"]
    assert verdicts(trials(9e-6, 1)) == ["holds", "refuted"]
    table = figure2.table(trials(3e-5, 1))
    assert table["task"].tolist() == list(TASKS) and len(TASKS) == 3
    assert table["largest difference (millionths)"].tolist() == [1, 1, pytest.approx(30)]


def test_joined_prompts_are_the_prompts():
    """Breaks when the delta of all tasks has rounded prompts, or another order of them."""
    prompts = [np.random.default_rng(n).normal(size=(20, 8)).astype(np.float32) for n in range(3)]
    config = MultitaskConfig(20, tasks=3, rank=20)
    found = multitask.variables(figure2.joined(prompts), {}, config, None)["prompt"]
    assert np.array_equal(found, prompts)


def test_texts_are_the_same_alone_and_together():
    """Breaks when the mixture has another sample of test texts, another dtype, or other prompts."""
    alone = resolve(figure2.scoring("prompt", TASKS[1]))
    mixed = resolve(figure2.scoring("multitask", TASKS[0], data__mixture=",".join(TASKS)))
    assert {alone.model.dtype, mixed.model.dtype} == {"float32"}
    assert alone.data.test_examples == mixed.data.test_examples == figure2.COUNT
    assert {config.seed for config in figure2.trained().values()} == {figure2.SEED}
    assert TASKS == (study.TASK, *spot.TARGETS)
