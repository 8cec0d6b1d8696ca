"""`softprompt models --check`: what a device holds, what fits, and what fails."""

import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from softprompt import cli
from softprompt.models.shapes import leaf_shapes
from softprompt.pretrained.catalog import CATALOG
from softprompt.training import sharding
from softprompt.training.sharding import WEIGHT_RULES, make_mesh, put_weight
from softprompt.trials import shape_check
from softprompt.trials.shape_check import SLICES, check_shapes, choose_placement, device_bytes
from tests.tiny import tiny_config


@pytest.fixture
def forgetful():
    """`check_shapes` knows nothing from before, and forgets what it learns."""
    check_shapes.cache_clear()
    yield
    check_shapes.cache_clear()


@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_a_device_holds_the_bytes_that_are_said(weights):
    """Mutation: bytes of the whole leaf; every leaf in bfloat16."""
    config, mesh = tiny_config(width=64, heads=8, kv_heads=4), make_mesh(4, 2)
    held = 0
    for path, shape in leaf_shapes(config).items():
        dtype = np.float32 if path.endswith("scale") else jax.numpy.bfloat16
        array = put_weight(mesh, path, np.zeros(shape, dtype), weights=weights)
        held += array.addressable_shards[3].data.nbytes
    assert device_bytes(config, data=4, model=2, weights=weights) == held


def test_what_fits_a_slice():
    """Mutation: forget the allowance; more devices along "data" than rows; whole weights on more
    than a square's side of devices along "model".
    """

    def ways(name):
        found = (choose_placement(CATALOG[name].config, where) for where in SLICES)
        return [(p.data, p.model, p.weights, p.fits) for p in found]

    small = [(16, 1, "replicated", True), (32, 2, "replicated", True)]
    assert ways("EleutherAI/pythia-14m") == small
    # 12.8 GiB in bfloat16: less than a chip has, more than three quarters of it.
    assert ways("Qwen/Qwen2.5-7B")[0] == (8, 2, "replicated", True)
    assert ways("Qwen/Qwen2.5-72B") == [(4, 4, "sharded", True), (8, 8, "replicated", True)]
    assert ways("meta-llama/Llama-3.1-405B") == [(4, 4, "sharded", False), (8, 8, "sharded", True)]
    entry = CATALOG["Qwen/Qwen2.5-7B"]
    whole = device_bytes(entry.config, data=16, model=1, weights="replicated")
    assert whole == pytest.approx(2 * entry.parameters, rel=1e-3)


def test_an_uncovered_leaf_fails_the_check(monkeypatch, capsys, forgetful):
    """Mutation: a leaf without a rule is laid whole on every device; the others are not checked;
    the exit code is 0 all the same.
    """
    rules = tuple(rule for rule in WEIGHT_RULES if "positions" not in rule[0])
    monkeypatch.setattr(sharding, "WEIGHT_RULES", rules)
    monkeypatch.setattr(shape_check, "virtual_devices", lambda: None)
    monkeypatch.setattr(shape_check, "report_memory", lambda entries: None)
    assert cli.main(["models", "--check", "openai-community/gpt2", "EleutherAI/pythia-14m"]) == 1
    written = capsys.readouterr()
    assert re.search(r"EleutherAI/pythia-14m +14,067,712 +12,800 +0\.03 GiB", written.out)
    assert re.fullmatch(
        r"softprompt: openai-community/gpt2: no sharding rule .*'positions/embedding'.*\n",
        written.err,
    )


def test_shapes_that_disagree_fail_the_check(monkeypatch, capsys, forgetful):
    """Mutation: count a model's leaves without asking the model."""
    entry = CATALOG["EleutherAI/pythia-14m"]
    shapes = leaf_shapes(entry.config) | {"final_norm/scale": (129,)}
    monkeypatch.setattr(shape_check, "leaf_shapes", lambda config: shapes)
    (failed,) = shape_check.report([entry])
    assert failed.startswith("EleutherAI/pythia-14m: ")
    assert "129" in failed


@pytest.mark.matrix
def test_the_command_needs_no_accelerator():
    """Mutation: ask for devices before there are sixteen; print nothing of the compiled step."""
    command = [sys.executable, "-m", "softprompt", "models", "--check", "*pythia-14m", "*405B"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    header, small, large, about, compiled = done.stdout.splitlines()
    assert header.split() == [
        *("NAME", "PARAMETERS", "TRAINED"),
        *("v5e-16", "(16", "x", "16", "GiB)", "v4-128", "(64", "x", "32", "GiB)"),
    ]
    assert re.search("0.03 GiB a chip, 16x1 replicated +0.01 GiB a chip, 32x2 replicated", small)
    assert "48.73 GiB a chip, 4x4 sharded  DOES NOT FIT" in large
    assert "32 rows of 512 tokens, 100 prompt vectors, Adafactor, weights in bfloat16" in about
    assert compiled.startswith("EleutherAI/pythia-14m compiled for 16x1 replicated, ")
    assert re.search(r" 0\.03 GiB of arguments and \d\.\d\d GiB of temporaries a device", compiled)
