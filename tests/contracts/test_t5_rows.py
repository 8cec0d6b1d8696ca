"""Contracts 2 and 4 for T5: packed rows of both stacks give what each pair gives alone.

The other form is the model's own call on one plain pair, which the parity tests hold to
transformers.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import TrainSource, pad_rows, train_batch, train_template
from softprompt.data.rows import RowLayout
from softprompt.evaluation.ranking import score_batches
from softprompt.methods.initializers import vocabulary
from softprompt.methods.prompt import PromptConfig, init
from softprompt.training.step import StepConfig, loss_fn, row_logits, shared_part
from tests.contracts.examples import by_example, double, one_device, random_examples
from tests.matrix import matrix
from tests.tiny_t5 import tiny_t5

P = 4
EXACT = {"atol": 1e-9, "rtol": 1e-9}
FORMS = {
    "no prompt": ((), True, RowLayout(0)),
    "encoder": (("encoder",), True, RowLayout(0, input_slots=P)),
    "both": (("encoder", "decoder"), True, RowLayout(0, input_slots=P, target_slots=P)),
    "contexts": (("encoder", "decoder"), False, RowLayout(0)),
}
ROWS = ([[0, 1, 2, 3, 4, 5]], [[4, 2], [5, 3, 0], [1]], [[], [2], [], [5, 4, 3, 2, 1, 0]])

pytestmark = pytest.mark.usefixtures("x64")


def make(form):
    """Step, delta, weights and layout of a tiny T5 with prompts in this form."""
    stacks, inline, layout = FORMS[form]
    model, weights = tiny_t5(prompt_to_input=inline)
    cfg = PromptConfig(P, None, vocabulary(range(model.config.vocab)), stacks=stacks)
    delta = init(jax.random.key(3), model, weights, cfg) if stacks else {}
    moved = jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(4), x.shape), delta)
    return StepConfig(model, "prompt" if stacks else "none", cfg), moved, weights, layout


def examples():
    """Random examples within the tiny vocabulary; of few lengths, for each is compiled alone."""
    return random_examples((7, 13, 7, 7, 13, 7), (1, 3, 2, 1, 3, 2), vocab=99)


@functools.partial(jax.jit, static_argnames="model")
def plain(model, weights, delta, tokens_S, tokens_T):
    return model.apply({"params": weights, "delta": delta}, tokens_S, tokens_T)


def alone(config, delta, weights, tokens_S, target):
    """Logits [targets, V] of one pair, with nothing beside it."""
    start_T = np.pad([0, *target[:-1]], (0, 4 - len(target)))  # few shapes to compile
    logits_TV = plain(config.model, weights, delta, jnp.array(tokens_S), jnp.array(start_T))
    return np.asarray(logits_TV)[: len(target)]


@functools.partial(jax.jit, static_argnames="config")
def logits_and_loss(config, delta, weights, batch):
    logits_RMV = row_logits(config.model, weights, shared_part(config, delta, weights), batch.rows)
    return logits_RMV, loss_fn(delta, weights, batch, None, config=config)[0]


@pytest.mark.parametrize("form", matrix(FORMS, keep=("both",)))
def test_packed_pairs(form):
    """Mutation: cross-attention sees other segments; an inline prompt only before the row's first
    segment; positions that do not start again with each segment; the start token left out; a bias
    that counts from the row's start."""
    config, delta, weights, layout = make(form)
    encoded = examples()
    wanted = [
        alone(config, delta, weights, tokens, target)
        for tokens, target in zip(encoded.inputs, encoded.targets, strict=True)
    ]
    losses = [
        -jax.nn.log_softmax(logits_MV)[np.arange(len(target)), target].sum()
        for logits_MV, target in zip(wanted, encoded.targets, strict=True)
    ]
    shape = RowShape(4, 90, 20, 6)
    for rows in ROWS:
        order = np.array([n for row in rows for n in row])
        rows_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        batch = double(pad_rows(train_batch(encoded, order, rows_B, shape, layout), 8))
        encoder = batch.rows.encoder
        encoder.tokens[:] += np.where(encoder.segments == 0, 7, 0).astype(np.int32)
        logits_RMV, loss = logits_and_loss(config, delta, weights, batch)
        for n, logits_MV in by_example(encoded, rows, logits_RMV):
            np.testing.assert_allclose(logits_MV, wanted[n], **EXACT)
        count = sum(len(encoded.targets[n]) for n in order)
        np.testing.assert_allclose(loss, sum(losses[n] for n in order) / count, rtol=1e-9)


@pytest.mark.parametrize("form", matrix(FORMS, keep=("both",)))
def test_candidate_scores(form):
    """Mutation: candidates share a start token (its distance to the second one is wrong then); a
    candidate sees its neighbours; the decoder's slots are not counted in the row's width."""
    config, delta, weights, layout = make(form)
    encoded = examples()
    shared = shared_part(config, delta, weights)
    for budget in (1, 4096):
        shape = eval_shape(encoded, budget=budget, layout=layout)
        batches = eval_batches(encoded, shape, layout=layout)
        sums_NC, lengths_NC = score_batches(
            config.model, weights, shared, batches, mesh=one_device()
        )
        assert lengths_NC.tolist() == [[1, 3, 2]] * len(encoded.inputs)
        for n in (0, 1):
            for candidate, score in zip(encoded.candidates, sums_NC[n], strict=True):
                given = config, delta, weights, encoded.inputs[n], candidate
                log_MV = jax.nn.log_softmax(alone(*given))
                total = float(log_MV[np.arange(len(candidate)), candidate].sum())
                assert score == pytest.approx(total, rel=1e-9)


def test_the_loss_of_targets_is_the_score_of_targets():
    """Mutation: `scored_example` predicts the start token too."""
    config, delta, weights, layout = make("both")
    encoded = examples()
    shape = eval_shape(encoded, score="targets", layout=layout)
    batches = eval_batches(encoded, shape, score="targets", layout=layout)
    shared = shared_part(config, delta, weights)
    sums_NC, _ = score_batches(config.model, weights, shared, batches, mesh=one_device())
    for n, target in enumerate(encoded.targets):
        log_MV = jax.nn.log_softmax(alone(config, delta, weights, encoded.inputs[n], target))
        wanted = float(log_MV[np.arange(len(target)), target].sum())
        assert sums_NC[n, 0] == pytest.approx(wanted, rel=1e-9)


def test_every_seed_fits_the_planned_rows():
    """Mutation: the prompt's slots are not counted in an example's length."""
    random = np.random.default_rng(1)
    lengths, targets = random.integers(2, 40, 60), random.integers(1, 5, 60)
    encoded = random_examples(lengths.tolist(), targets.tolist(), vocab=99)
    layout = FORMS["both"][2]
    template = train_template(encoded, examples=8, layout=layout)
    for seed in range(3):
        source = TrainSource(encoded, template, seed, layout)
        assert source.epoch_fill() > 0.9
        for step in range(template.steps):
            batch = source[step]
            assert (batch.loss_weights > 0).sum() == sum(
                len(encoded.targets[n]) for n in source.places(step)[0]
            )


def test_a_prompt_on_a_stack_that_is_not_told_of_it_is_refused():
    """Mutation: `with_prompt` takes slots without a prompt for tokens."""
    config, delta, weights, layout = make("encoder")
    encoded = dataclasses.replace(examples())
    batch = train_batch(encoded, np.arange(6), np.zeros(6, int), RowShape(1, 90, 20, 6), layout)
    with pytest.raises(AssertionError, match="the delta has no prompt"):
        shared = shared_part(config._replace(method="none"), {}, weights)
        row_logits(config.model, weights, shared, batch.rows)
