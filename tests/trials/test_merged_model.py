"""`softprompt export --format hf`: a model that computes alone what base and delta do."""

import numpy as np
import pytest

from softprompt import cli
from softprompt.config import method_settings
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.methods.delta_file import load_delta
from softprompt.models.layers import collections
from softprompt.pretrained.loading import load_model
from softprompt.trials.run import read_config
from tests.handover_cases import write_trial
from tests.matrix import matrix
from tests.mistakes import run
from tests.own_task import words, write_task
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5

WRITE = {"llama": write_llama_folder, "t5": write_complete_t5}


def train(root, model, method, **more):
    """The folder of a short trial that moves what it trains."""
    folder = root / f"{method}-run"
    given = {"train__steps": 3, "method__name": method, "optimizer__rate": 0.05}
    given |= {"eval__select": "last", **more}
    command = ["train", *words(root, root / model, **given), "--workdir", str(folder)]
    assert cli.main(command) == 0
    return folder


# Mutations: `merge` returns the base's weights; LoRA's scale left out of the config.
@pytest.mark.parametrize(
    ("model", "method"),
    matrix([("t5", "lora"), ("llama", "dora"), ("llama", "full")], keep=[("llama", "dora")]),
)
def test_the_folder_computes_what_base_and_delta_do(tmp_path, capsys, model, method):
    WRITE[model](write_task(tmp_path) / model)
    folder, to = train(tmp_path, model, method), tmp_path / "whole"
    report = run(capsys, "export", "--run", folder, "--format", "hf", "--to", to)
    assert report["method"] == method
    assert {"config.json", "model.safetensors"} <= {
        name.rsplit("/", 1)[-1] for name in report["wrote"]
    }
    config = read_config(folder)
    base, alone = load_model(config.model.name), load_model(str(to))
    cfg = METHODS[method].resolve(method_settings(config), Setup(base.config))
    variables = METHODS[method].variables(
        load_delta(folder / "delta.safetensors")[0], base.weights, cfg, None
    )
    beside = collections(base.weights, variables)
    tokens = [np.arange(3, 12, dtype=np.int32)] * (1 + base.encoder_decoder)
    plain, ours, theirs = (
        loaded.model.apply(tree, *tokens)
        for loaded, tree in (
            (base, {"params": base.weights}),
            (base, beside),
            (alone, {"params": alone.weights}),
        )
    )
    assert np.abs(ours - plain).max() > 1e-3
    np.testing.assert_allclose(theirs, ours, atol=1e-5, rtol=0)


def test_mistakes(tmp_path, capsys):
    write_llama_folder(write_task(tmp_path) / "llama")
    folder = write_trial(
        tmp_path / "prefix", tmp_path, tmp_path / "llama", {}, method__name="prefix"
    )
    asked = ["export", "--run", folder, "--format", "hf", "--to"]
    line = run(capsys, *asked, tmp_path / "to", code=2)
    assert line.startswith("--format hf: a prefix cannot be merged into the model's weights; ")
    assert line.endswith("allowed for lora, dora, full, and for prompts, as added tokens")
    folder = train(tmp_path, "llama", "lora", model__quantize="int8")
    line = run(capsys, "export", "--run", folder, "--format", "hf", "--to", tmp_path / "to", code=2)
    assert line == "LoRA does not merge into quantised weights; use model.quantize=none"
    assert not (tmp_path / "to").exists()
