"""Contract 6 for every method: members of one program step as each does alone.

`test_population.py` and `test_groups.py` hold whole trials of prompts to it. `full` is never
grouped.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch
from softprompt.methods import METHODS
from softprompt.training.optimizers import AdamW, OptimizerConfig, Sgd, make_optimizer, set_rate
from softprompt.training.step import train_step
from softprompt.trials.programs import Member, population_step
from tests.contracts.examples import packed, prompted, snippets
from tests.contracts.method_cases import base, moved, step_of
from tests.matrix import matrix

STEPS, RATES = 3, np.array([0.005, 0.01], np.float32)
# GPT-2's loss does not depend on a key's bias: its gradient is rounding, of which Adam would make
# whole steps if its epsilon were as small as it is by default.
TX = make_optimizer(OptimizerConfig(AdamW(eps=1e-3)))
NAMES = ("prompt", "multitask", "prefix", "lora", "dora", "houlsby", "bitfit", "ia3")
CASES = [*((name, "gpt2") for name in NAMES), ("prompt", "t5")]


@functools.partial(jax.jit, static_argnames="config")
def begun(config, weights, seed, rate):
    """Delta and optimizer's state of a member before its first step."""
    key, method = jax.random.key(seed), METHODS[config.method]
    delta = moved(method.init(key, config.model, weights, config.method_config), seed=seed, by=0.1)
    return delta, set_rate(TX.init(delta), rate)


def batch(kind, layout, n, step):
    """Three examples, of the member's own choice, in two rows."""
    encoded, rows_B = base(kind, "float32")[2], np.array([0, 0, 1])
    order = np.random.default_rng([n, step]).permutation(4)[:3]
    return train_batch(encoded, order, rows_B, RowShape(2, 40, 6, 2), layout)


def trained(members, batches_SN, take):
    """Deltas of members, and the loss of each step of each, after steps of `take`."""
    losses = []
    for batches_N in batches_SN:
        pairs = zip(members, batches_N, strict=True)
        members = [Member(*one, batch, None) for one, batch in pairs]
        members, metrics = zip(*((r[:2], r[2]) for r in take(members)), strict=True)
        losses.append([one["loss"] for one in metrics])
    return [delta for delta, _ in members], losses


def apart(one, other):
    """The largest difference between the leaves of two trees."""
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


@pytest.mark.parametrize(("name", "kind"), matrix(CASES, keep=[("prompt", "gpt2")]))
def test_members_step_as_alone(name, kind):
    """Mutations: every member has the first one's batch, or its rate; one gets another's result."""
    config, layout = step_of(name, kind, "float32")
    weights, count = base(kind, "float32")[1], len(RATES)
    step = functools.partial(train_step, config=config, tx=TX)
    alone = jax.jit(step)
    together = jax.jit(functools.partial(population_step, step=step, along=None))
    members = [begun(config, weights, n, RATES[n]) for n in range(count)]
    batches = [[batch(kind, layout, n, step) for n in range(count)] for step in range(STEPS)]
    run = functools.partial(trained, members, batches)
    ours = run(lambda some: together(some, weights))
    theirs = run(lambda some: [alone(*one[:2], weights, *one[2:]) for one in some])
    assert apart(ours, theirs) <= 1e-5
    assert apart(*ours[0]) > 1e-2  # they are different trials
    assert min(apart(m[0], after) for m, after in zip(members, ours[0], strict=True)) > 1e-3


@pytest.mark.real
@pytest.mark.long
def test_bfloat16_on_a_real_model(smollm2, shared_data):
    """What thirty layers in bfloat16 make of a gradient is some hundredths off float32's, and any
    other program makes it another way. Members' are as near to it as a trial's alone, and to that.

    Mutation: every member has the first one's batch.
    """
    encoded = snippets(shared_data, smollm2.tokenizer, 8)
    sgd, weights = make_optimizer(OptimizerConfig(Sgd())), smollm2.weights
    shape = RowShape(2, 160, 8)
    rows = ([[3, 1], [2]], [[4, 7], [5]])
    deltas = [prompted(smollm2.model, weights, 20, seed=n)[1] for n in range(len(rows))]
    members = [
        Member(delta, set_rate(sgd.init(delta), np.float32(1)), packed(encoded, some, shape), None)
        for delta, some in zip(deltas, rows, strict=True)
    ]

    def gradients(dtype):
        """Of members alone, and together: with a rate of 1 what plain SGD takes off the prompt."""
        model = smollm2.model.clone(dtype=jnp.dtype(dtype))
        step = functools.partial(train_step, config=prompted(model, weights, 20)[0], tx=sgd)
        alone, together = (
            jax.jit(step),
            jax.jit(functools.partial(population_step, step=step, along=None)),
        )
        for results in (
            [alone(one.delta, one.opt_state, weights, one.batch, one.dropout) for one in members],
            together(members, weights),
        ):
            pairs = zip(deltas, results, strict=True)
            yield [np.asarray(before["prompt"] - after["prompt"]) for before, (after, *_) in pairs]

    exact, same = gradients("float32")
    rough, ours = gradients("bfloat16")

    def far(some, others):
        """Distances, as shares of the gradients' sizes."""
        norm = np.linalg.norm
        return [norm(a - b) / norm(e) for a, b, e in zip(some, others, exact, strict=True)]

    noise = far(rough, exact)
    assert max(far(same, exact)) < 3e-4
    assert max(noise) < 0.3
    for distances in (far(ours, exact), far(ours, rough)):
        assert all(d < 2 * n for d, n in zip(distances, noise, strict=True)), (distances, noise)
