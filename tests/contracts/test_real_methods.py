"""Contracts 2 and 4 on SmolLM2-135M for the methods without a prompt.

One row of one shape, so that a method is compiled once: three examples packed, or one alone.
"""

import jax
import numpy as np
import pytest

from softprompt.data.packing import RowShape
from softprompt.methods import METHODS
from softprompt.methods.adapter import AdapterConfig
from softprompt.methods.ia3 import Ia3Config
from softprompt.methods.lora import LoraConfig
from softprompt.training.step import StepConfig
from tests.contracts.examples import by_example, cut, logits, packed, snippets
from tests.matrix import matrix

REAL = 3e-4
ROW, SHAPE = (2, 0, 1), RowShape(1, 64, 12)
CASES = {  # name -> the method's configuration, and how far the delta is moved
    "lora": (LoraConfig(4, 8.0), 0.02),
    "dora": (LoraConfig(4, 8.0), 0.02),
    "adapter": (AdapterConfig(8), 0.02),
    "bitfit": (None, 0.02),
    "ia3": (Ia3Config(), 0.02),
    "full": (None, 0.001),
}

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("quick")]


@pytest.fixture(scope="module")
def examples(smollm2, shared_data):
    """The three shortest of some real examples."""
    some = snippets(shared_data, smollm2.tokenizer, 30)
    return cut(some, np.argsort([len(tokens) for tokens in some.inputs])[:3].tolist())


@pytest.fixture(scope="module")
def base(smollm2, examples):
    """The base model's logits of the packed row."""
    step = StepConfig(smollm2.model, "none", None)
    return of_row(step, {}, smollm2.weights, examples, ROW)


def of_row(step, delta, weights, examples, row):
    """Example -> logits [targets, V] in a row of these examples."""
    logits_RMV = logits(step, delta, weights, packed(examples, [row], SHAPE))
    return dict(by_example(examples, [row], logits_RMV))


def moved(fresh, by):
    """The delta after a step in a random direction, `by` the size of the noise."""
    random = np.random.default_rng(4)
    return jax.tree.map(
        lambda leaf: leaf + by * random.standard_normal(leaf.shape, np.float32), fresh
    )


def apart(some, others):
    """The largest difference of logits of the same examples."""
    assert some.keys() == others.keys()
    return max(np.abs(some[n] - others[n]).max() for n in some)


@pytest.mark.parametrize("name", matrix(CASES, keep=("lora",)))
def test_real_fresh_and_packed(smollm2, examples, base, name):
    """Mutations: LoRA's B begins as noise, or an adapter's "up"; a new bias begins at one, a factor
    of IA3 at zero; `full` begins with other weights; no segments in the mask.
    """
    cfg, by = CASES[name]
    step, weights = StepConfig(smollm2.model, name, cfg), smollm2.weights
    fresh = METHODS[name].init(jax.random.key(0), smollm2.model, weights, cfg)
    frozen = {} if name == "full" else weights
    assert max(np.abs(logits_MV).max() for logits_MV in base.values()) > 10
    assert apart(of_row(step, fresh, frozen, examples, ROW), base) <= REAL
    delta = moved(fresh, by)
    together = of_row(step, delta, frozen, examples, ROW)
    assert apart(together, base) > 0.1
    alone = {n: of_row(step, delta, frozen, examples, (n,))[n] for n in ROW}
    assert apart(together, alone) <= REAL
