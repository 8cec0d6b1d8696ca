"""Contract 11: every catalogued model, at full size, passes the shapes of a training step and has a
sharding rule for every leaf; nothing is in memory.
"""

import re

import jax
import pytest

from softprompt.models.shapes import leaf_shapes
from softprompt.pretrained.catalog import CATALOG
from softprompt.training.sharding import WEIGHT_RULES
from softprompt.trials.shape_check import check_shapes
from tests.matrix import matrix

# One name for each that has sizes of its own.
ENTRIES = {entry.config: entry.name for entry in CATALOG.values()}
FIRST = list(ENTRIES)[::12]


@pytest.mark.parametrize("config", matrix(ENTRIES, keep=FIRST), ids=ENTRIES.values())
def test_every_model_takes_a_step(config):
    """Mutation: a leaf's shape in `decoder_shapes`, a reader or the catalogue that the model does
    not declare; drop or double a rule of sharding; the optimizer's state changes its shape.
    """
    step = check_shapes(config)
    assert step.trained == 100 * config.prompt_width
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(step.arguments))
    for path in leaf_shapes(config):
        assert sum(bool(re.fullmatch(rule, path)) for rule, _ in WEIGHT_RULES) == 1, path
