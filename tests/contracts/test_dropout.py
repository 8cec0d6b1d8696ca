"""Contracts 4 and 5 with dropout on: an example's masks are its own, whatever stands beside it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from softprompt.data.packing import RowShape
from softprompt.data.pipeline import TrainSource, row_examples, train_batch, train_template
from softprompt.data.rows import DECODER_LAYOUT, RowLayout
from softprompt.methods import METHODS
from softprompt.methods.initializers import vocabulary
from softprompt.methods.lora import LoraConfig
from softprompt.methods.prefix import PrefixConfig
from softprompt.methods.prompt import PromptConfig
from softprompt.methods.prompt import dropped as dropped_prompt
from softprompt.models.dropout import (
    STREAM,
    Dropout,
    at_step,
    dropped,
    dropped_keys,
    lora_dropped,
    row_dropout,
)
from softprompt.models.stack import stack
from softprompt.training.step import StepConfig, accumulated, loss_fn, row_logits, shared_part
from tests.contracts.examples import by_example, double, equations, random_examples
from tests.contracts.method_cases import moved
from tests.tiny import tiny_decoder
from tests.tiny_t5 import tiny_t5

P, KEY = 4, jax.random.key(8)
EXACT = {"atol": 1e-9, "rtol": 1e-9}
ENCODED = random_examples((7, 13, 7, 13, 2), (1, 3, 1, 3, 2), vocab=90)
SHAPE = RowShape(4, 70, 14, 5)
ROWS = ([[0, 1, 2, 3, 4]], [[4, 3], [], [1, 0, 2]], [[2], [4, 0], [3], [1]])
SOURCE = vocabulary(range(90))
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")

pytestmark = pytest.mark.usefixtures("x64")


@functools.cache
def made(kind, method, names):
    """A step, its delta (moved off its start), the weights and the layout."""
    stacks = () if kind == "decoder" else ("encoder", "decoder")
    model, weights = (tiny_t5 if stacks else tiny_decoder)()
    slots = P if method == "prompt" else 0
    layout = RowLayout(0, slots, slots) if stacks else DECODER_LAYOUT
    cfg = {
        "prompt": PromptConfig(P, None, SOURCE, stacks=stacks),
        "prefix": PrefixConfig(P, stacks and (*stacks, "cross")),
        "lora": LoraConfig(3, 5.0, targets=("q", "down") if "model" in names else PROJECTIONS),
    }[method]
    fresh = jax.jit(lambda weights: METHODS[method].init(KEY, model, weights, cfg))(weights)
    return StepConfig(model, method, cfg), moved(fresh), weights, layout


def batch_of(rows, layout):
    """The examples in these rows, with their ids."""
    order = np.array([n for row in rows for n in row])
    rows_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    batch = double(train_batch(ENCODED, order, rows_B, SHAPE, layout))
    rows = dataclasses.replace(batch.rows, examples=row_examples(order, rows_B, SHAPE))
    return dataclasses.replace(batch, rows=rows)


@functools.partial(jax.jit, static_argnames="config")
def logits(config, delta, weights, rows, dropout):
    shared = shared_part(config, delta, weights, dropout)
    return row_logits(config.model, weights, shared, rows, dropout)


def by_id(case, rows, key=KEY, renamed=lambda ids_RE: ids_RE):
    """The logits [targets, V] of every example in the order of examples."""
    kind, method, keep = case
    *step, layout = made(kind, method, tuple(keep))
    packed = batch_of(rows, layout).rows
    packed = dataclasses.replace(packed, examples=renamed(packed.examples))
    found = dict(by_example(ENCODED, rows, logits(*step, packed, Dropout(key, **keep))))
    return np.concatenate([found[n] for n in range(5)])


CASES = [
    ("decoder", "prompt", {"model": 0.7, "prompt": 0.8}),
    ("decoder", "lora", {"model": 0.8, "lora": 0.6}),
    ("t5", "prompt", {"model": 0.7, "prompt": 0.8}),
    ("t5", "prefix", {"model": 0.7}),
]
FIRST = [CASES[0], *(pytest.param(case, marks=pytest.mark.matrix) for case in CASES[1:])]


@pytest.mark.parametrize("case", FIRST, ids=lambda case: f"{case[0]}, {case[1]}")
def test_an_example_is_dropped_alike_in_any_row(case):
    """Mutations: masks by a segment's place, by its row, or by a position in the row; a context's
    mask drawn with the rows; ids left out of a mask; the step's key left out.
    """
    wanted = by_id(case, ROWS[0])
    for rows in ROWS[1:]:
        np.testing.assert_allclose(by_id(case, rows), wanted, **EXACT)
    others = by_id(case, ROWS[0], jax.random.key(9)), by_id(case, ROWS[0], KEY, lambda x: x + 1)
    for other in others:
        assert (np.abs(other - wanted).max(axis=1) > 1e-3).all()


@pytest.mark.matrix
def test_microbatches_and_remat_drop_the_same():
    """Mutations: a key for each microbatch; another one for what is computed again."""
    kind, method, keep = CASES[0]
    config, delta, weights, layout = made(kind, method, tuple(keep))
    batch = batch_of(ROWS[2], layout)

    def value(config):
        if config.microbatches > 1:
            function = functools.partial(accumulated, config=config)
        else:
            function = jax.value_and_grad(functools.partial(loss_fn, config=config), has_aux=True)
        return jax.jit(function)(delta, weights, batch, Dropout(KEY, **keep))

    other = config._replace(model=config.model.clone(remat="layer"), microbatches=2)
    close = functools.partial(np.testing.assert_allclose, **EXACT)
    jax.tree.map(close, value(other), value(config))


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: f"{case[0]}, {case[1]}")
def test_nothing_is_dropped_without_probabilities(case):
    """Mutation: masks are drawn, with a probability of 1, where none is given."""
    kind, method, keep = case
    config, delta, weights, layout = made(kind, method, tuple(keep))

    def drawn(dropout):
        arguments = config, delta, weights, batch_of(ROWS[1], layout).rows, dropout
        jaxpr = jax.make_jaxpr(logits, static_argnums=0)(*arguments)
        return sum(e.primitive.name == "random_bits" for e in equations(jaxpr))

    assert drawn(at_step(None, 1)) == drawn(Dropout(KEY)) == 0
    assert drawn(Dropout(KEY, **keep)) > 0


def test_one_program_drops_at_any_rate():
    """Mutation: the share that a program was traced with stays in it."""
    case = CASES[0]
    first = by_id(case, ROWS[0])
    programs = logits._cache_size()
    for other in ({"model": 0.6, "prompt": 0.8}, {"model": 0.7, "prompt": 0.9}):
        found = by_id((*case[:2], other), ROWS[0])
        assert (np.abs(found - first).max(axis=1) > 1e-3).all()
    assert logits._cache_size() == programs


PLACES = {  # masks of the layers, an encoder's first; inline prompts, so that contexts are empty
    ("decoder", "prompt"): 1 + len(("context's keys", "keys", "attention", "feed-forward")),
    ("t5", "prompt"): (1 + len(("keys", "attention", "hidden", "feed-forward")) + 1)
    + (1 + len(("keys", "attention", "cross keys", "cross", "hidden", "feed-forward")) + 1),
    ("decoder", "lora"): len(PROJECTIONS),
    ("t5", "lora"): 2 * len(PROJECTIONS) + len(("q", "k", "v", "o")),
}


@pytest.mark.parametrize("kind, method", PLACES)
def test_every_place_has_a_mask(kind, method):
    """GPT-2's places, and T5X's; what every A reads. Mutation: leave one out."""
    keep = {"model" if method == "prompt" else "lora": 0.7}
    config, delta, weights, layout = made(kind, method, tuple(keep))
    rows, dropout = batch_of(ROWS[0], layout).rows, Dropout(KEY, **keep)
    shared = jax.eval_shape(functools.partial(shared_part, config), delta, weights)
    function = functools.partial(row_logits, config.model)
    jaxpr = jax.make_jaxpr(function)(weights, shared, rows, dropout)
    drawn = [e for e in equations(jaxpr) if e.primitive.name == "random_bits"]
    assert len(drawn) == PLACES[kind, method]


class Masks(nn.Module):
    """What the three functions make of ones in a row, as a layer of a stack."""

    @nn.compact
    def __call__(self, carry, layer, drop):
        ones = jnp.ones((8, 6))
        _, (_, v_SGK) = dropped_keys(self, [(ones[:, None], ones[:, None])] * 2, drop)
        return carry, (dropped(self, ones, drop), v_SGK[..., 0, :], lora_dropped(self, ones, drop))


def masks(keys):
    """The masks [N, L, T, ...] of a row of two examples (5 and 3 positions) for N keys."""
    segments_T = jnp.array([1] * 5 + [2] * 3)

    class Layers(nn.Module):
        @nn.compact
        def __call__(self):
            drop = row_dropout(Dropout(KEY, 0.75, 0.5), jnp.array([7, 9]), segments_T)
            return stack(Masks, length=3)()(0.0, jnp.zeros(3), drop)[1]

    return jax.jit(jax.vmap(lambda key: Layers().apply({}, rngs={STREAM: key})))(keys)


def test_masks_keep_the_mean_and_differ_where_they_should():
    """Mutations: divide by the rate, or by nothing; one mask for all layers, examples or heads; a
    mask of activations for each position; keys dropped by example instead of by position.
    """
    found = [np.asarray(x) for x in masks(jax.random.split(KEY, 2000))]
    for x, kept in zip(found, (0.75, 0.75, 0.5), strict=True):
        assert set(np.unique(x)) == {0, 1 / kept}
        spread = np.sqrt((1 - kept) / kept / len(x))
        assert np.abs(x.mean(axis=0) - 1).max() < 5 * spread
    vectors, keys, lora = found
    np.testing.assert_array_equal(vectors[:, :, :5], vectors[:, :, :1].repeat(5, axis=2))
    apart = [
        vectors[:, :, 0] != vectors[:, :, 5],  # examples
        vectors[:, 0] != vectors[:, 1],  # layers
        keys[:, 0] != keys[:, 1],
        keys[:, :, 0] != keys[:, :, 1],  # positions
        keys[:, :, 0] != keys[:, :, 5],
        lora[:, :, 0] != lora[:, :, 1],
        lora[:, :, 0, 0] != lora[:, :, 0, 1],
    ]
    for differs, kept in zip(apart, (0.75,) * 5 + (0.5,) * 2, strict=True):
        assert differs.mean() == pytest.approx(2 * kept * (1 - kept), abs=0.03)


def test_a_prompt_is_dropped_once_a_step_and_bos_never():
    """Mutations: BOS is dropped too; both stacks get one mask; no scaling."""
    delta = {stack: {"prompt": jnp.ones((3, 4))} for stack in ("encoder", "decoder")}
    cfg, keys = PromptConfig(3, stacks=("encoder", "decoder")), jax.random.split(KEY, 2000)
    many = jax.jit(jax.vmap(lambda key: dropped_prompt(delta, cfg, key, 0.75)))(keys)
    first, second = (np.asarray(many[stack]["prompt"]) for stack in ("encoder", "decoder"))
    for x in (first, second):
        assert np.abs(x.mean(axis=0) - 1).max() < 5 * np.sqrt(1 / 3 / 2000)
    assert (first != second).mean() == pytest.approx(2 * 0.75 * 0.25, abs=0.03)
    model, weights = tiny_decoder()
    step = StepConfig(model, "prompt", PromptConfig(P, 7, SOURCE))
    dropout = Dropout(KEY, prompt=0.1)
    shared = jax.jit(functools.partial(shared_part, step))
    variables, _ = shared({"prompt": jnp.ones((P, 48))}, weights, dropout)
    np.testing.assert_array_equal(variables["prompt"][0], weights["embed"]["embedding"][7])
    assert set(np.unique(variables["prompt"][1:].round(6))) == {0, 10}


def test_batches_name_the_examples_of_their_segments():
    """Mutations: ids in the order of places, whatever the row; ids in every batch."""
    template = train_template(ENCODED, examples=3)
    source = TrainSource(ENCODED, template, 0, ids=True)
    batch, plain = source[1], TrainSource(ENCODED, template, 0)[1]
    rows, ids_RE = batch.rows, batch.rows.examples
    assert ids_RE.shape == (template.shape.rows, template.shape.examples)
    batch = dataclasses.replace(batch, rows=dataclasses.replace(rows, examples=None))
    jax.tree.map(np.testing.assert_array_equal, batch, plain)
    for tokens_T, segments_T, ids_E in zip(rows.tokens, rows.segments, ids_RE, strict=True):
        for segment in range(1, segments_T.max() + 1):
            n = ids_E[segment - 1]
            wanted = [*ENCODED.inputs[n], *ENCODED.targets[n][:-1]]
            np.testing.assert_array_equal(tokens_T[segments_T == segment], wanted)
