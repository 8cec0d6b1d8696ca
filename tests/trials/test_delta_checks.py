"""Deltas that nothing would read whole: refused, by every command that reads one."""

import json

import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from softprompt import cli
from softprompt.config import base_config, set_key
from softprompt.errors import UserError
from softprompt.methods.delta_file import save_delta
from softprompt.pretrained.loading import load_model
from softprompt.trials.delta_checks import check_fit, folded_shapes
from softprompt.trials.run import provenance
from tests.mistakes import one_line
from tests.own_task import give, make_config, write_task
from tests.tiny import tiny_config
from tests.tiny_t5 import tiny_t5_config

SIZES = {"llama": tiny_config(), "t5": tiny_t5_config()}


def config_of(name, **keys):
    config = base_config()
    for key, value in {"name": name, "length": 3, **keys}.items():
        set_key(config, f"method.{key}", value)
    return config


def leaves_of(config, model):
    """The leaves of a whole delta, by path."""
    shapes = folded_shapes(config, SIZES[model])
    return {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}


def check(config, model, leaves):
    check_fit(unflatten_dict(leaves, sep="/"), config, SIZES[model], file="d")


@pytest.mark.parametrize(
    ("model", "name", "keys", "missing", "message"),
    [
        ("t5", "prompt", {"place": "both"}, "decoder/prompt", "decoder/prompt, together"),
        ("llama", "multitask", {}, "task_rows", "prompt, task_cols, task_rows, together"),
        ("llama", "prefix", {}, "prefix/v", "prefix/k, prefix/v, together"),
        ("t5", "prefix", {"place": "all"}, "decoder/cross_prefix/k", "decoder/cross_prefix/k, "),
        ("llama", "lora", {}, "layers/attn/q/lora_b", "layers/attn/q/lora_a, layers/attn/q/lora_b"),
        ("llama", "lora", {"targets": "qkv"}, "layers/attn/qkv/k", "layers/attn/qkv/k, "),
        ("llama", "dora", {"targets": "qkv"}, "layers/attn/q/magnitude", ".*attn/qkv/lora_a, "),
        ("llama", "dora", {"targets": "q"}, "layers/attn/q/magnitude", ".*attn/q/lora_a, "),
        ("llama", "adapter", {}, "layers/mlp_adapter/up_bias", "layers/mlp_adapter/down, "),
        ("llama", "bitfit", {}, "layers/attn/q/bias", "layers/attn/q/bias, together"),
        ("t5", "full", {}, "embed/embedding", "embed/embedding, together"),
    ],
)
def test_what_is_half_there(model, name, keys, missing, message):
    """Breaks when missing leaves pass, or a magnitude is apart from the factors of `qkv`."""
    config = config_of(name, **keys)
    leaves = leaves_of(config, model)
    check(config, model, leaves)
    del leaves[missing]
    with pytest.raises(UserError, match=f"^d: {missing} is missing; allowed: {message}"):
        check(config, model, leaves)


@pytest.mark.parametrize(("name", "half"), [("lora", "encoder/layers/attn/q/lora_b"), ("ia3", "")])
def test_an_imported_adapter_may_leave_projections_out(name, half):
    """One of the encoder alone. Mutations: every projection has to be there; none has to be."""
    config = config_of(name)
    leaves = leaves_of(config, "t5")
    encoder = {path: leaf for path, leaf in leaves.items() if path.startswith("encoder/")}
    assert 0 < len(encoder) < len(leaves)
    check(config, "t5", encoder)
    with pytest.raises(UserError, match="d: .* is missing"):
        check(config, "t5", {})
    if half:
        del encoder[half]
        with pytest.raises(UserError, match=f"d: {half} is missing"):
            check(config, "t5", encoder)


def test_what_nothing_reads():
    """Mutation: the check of extra leaves, or of shapes, left out."""
    for name, message in (("prompt", "the leaves prompt"), ("fewshot", "no leaf")):
        config = config_of(name)
        leaves = leaves_of(config, "llama")
        check(config, "llama", leaves)
        with pytest.raises(UserError, match=rf"^d: lora \[2\] does not fit.*allowed: {message}$"):
            check(config, "llama", {**leaves, "lora": np.zeros(2)})
    config = config_of("prompt")
    with pytest.raises(UserError, match=r"^d: prompt \[2, 48\] does not .* allowed: \[3, 48\]$"):
        check(config, "llama", {"prompt": np.zeros((2, 48))})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def spoilt(place, tiny_folder, tmp_path):
    """Makes a finished trial's folder whose delta is changed; its fingerprint is the model's."""

    def write(name, **leaves):
        config = make_config(place, tiny_folder, method__name=name)
        there = leaves_of(config, "llama") | leaves
        there = {path: leaf for path, leaf in there.items() if leaf is not None}
        folder = tmp_path / "run"
        known = provenance(config, load_model(str(tiny_folder)))
        save_delta(folder / "delta.safetensors", unflatten_dict(there, sep="/"), known)
        (folder / "config.json").write_text(json.dumps(config.to_dict()))
        return folder

    return write


@pytest.mark.parametrize(
    ("name", "leaves", "kind", "message"),
    [
        ("prompt", {"extra": np.ones(2, np.float32)}, "npy", "extra [2] does not fit this model"),
        ("prompt", {"prompt": np.ones((3, 40), np.float32)}, "npy", "prompt [3, 40] does not fit"),
        ("prefix", {"prefix/v": None}, "peft", "prefix/v is missing; allowed: prefix/k, prefix/v"),
        ("lora", {"layers/attn/q/lora_b": None}, "peft", "layers/attn/q/lora_b is missing; "),
        ("lora", {"layers/attn/q/lora_b": None}, "hf", "layers/attn/q/lora_b is missing; "),
        ("full", {"final_norm/scale": None}, "hf", "final_norm/scale is missing; "),
    ],
)
def test_every_command_refuses_it(
    spoilt, place, tmp_path, capsys, monkeypatch, name, leaves, kind, message
):
    """Mutation: the check only where fingerprints differ, or not in one of the three."""
    folder, to = spoilt(name, **leaves), tmp_path / "to"
    give(monkeypatch, "a warm film\n")
    for command in (
        ["evaluate", "--run", folder],
        ["predict", "--run", folder],
        ["export", "--run", folder, "--format", kind, "--to", to],
    ):
        assert cli.main([str(word) for word in command]) == 2
        written = capsys.readouterr()
        assert written.out == ""
        assert one_line(written.err).startswith(f"{folder}/delta.safetensors: {message}")
    assert not to.exists()
