"""Prompts of several tasks in one row: each task as if it had its own alone, in float64.

The other form is the method `prompt` with the product of a task's factors spelt out, one example
at a time and nothing beside it. `test_methods.py` holds the method to the contracts of all.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.data.eval_batches import eval_batches, eval_shape
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch
from softprompt.data.rows import RowLayout
from softprompt.evaluation.ranking import score_batches
from softprompt.inference.beam import beam_search
from softprompt.inference.decode import generate
from softprompt.methods import multitask, prompt
from softprompt.methods.initializers import vocabulary
from softprompt.methods.multitask import MultitaskConfig
from softprompt.methods.prompt import PromptConfig
from softprompt.models.decoder import Decoder
from softprompt.training.step import StepConfig, loss_fn, shared_part
from tests.contracts.examples import by_example, double, logits, one_device, random_examples
from tests.contracts.method_cases import alone, moved, plain
from tests.matrix import matrix
from tests.tiny import tiny_decoder
from tests.tiny_t5 import tiny_t5

P, KEY = 4, jax.random.key(3)
SIZES = {"tasks": 3, "rank": 2}
TASKS = np.array([2, 0, 1, 2], np.int32)
EXACT = {"atol": 1e-9, "rtol": 1e-9}
KINDS = ("decoder", "t5")
PLACED = ("windows", "t5")  # of windows some end inside a prompt

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def base(kind):
    """A model, its weights, where prompts stand, and examples of three tasks."""
    model, weights = tiny_t5() if kind == "t5" else tiny_decoder()
    if kind == "windows":
        config = dataclasses.replace(model.config, windows=(6, 0, 9))
        model = Decoder(config, dtype=model.dtype)
    encoded = random_examples((7, 13, 7, 13), (1, 3, 1, 3), vocab=90)
    where = ("encoder",) if kind == "t5" else ()
    layout = RowLayout(0, P, prompts=3) if kind == "t5" else RowLayout(prompts=3)
    return model, weights, where, layout, dataclasses.replace(encoded, tasks=TASKS)


def make(kind):
    """The step and a delta after a step in a random direction."""
    model, weights, where, _, _ = base(kind)
    cfg = MultitaskConfig(P, None, vocabulary(range(90)), stacks=where, **SIZES)
    fresh = multitask.init(KEY, model, weights, cfg)
    return StepConfig(model, "multitask", cfg), moved(fresh)


def own(kind, delta, task, xp=np):
    """The step and the delta of one task's prompt by itself."""
    model, _, where, _, _ = base(kind)
    part = delta["encoder"] if where else delta
    factor_PD = xp.sum(
        part["task_cols"][task][:, :, None] * part["task_rows"][task][None, :, :], axis=1
    )
    single = {"prompt": xp.asarray(part["prompt"]) * factor_PD}
    step = StepConfig(model, "prompt", PromptConfig(P, stacks=where))
    return step, {"encoder": single} if where else single


def separate(kind, delta):
    """Logits [targets, V] of each example behind its own task's prompt."""
    _, weights, _, _, encoded = base(kind)
    found = []
    for n, task in enumerate(TASKS):
        parts = {name: [getattr(encoded, name)[n]] for name in ("ids", "inputs", "targets")}
        found += alone(*own(kind, delta, task), weights, dataclasses.replace(encoded, **parts))
    return found


@functools.partial(jax.jit, static_argnames="config")
def gradient(config, delta, weights, batch):
    loss = functools.partial(loss_fn, config=config)
    return jax.grad(loss, has_aux=True)(delta, weights, batch, None)[0]


def packed(encoded, rows, layout):
    order = np.array([n for row in rows for n in row])
    rows_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    return double(train_batch(encoded, order, rows_B, RowShape(3, 70, 12, 8), layout))


@pytest.mark.parametrize("kind", matrix(PLACED, keep=("windows",)))
def test_many_tasks_are_as_many_prompts(kind):
    """Contracts 4 and 5. Mutations: a token sees the prompts of all tasks, or of the row's first
    example; a second task's positions run on behind the first's, or it sees it; keys of windows
    are placed P positions later for each task; T5's index counts one prompt only; a task's rows
    with another's columns.
    """
    _, weights, _, layout, encoded = base(kind)
    config, delta = make(kind)
    wanted = separate(kind, delta)
    for rows in ([[0, 1, 2, 3]], [[3], [], [2, 0, 1]]):
        logits_RMV = logits(config, delta, weights, packed(encoded, rows, layout))
        for n, logits_MV in by_example(encoded, rows, logits_RMV):
            np.testing.assert_allclose(logits_MV, wanted[n], **EXACT)
    others = separate(kind, jax.tree.map(lambda leaf: leaf[::-1], delta))
    assert max(np.abs(a - b).max() for a, b in zip(wanted, others, strict=True)) > 0.1


@pytest.mark.matrix
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_separate_prompts(kind):
    """Mutations: `stop_gradient` on a factor; a task's gradient reaches another's factors."""
    _, weights, _, layout, encoded = base(kind)
    config, delta = make(kind)
    count = sum(map(len, encoded.targets))

    def loss(delta):
        total = 0.0
        for n, task in enumerate(TASKS):
            step, single = own(kind, delta, task, jnp)
            tokens, target = encoded.inputs[n], encoded.targets[n]
            read, first = [jnp.array(tokens), jnp.array([0, *target[:-1]])], 0
            if kind != "t5":
                read, first = [jnp.array([*tokens, *target[:-1]])], len(tokens) - 1
            log_TV = jax.nn.log_softmax(plain.__wrapped__(step, single, weights, 0, *read))
            total -= log_TV[first + np.arange(len(target)), target].sum()
        return total / count

    wanted = jax.jit(jax.grad(loss))(delta)
    rows = [[3], [], [2, 0, 1]]
    found = gradient(config, delta, weights, packed(encoded, rows, layout))
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted)) > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **EXACT), found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_tasks_have_the_shared_prompt(kind):
    """Contract 2. Mutation: both factors begin as noise, as PEFT's do."""
    model, weights, where, _, _ = base(kind)
    cfg = MultitaskConfig(P, None, vocabulary(range(90)), stacks=where, **SIZES)
    ours = multitask.variables(multitask.init(KEY, model, weights, cfg), weights, cfg, None)
    single = PromptConfig(P, None, vocabulary(range(90)), stacks=where)
    theirs = prompt.init(KEY, model, weights, single)
    for one, other in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(one, np.stack([other] * 3))


@pytest.mark.matrix
@pytest.mark.parametrize("kind", matrix(PLACED, keep=("windows",)))
def test_scores_and_answers(kind):
    """Contract 4 in scoring and decoding, by rows of several tasks. Mutations: `which` is not
    passed on to the memory; prefill sees all prompts; rows take another row's task.
    """
    model, weights, _, layout, encoded = base(kind)
    config, delta = make(kind)
    shared = shared_part(config, delta, weights)
    batches = eval_batches(encoded, eval_shape(encoded, layout=layout), layout=layout)
    sums_NC, _ = score_batches(model, weights, shared, batches, mesh=one_device())
    how = {"max_new": 4, "eos_id": None, "batch": 4}
    said = generate(model, weights, shared, encoded.inputs, which=TASKS, **how)
    best = beam_search(model, weights, shared, encoded.inputs, beams=2, which=TASKS, **how)
    slots = {"input_slots": P} if kind == "t5" else {}
    alone_layout = RowLayout(layout.start, **slots)
    for task in range(3):
        step, single = own(kind, delta, task)
        mine = np.flatnonzero(TASKS == task)
        parts = {n: [getattr(encoded, n)[i] for i in mine] for n in ("ids", "inputs", "targets")}
        some = dataclasses.replace(encoded, **parts, tasks=None)
        context = shared_part(step, single, weights)
        shape = eval_shape(some, layout=alone_layout)
        batches = eval_batches(some, shape, layout=alone_layout)
        own_NC, _ = score_batches(model, weights, context, batches, mesh=one_device())
        np.testing.assert_allclose(sums_NC[mine], own_NC, **EXACT)
        assert [said[n] for n in mine] == generate(model, weights, context, some.inputs, **how)
        searched = beam_search(model, weights, context, some.inputs, beams=2, **how)
        assert [best[n] for n in mine] == searched


@pytest.mark.parametrize("kind", KINDS)
def test_who_sees_which_prompt_has_to_be_said(kind):
    """Mutation: an input that says nothing has the first task's prompt, or sees all of them."""
    model, weights, _, _, encoded = base(kind)
    config, delta = make(kind)
    shared = shared_part(config, delta, weights)
    with pytest.raises(AssertionError, match="`which` is needed"):
        generate(model, weights, shared, encoded.inputs, max_new=1, eos_id=None)
