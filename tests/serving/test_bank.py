"""Which folders are tasks, and how much of them is kept."""

import json

import jax
import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from experiments.serving_tasks import make_task
from softprompt.config import base_config, set_key
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.interchange.adapter_files import write_adapter
from softprompt.interchange.peft import to_peft
from softprompt.methods.delta_file import load_delta
from softprompt.serving import bank as bank_module
from softprompt.serving.bank import Bank, lane_bytes
from softprompt.serving.predictions import Predictions
from softprompt.trials.run import read_config
from tests.serving.conftest import METHODS


@pytest.fixture
def folder(tiny_loaded, tmp_path):
    return make_task(tmp_path / "task", tiny_loaded, seed=3, **METHODS["short"])


def test_a_peft_adapter_is_the_same_task(tiny_loaded, folder, tmp_path):
    """Mutation: an adapter's vectors are scaled, or its BOS is lost."""
    bank, adapter = Bank(tiny_loaded), tmp_path / "adapter"
    delta, _ = load_delta(folder / "delta.safetensors")
    method = json.loads((folder / "config.json").read_text())["method"]
    write_adapter(adapter, to_peft(delta, tiny_loaded.config, method))
    (ours,), (theirs,) = bank.read("a", folder), bank.read("b", adapter)
    lanes = [bank.lane(task) for task in (ours, theirs)]
    jax.tree.map(np.testing.assert_array_equal, *lanes)
    assert ours.bos == theirs.bos
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="from safetensors only"):
        bank.read("b", adapter)


def changed(folder, change):
    """Rewrites a delta's tensors with its metadata."""
    file = folder / "delta.safetensors"
    _, origin = load_delta(file)
    metadata = {"softprompt": json.dumps(origin | change.pop("origin", {}))}
    save_file({**load_file(file), **change}, file, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.full((3, 48), np.nan, np.float32)}, "prompt: 144 of 144 are not finite"),
        ({"prompt": np.zeros((4, 48), np.float32)}, "prompt .4, 48. does not fit"),
        ({"prompt": np.zeros((3, 48), np.int32)}, "prompt is I32; allowed: F32, F16, F64"),
        ({"prompt": np.zeros((3, 48), bfloat16)}, "prompt is BF16; allowed: F32, F16, F64"),
        ({"more": np.zeros(2, np.float32)}, "more .2. does not fit"),
        ({"origin": {"fingerprint": "other"}}, "was trained on weights other"),
    ],
)
def test_bad_files(tiny_loaded, folder, change, message):
    """Mutation: drop one of the checks."""
    changed(folder, dict(change))
    with pytest.raises(UserError, match=message):
        Bank(tiny_loaded).read("task", folder)


def test_a_large_file_is_not_read(tiny_loaded, folder, monkeypatch):
    """Mutation: the size is checked after reading."""
    monkeypatch.setattr(bank_module, "MOST_BYTES", 100)
    monkeypatch.setattr(bank_module, "load_delta", None)
    with pytest.raises(UserError, match="bytes; allowed: 100"):
        Bank(tiny_loaded).read("task", folder)


def test_full_fine_tuning_is_refused(tiny_loaded, tmp_path):
    """Mutation: weights are taken for variables."""
    folder = make_task(tmp_path / "full", tiny_loaded, seed=0, name="full")
    with pytest.raises(UserError, match="method 'full' cannot be served"):
        Bank(tiny_loaded).read("full", folder)


def test_another_tokenizer_is_refused(tiny_loaded, tmp_path, monkeypatch):
    """Mutations: a trial's ids are read as the engine's tokenizer spells them; `predict` of a
    trial with another tokenizer takes the engine's model.
    """
    config = base_config().copy_and_resolve_references()
    set_key(config, "model.tokenizer", "other/words")
    folder = make_task(tmp_path / "task", tiny_loaded, seed=3, config=config, **METHODS["short"])
    with pytest.raises(UserError, match="'model.tokenizer' is 'other/words'"):
        Bank(tiny_loaded).read("task", folder)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config, predictions = read_config(folder), Predictions(tiny_loaded, Progress())
    assert not predictions._same_weights(config)
    set_key(config, "model.tokenizer", "")
    assert predictions._same_weights(config)


def test_predict_answers_with_the_loaded_version(tiny_loaded, folder):
    """Mutation: the folder is read at the first prediction, whatever it holds by then."""
    (task,) = Bank(tiny_loaded).read("task", folder)
    changed(folder, {"prompt": np.ones((3, 48), np.float32)})
    with pytest.raises(UserError, match="'task': its folder has changed since it was loaded"):
        Predictions(tiny_loaded, Progress())(task, ["a text"])


def test_the_cache_keeps_the_last_used(tiny_loaded, task_root):
    """Mutation: the oldest is kept; lanes are looked up by name, not by content."""
    bank = Bank(tiny_loaded)
    kept = bank.lane(bank.read("short", task_root / "short")[0])
    assert bank.lane(bank.read("other name", task_root / "short")[0]) is kept
    small = Bank(tiny_loaded, limit=3 * lane_bytes(kept) - 1)
    tasks = [small.read(name, task_root / name)[0] for name in ("short", "long")]
    first, second = map(small.lane, tasks)
    assert small.lane(tasks[0]) is first  # now the second is the least recently used
    small.read("prefix", task_root / "prefix")
    assert small.bytes == 2 * lane_bytes(kept)
    assert small.lane(tasks[0]) is first
    assert small.lane(tasks[1]) is not second
    jax.tree.map(np.testing.assert_array_equal, small.lane(tasks[1]), second)
