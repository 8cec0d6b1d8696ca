"""How much memory a load takes: what is loaded, one stacked leaf, and little more.

The same of a Llama of 1.24 billion: `python -m tests.models.memory`, experiments/LOG.md.
"""

import sys

import pytest

from tests.models.memory import SLACK, SMOLLM2, measure, write_smollm2


# Mutation: read_weights collects its finished leaves and puts them at the end.
@pytest.mark.matrix
@pytest.mark.real
@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_loading_takes_the_weights_and_one_leaf_of_memory(tmp_path, kind):
    model = SMOLLM2 if kind == "gguf" else str(write_smollm2(tmp_path / "model"))
    found = measure(model, dtype="float32")
    print({key: round(value, 1) for key, value in found.items()})
    assert 500 < found["final"] < 560
    assert found["peak"] <= found["final"] + found["largest"] + SLACK
