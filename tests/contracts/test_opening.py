"""What all inputs begin with, computed once: equal to the same tokens in every row (contract 5)."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from softprompt.data.encode import common_opening
from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch
from softprompt.data.rows import RowLayout
from softprompt.evaluation.ranking import score_batches
from softprompt.inference.beam import beam_search
from softprompt.inference.decode import generate
from softprompt.methods import METHODS
from softprompt.methods.prompt import PromptConfig
from softprompt.models.decoder import Decoder
from softprompt.pretrained.loading import load_model
from softprompt.training.step import StepConfig, gradients, shared_part
from softprompt.trials import data as trial_data
from softprompt.trials.evaluate import Predictor
from softprompt.trials.prepare import prepare, step_work
from softprompt.trials.run import run_trial
from tests.contracts.examples import (
    double,
    one_device,
    session,
    trial_config,
    two_tasks,
    write_task,
)
from tests.contracts.method_cases import CASES, KEY, SOURCE, base, moved
from tests.contracts.trials import ended
from tests.families import family_decoder
from tests.matrix import matrix
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5

OPENING = np.array([5, 61, 7, 7, 30, 88, 2], np.int32)
SHAPE = RowShape(3, 90, 12, 8)
EXACT = {"atol": 1e-9, "rtol": 1e-9}


def model_of(kind):
    """A tiny decoder in float64; of "windows" some end in the prompt, some in the opening."""
    model, weights = family_decoder(kind) if kind in ("gpt2", "gemma3") else base("decoder")[:2]
    if kind == "windows":
        windows = dataclasses.replace(model.config, windows=(6, 0, 9))
        model = Decoder(windows, dtype=model.dtype)
    return model, weights


def make(name, kind):
    """A step, a delta off its start, frozen weights and the layout of rows."""
    model, weights = model_of(kind)
    method, config_of = CASES.get(name, ("none", lambda where: None))
    step = StepConfig(model, method, config_of(()))
    init = functools.partial(METHODS[method].init, model=model, cfg=step.method_config)
    delta = moved(init(KEY, weights=weights)) if method != "none" else {}
    layout = RowLayout(prompts=2) if method == "multitask" else RowLayout()
    return step, delta, {} if method == "full" else weights, layout


def opened(encoded):
    """The examples with the opening before every input."""
    return dataclasses.replace(
        encoded, inputs=[np.concatenate([OPENING, tokens]) for tokens in encoded.inputs]
    )


def both(step):
    """The step with the opening in rows, and with the opening in the context."""
    return step, step._replace(opening=tuple(OPENING.tolist()))


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(config, delta, weights, batch):
    metrics, grads = gradients(delta, weights, batch, None, config=config)
    return metrics["loss"], grads


def trained_on(step, delta, weights, encoded, layout, *, exact=True):
    """Loss, and gradient of the delta, of all examples in three rows."""
    rows_B = np.array([0, 0, 2, 2])
    batch = train_batch(encoded, np.array([3, 1, 2, 0]), rows_B, SHAPE, layout)
    return loss_and_gradient(step, delta, weights, double(batch) if exact else batch)


@pytest.mark.parametrize(
    ("name", "kind"),
    matrix(
        [
            *((name, "decoder") for name in ("prompt", "lora, everywhere")),
            *((name, "windows") for name in ("multitask", "prefix")),
            ("prompt", "gpt2"),
        ],
        keep=[("prompt", "decoder")],
    ),
)
@pytest.mark.usefixtures("x64")
def test_loss_and_gradient(name, kind):
    """Breaks when the opening's positions do not follow the prompt's or the prefix's, it is run
    with the base weights, its keys come before a prefix's, or its gradient stops.
    """
    step, delta, weights, layout = make(name, kind)
    rest = base("decoder")[2]
    in_rows, in_context = both(step)
    wanted = trained_on(in_rows, delta, weights, opened(rest), layout)
    other = trained_on(in_rows, delta, weights, rest, layout)
    assert abs(wanted[0] - other[0]) > 1e-3
    for microbatches in (1, 3) if (name, kind) == ("prompt", "decoder") else (1,):
        config = in_context._replace(microbatches=microbatches)
        found = trained_on(config, delta, weights, rest, layout)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), found, wanted)


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ("int8", "int4"))
def test_quantised_weights(tmp_path, kind):
    """Breaks when the opening's embeddings are not those of the rows."""
    loaded = load_model(str(write_llama_folder(tmp_path / "llama")), quantize=kind)
    step = StepConfig(loaded.model, "prompt", PromptConfig(4, None, SOURCE))
    delta = moved(METHODS["prompt"].init(KEY, loaded.model, loaded.weights, step.method_config))
    rest, (in_rows, in_context) = base("decoder")[2], both(step)
    layout, weights = RowLayout(), loaded.weights
    wanted = trained_on(in_rows, delta, weights, opened(rest), layout, exact=False)
    found = trained_on(in_context, delta, weights, rest, layout, exact=False)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-6)
    scale = np.abs(wanted[1]["prompt"]).max()
    np.testing.assert_allclose(found[1]["prompt"], wanted[1]["prompt"], atol=2e-5 * scale)


def answers(step, delta, weights, encoded, layout):
    """Scores of all candidates, and what is generated greedily, and for LoRA by beams."""
    shared, model = shared_part(step, delta, weights), step.model
    batches = eval_batches(encoded, eval_shape(encoded, layout=layout), layout=layout)
    sums_NC, _ = score_batches(model, weights, shared, batches, mesh=one_device())
    how = {"max_new": 4, "eos_id": None, "batch": 4}
    how |= {"which": encoded.tasks} if layout.prompts else {}
    found = [sums_NC, generate(model, weights, shared, encoded.inputs, **how)]
    if step.method == "lora":
        found.append(beam_search(model, weights, shared, encoded.inputs, beams=2, **how))
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    matrix(
        [("lora, everywhere", "decoder"), ("prefix", "windows"), ("multitask", "windows")],
        keep=("prefix",),
    ),
)
@pytest.mark.usefixtures("x64")
def test_scores_and_answers(name, kind):
    """Breaks when a candidate, a cache's slot or a window counts positions from another place."""
    step, delta, weights, layout = make(name, kind)
    rest, (in_rows, in_context) = base("decoder")[2], both(step)
    wanted = answers(in_rows, delta, weights, opened(rest), layout)
    found = answers(in_context, delta, weights, rest, layout)
    np.testing.assert_allclose(found[0], wanted[0], **EXACT)
    assert found[1:] == wanted[1:]


def test_the_opening_is_the_longest_that_leaves_a_token():
    """Breaks when an input is left without a token, or the last common token is lost."""

    def found(*inputs):
        return common_opening(np.array(one) for one in inputs).tolist()

    assert found([1, 2, 3, 4], [1, 2, 3, 5, 6]) == [1, 2, 3]
    assert found([1, 2, 3], [1, 2, 3]) == found([1, 2, 3, 4], [1, 2, 3]) == [1, 2]
    assert found([1, 2], [3, 2]) == found([1]) == found([1, 2], [1], [1, 2]) == []


INSTRUCTION = "There was something in the story that made the whole audience laugh out loud. "
TEMPLATE = INSTRUCTION + "Review: {text}\nSentiment:"


def prepared_with(model, source, shared, **changes):
    """A prepared trial, and its data with the opening in every input."""
    config = trial_config(model, source, **changes)
    made = prepare(config, shared)
    return made, shared.data(made.config, bos=made.bos)


def write_records(folder, records):
    """The same records in each split; returns their source."""
    lines = [
        json.dumps({"id": str(n), "label": ("neg", "pos")[n % 2], **record}) + "\n"
        for n, record in enumerate(records)
    ]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").write_text("".join(lines))
    return f"jsonl:{folder}/{{split}}.jsonl"


LONG = "a warm and funny and moving film that never loses its way " * 3
RULE = "the number of people in the city is not known to the author " * 3
SEAMS = {  # template, the words that may be the opening, records, and whether all words are in it
    "whole": (TEMPLATE, INSTRUCTION + "Review:", [{"text": "the plot"}, {"text": LONG}], True),
    "merges": (
        INSTRUCTION + "Review: the fi{text}\nSentiment:",
        INSTRUCTION + "Review: the fi",
        [{"text": "lm is thin"}, {"text": "ne"}, {"text": "lm"}],
        False,
    ),
    "truncated": (
        "{rule} Review: {text}\nSentiment:",
        RULE,
        [{"rule": RULE, "text": "a film"}, {"rule": RULE, "text": LONG}],
        False,
    ),
}


@pytest.mark.parametrize("case", SEAMS)
def test_the_seam(tiny_folder, tmp_path, case):
    """Breaks when the opening is the template's first words, whatever an input makes of them."""
    template, words, records, complete = SEAMS[case]
    source = write_records(tmp_path, records)
    with session() as shared:
        limit = 40 if case == "truncated" else 60
        changes = {"task__template": template, "task__max_input": limit, "train__batch": 2}
        made, whole = prepared_with(tiny_folder, source, shared, **changes)
        opening, tokens = made.step.opening, made.loaded.tokenizer.encode(words)
        assert len(opening) >= trial_data.MIN_OPENING
        assert list(opening) == tokens[: len(opening)]
        assert (len(opening) == len(tokens)) == complete
        for rest, full in zip(made.data.tasks, whole.tasks, strict=True):
            for name in ("train", "validation", "test"):
                pairs = zip(rest.split(name).inputs, full.split(name).inputs, strict=True)
                assert all([*opening, *a] == b.tolist() and len(a) for a, b in pairs)
                assert rest.split(name).digest == full.split(name).digest
        assert (full.train.truncated > 0) == (case != "merges")


def test_which_trials_have_one(tiny_folder, tmp_path):
    """Breaks when examples lose masks of their own, an encoder is given a part of its input, or a
    task of a mixture is given the opening of another.
    """
    source = write_task(tmp_path)
    write_complete_t5(tmp_path / "t5")
    other = json.loads(two_tasks(source))[1]
    alike = json.dumps(["own", other | {"template": INSTRUCTION + "{text}\nGood:"}])
    cases = {
        "prompt": {"method__dropout": 0.5},
        "t5": {"model__name": str(tmp_path / "t5")},
        "dropout": {"train__dropout": 0.1},
        "lora": {"method__name": "lora", "method__dropout": 0.1},
        "short": {"task__template": "{text}\nSentiment:"},
        "unlike": {"data__mixture": two_tasks(source), "method__name": "multitask"},
        "alike": {"data__mixture": alike, "method__name": "multitask"},
    }
    found, lengths = {}, {}
    with session() as shared:
        for case, changes in cases.items():
            config = {"task__template": TEMPLATE, **changes}
            made, whole = prepared_with(tiny_folder, source, shared, **config)
            found[case] = len(made.step.opening)
            lengths[case] = len(whole.train.inputs[0]) - len(made.data.train.inputs[0])
    words = found["alike"]
    assert found == {name: 0 for name in cases} | {"prompt": found["prompt"], "alike": words}
    assert found["prompt"] > words > 10 and lengths == found


@pytest.mark.parametrize("method", ("prompt", "prefix", "lora"))
def test_a_steps_work(tiny_folder, tmp_path, method):
    """Breaks when the opening is counted with every example, or not at all."""
    changes = {"task__template": TEMPLATE, "method__name": method, "train__batch": 40}
    changes |= {"method__length": 5, "method__init": "uniform"} if method != "lora" else {}
    with session() as shared:
        made, _ = prepared_with(tiny_folder, write_task(tmp_path), shared, **changes)
    opening, given = len(made.step.opening), 5 if method == "prefix" else 0
    context = opening + (0 if method == "lora" else 5)
    train = made.data.train
    own = [len(a) + len(b) - 1 for a, b in zip(train.inputs, train.targets, strict=True)]
    work = step_work(made)
    assert work.tokens == context - given + sum(own)
    keys = sum(range(given + 1, context + 1)) + sum(n * context + n * (n + 1) / 2 for n in own)
    assert work.keys == keys


@pytest.mark.matrix
def test_a_trial(tmp_path, monkeypatch):
    """Breaks when the opening is missing from what rows see, in training, scoring, generation or
    prediction; or when a plain text is scored after it.
    """
    model, source = (
        write_llama_folder(tmp_path / "llama", layers=2, context=1024),
        write_task(tmp_path),
    )
    (tmp_path / "text.txt").write_text(LONG * 30)
    changes = {
        "task__template": TEMPLATE,
        "eval__metrics": "accuracy,generated_accuracy",
        "eval__text": str(tmp_path / "text.txt"),
        "eval__text_tokens": 600,
        "train__batch": 40,  # all examples, so that a step has the same ones however long they are
    }
    rows, states, said = [], [], []
    for least in (trial_data.MIN_OPENING, 10**6):
        monkeypatch.setattr(trial_data, "MIN_OPENING", least)
        folder = tmp_path / str(least)
        with session() as shared:
            row = run_trial(trial_config(model, source, **changes), folder, session=shared)
        metrics, text = row["metrics"], row["metrics"].pop("text")
        assert text["tokens"] == 511
        rows.append({**metrics["test"], "nats": text["nats"]})
        states.append(ended(folder))
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        said.append([json.loads(line) for line in lines])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
    for ours, theirs in zip(*states, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(*said, strict=True):
        assert ours.pop("scores") == pytest.approx(theirs.pop("scores"), abs=1e-4)
        assert ours == theirs
    answered = []
    for least in (8, 10**6):
        monkeypatch.setattr(trial_data, "MIN_OPENING", least)
        with session() as shared:
            predictor = Predictor(folder, shared.progress)
            found = list(predictor.predict(["a film", "very dull", ""]))
            answered.append((found, predictor.generate(["the plot", "and"], max_new=4)))
    for ours, theirs in zip(answered[0][0], answered[1][0], strict=True):
        assert ours.pop("probabilities") == pytest.approx(theirs.pop("probabilities"), abs=1e-5)
    assert answered[0] == answered[1]
