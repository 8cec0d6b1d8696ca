"""A pool's rows: the same tokens as alone, whatever joins and leaves beside them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.serving_tasks import reference_logprobs
from softprompt.errors import UserError
from softprompt.inference.decode import generate
from softprompt.inference.pool import Draw, Joining, Pool, padded
from softprompt.inference.pool_programs import Grid, Lane, pad_context
from softprompt.inference.sampling import sampling
from softprompt.models.decoder import Context
from tests.families import family_decoder

RANDOM = np.random.default_rng(8)
INPUTS = [RANDOM.integers(2, 99, n) for n in (11, 1, 4, 17, 8, 25, 3, 9)]
NEW = (5, 9, 1, 12, 7, 3, 12, 6)  # a ring of 12 columns is written around several times
DRAWS = [Draw(), Draw(0.75, seed=3), Draw(1.25, 5, 0.75, 2**31 + 9), Draw(0.5, 0, 0.5, 7)]


def lanes_of(model, weights):
    """Contexts of 5 and 9 positions and none, in one bucket, and each one unpadded."""
    apply = lambda length: model.apply(  # noqa: E731
        {"params": weights}, jnp.asarray(RANDOM.integers(2, 99, length)), method="text_context"
    )
    contexts = [apply(5), apply(9), model.empty_context()]
    return contexts, [Lane(pad_context(one, 16), {}) for one in contexts]


def run(pool, tasks, lanes, *, inputs=INPUTS, new=NEW, draws=DRAWS, log=None):
    """Every request through the pool, as slots become free; returns ids and log-probabilities."""
    waiting, held, running = list(range(len(inputs))), {}, {}
    made = [[] for _ in inputs]

    def take(n, choice):
        made[n].append((int(choice.ids), float(choice.logprobs)))
        if len(made[n]) == new[n]:
            pool.leave(running.pop(n))

    while waiting or running:
        joining = []
        for slot in sorted(pool.free):
            n = waiting[0] if waiting else None
            busy = {lane for lane, _ in running.values()}
            if n is None or (slot[0] in busy and held.get(slot[0]) != tasks[n]):
                continue
            if held.get(slot[0]) != tasks[n]:
                pool.set_lane(slot[0], lanes[tasks[n]])
                held[slot[0]] = tasks[n]
            running[waiting.pop(0)] = slot
            draw = draws[n % len(draws)]
            joining.append((n, Joining(slot, inputs[n], draw, alternatives=n % 2 == 0)))
            if len(joining) == pool.grid.together:
                break
        if joining:
            for (n, _), choice in zip(joining, pool.join([row for _, row in joining]), strict=True):
                take(n, choice)
        choice = pool.step()
        for n, slot in list(running.items()):
            take(n, type(choice)(*(field[slot] for field in choice)))
    return made


def alone(model, weights, context, n):
    draw = DRAWS[n % len(DRAWS)]
    how = sampling(draw.temperature, top_k=draw.top_k or None, top_p=draw.top_p)
    options = {"max_new": NEW[n], "eos_id": None, "sampling": how, "seed": draw.seed}
    return generate(model, weights, ({}, context), [INPUTS[n]], **options)[0]


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("gemma3", Grid(3, 1, 32, 12)),
        ("opt", Grid(2, 2, 32, 12, together=2)),
        ("llama", Grid(1, 4, 32, 12)),
    ],
)
def test_rows_of_a_pool_equal_rows_alone(x64, name, grid):
    """Mutation: ages from `column`, not the column before; positions by column; a padded context
    is seen, or counts as positions; the seed's key from the slot; `nth` without the first token.
    """
    model, weights = family_decoder(name)
    contexts, lanes = lanes_of(model, weights)
    tasks = [0] * 8 if grid.lanes == 1 else [0, 1, 2, 0, 0, 1, 2, 1]
    pool, plain = (
        Pool(model, weights, lanes[0], grid),
        SimpleNamespace(model=model, weights=weights),
    )
    made = run(pool, tasks, lanes)
    for n, task in enumerate(tasks):
        ids, logprobs = zip(*made[n], strict=True)
        assert list(ids) == alone(model, weights, contexts[task], n), n
        shared = {}, contexts[task]
        found = reference_logprobs(plain, shared, INPUTS[n].tolist(), ids, room=40)
        np.testing.assert_allclose(logprobs, found, atol=1e-9)


def test_other_neighbours_change_no_bit():
    """Mutation: an attention mask that admits a neighbour's columns, or a mean over the rows."""
    model, weights = family_decoder("llama")
    model, weights = (
        model.clone(dtype=jnp.dtype("bfloat16")),
        jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), weights),
    )
    _, lanes = lanes_of(model, weights)
    pool = Pool(model, weights, lanes[0], Grid(3, 1, 32, 12))
    options = {"draws": [Draw(0.7, seed=4)], "new": (12, 12, 12)}
    several = [
        run(pool, [1, *tasks], lanes, inputs=INPUTS[:1] + others, **options)[0]
        for tasks, others in (([0, 2], INPUTS[1:3]), ([2, 0], INPUTS[4:6]))
    ]
    assert several[0] == several[1]


def test_an_empty_context_is_a_pool_too(x64):
    """Mutation: `pad_context` to at least one position."""
    model, weights = family_decoder("gpt2")
    empty: Context = model.empty_context()
    lane = Lane(pad_context(empty, 0), {})
    made = run(Pool(model, weights, lane, Grid(2, 1, 32, 12)), [0] * 8, [lane])
    assert [token for token, _ in made[3]] == alone(model, weights, empty, 3)


def test_what_no_size_holds_is_named():
    """Mutation: `next` without a default, whose StopIteration is a traceback."""
    assert [padded(length) for length in (0, 1, 32, 33)] == [0, 32, 32, 128]
    with pytest.raises(UserError, match="131073 tokens; allowed: up to 131072"):
        padded(131073)


def test_what_a_row_leaves_behind_is_finite(x64):
    """Mutation: keys and values are cached as they are; 0 times infinity reaches the next row."""
    model, weights = family_decoder("gpt2")
    contexts, lanes = lanes_of(model, weights)
    broken = jax.tree.map(lambda leaf: leaf * np.nan if leaf.ndim else leaf, lanes[0])
    pool = Pool(model, weights, lanes[0], Grid(2, 1, 32, 12))
    pool.set_lane(0, lanes[0])
    pool.set_lane(1, broken)
    pool.join([Joining((0, 0), INPUTS[0])])
    assert np.isnan(pool.join([Joining((1, 0), INPUTS[1])])[0].logprobs)
    for _ in range(5):
        pool.step()
    pool.leave((1, 0))
    pool.set_lane(1, lanes[1])
    made = [int(pool.join([Joining((1, 0), INPUTS[3])])[0].ids)]
    made += [int(pool.step().ids[1, 0]) for _ in range(NEW[3] - 1)]
    shared, options = ({}, contexts[1]), {"max_new": NEW[3], "eos_id": None}
    assert made == generate(model, weights, shared, [INPUTS[3]], **options)[0]
