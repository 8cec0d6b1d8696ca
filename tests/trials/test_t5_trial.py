"""Whole trials on a tiny T5: its prompts inline and as contexts, its baselines, its answers."""

import json

import jax
import numpy as np
import pytest

from softprompt import cli
from softprompt.config import from_dict, to_dict
from softprompt.console import Progress
from softprompt.evaluation import evaluators
from softprompt.evaluation.ranking import probabilities
from softprompt.inference.decode import generate
from softprompt.methods.delta_file import load_delta
from softprompt.methods.initializers import prompt_rows
from softprompt.trials.estimate import estimate
from softprompt.trials.evaluate import predict_lines
from softprompt.trials.prepare import prepare, step_flops
from softprompt.trials.run import run_trial
from tests.contracts.examples import session, trial_config, write_task
from tests.models.t5_rows import alone
from tests.tiny_t5 import write_complete_t5

TASK = {"train__steps": 12, "optimizer__rate": 0.3, "eval__select": "last"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tiny T5's folder beside a task."""
    folder = tmp_path_factory.mktemp("t5")
    write_complete_t5(folder / "model")
    return folder, write_task(folder)


@pytest.fixture(scope="module")
def shared():
    with session() as made:
        yield made


def config_of(place, **changes):
    return trial_config(place[0] / "model", place[1], **TASK | changes)


def plainly(prepared, delta, input_S, count):
    """The likeliest answer of so many tokens, each from everything before it."""
    variables = {"params": prepared.loaded.weights, "delta": delta}
    said_T = np.zeros(count + 1, int)  # a decoder does not see what comes after
    for n in range(count):
        logits_TV = alone(prepared.step.model, variables, input_S, said_T[:-1])
        said_T[n + 1] = np.argmax(logits_TV[n])
    return said_T[1:].tolist()


def scores_of_the_test(folder):
    """The scores [N, C] of the test split that a trial wrote down."""
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    return np.array([list(line["scores"].values()) for line in lines])


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("where", "inline"), [("encoder", True), ("decoder", False), ("both", False)]
)
def test_prompts_of_every_form_learn(place, shared, tmp_path, where, inline):
    """Mutation: the prompt of one stack is never read; `prompt_to_input` is not passed on."""
    config = config_of(place, method__place=where, method__prompt_to_input=inline)
    row = run_trial(config, tmp_path, session=shared)
    delta, origin = load_delta(tmp_path / "delta.safetensors")
    stacks = ("encoder", "decoder") if where == "both" else (where,)
    assert set(delta) == set(stacks)
    assert {delta[stack]["prompt"].shape for stack in stacks} == {(5, 20)}
    assert row["trainable"] == 5 * 20 * len(stacks)
    assert origin["fingerprint"]
    found = losses(tmp_path)
    assert found[-1] < found[0] - 0.2
    assert row["metrics"]["test"]["examples"] == 12
    expected = prepare(config, shared)
    assert expected.layout.input_slots == (5 if inline and "encoder" in stacks else 0)
    assert expected.contexts[:2] == ((0, 0) if inline else (5 * ("encoder" in stacks), 5))


def test_inputs_end_with_eos_and_are_cut_before_it(place, shared):
    """Mutation: EOS is counted outside of max_input, or cut off."""
    config = config_of(place, task__max_input=20)
    data = prepare(config, shared).data
    eos = shared.model(config).tokenizer.eos_id
    assert data.train.truncated
    assert max(map(len, data.train.inputs)) == 20
    assert {int(tokens[-1]) for tokens in data.train.inputs} == {eos}


@pytest.mark.matrix
def test_few_shot_examples_stand_before_each_input(place, shared, tmp_path):
    """As if they were written there. Breaks when they are left out or run as a context, their EOS
    stays in the middle, or `predict` forgets them.
    """
    config = config_of(place, method__name="fewshot", method__shots=2)
    row = run_trial(config, tmp_path, session=shared)
    prepared, loaded = prepare(config, shared), shared.model(config)
    tokens = prepared.step.method_config.tokens
    assert len(tokens) > 20 and loaded.tokenizer.eos_id not in tokens
    test = prepared.tasks[0].test
    variables, start = {"params": loaded.weights}, loaded.config.start
    for input_S, found_C in zip(test.inputs[:4], scores_of_the_test(tmp_path), strict=False):
        written_S = np.array([*tokens, *input_S])
        for candidate, found in zip(test.candidates, found_C, strict=True):
            logits_TV = alone(prepared.step.model, variables, written_S, [start, *candidate[:-1]])
            logs_TV = jax.nn.log_softmax(logits_TV)
            wanted = sum(float(logs_TV[n, token]) for n, token in enumerate(candidate))
            assert found == pytest.approx(wanted, abs=1e-4)
    assert row["metrics"]["test"]["examples"] == 12
    records = [json.loads(line) for line in (place[0] / "test.jsonl").read_text().splitlines()]
    with Progress() as progress:
        answers = list(predict_lines(tmp_path, [record["text"] for record in records], progress))
    shares_NC = probabilities(scores_of_the_test(tmp_path))
    told_NC = [list(answer["probabilities"].values()) for answer in answers]
    np.testing.assert_allclose(told_NC, shares_NC, atol=1e-4)


def test_operations_of_a_step(place, shared):
    """Mutation: the decoder's cross-attention, or the prompt's copies, are left out. The numbers
    are counted by hand, an example at a time."""
    prepared = prepare(config_of(place), shared)
    attention, ffn, total = 4 * 20 * 24, 3 * 20 * 28, 0.0
    train = prepared.data.train
    for tokens, target in zip(train.inputs, train.targets, strict=True):
        n, m = len(tokens) + 5, len(target)
        encoder = 2 * 2 * (attention + ffn) * n
        decoder = 2 * 2 * ((1.5 * attention + ffn) * m + 0.5 * attention * n)
        head = 2 * m * 330 * 20
        pairs = 2 * n * n + 2 * (m * (m + 1) / 2 + m * n)
        total += 2 * (encoder + decoder + head) + 3 * 4 * 24 * pairs
    expected = 8 * total / len(train.targets)
    assert step_flops(prepared) == pytest.approx(expected, rel=1e-12)
    costs = estimate(prepared.config, shared)
    assert costs["trainable"] == 100
    assert costs["flops"] > 12 * expected
    assert costs["memory_bytes"] > 0


@pytest.mark.matrix
def test_the_command_line_takes_a_t5(place, shared, tmp_path, capsys, monkeypatch):
    """Mutation: `load_model` takes every folder for a decoder's; `evaluate` scores without the
    prompt, or writes without it; it lets the model write that was loaded, not the one that the
    method arranged."""
    config = config_of(place, method__place="both", method__prompt_to_input=False)
    run_trial(config, tmp_path, session=shared)
    written = []

    def recorded(function, results):
        return lambda *a, **options: results.append(function(*a, **options)) or results[-1]

    monkeypatch.setattr(evaluators, "generate", recorded(generate, written))
    assert cli.main(["evaluate", "--run", str(tmp_path), "--generate"]) == 0
    told = json.loads(capsys.readouterr().out)
    row = json.loads((tmp_path / "result.json").read_text())
    assert told["accuracy"] == row["metrics"]["test"]["accuracy"]
    assert 0 <= told["generated"]["illegal"] <= 1
    prepared, (delta, _) = prepare(config, shared), load_delta(tmp_path / "delta.safetensors")
    for answer, input_S in zip(written[0][:2], prepared.tasks[0].test.inputs, strict=False):
        assert answer == plainly(prepared, delta, input_S, len(answer))
    again = to_dict(config)
    again["method"] |= {"init": "file", "init_file": str(tmp_path / "delta.safetensors")}
    assert prompt_rows(from_dict(again).method.init_file)[0].shape == (5, 20)
