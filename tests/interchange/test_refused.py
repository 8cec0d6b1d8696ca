"""What is not one of our deltas, or would not be read as one: one line that says why."""

import json
import re
import shutil

import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import save_file

from softprompt.errors import UserError
from softprompt.interchange.adapter_files import CONFIG, TENSORS, Adapter, read_adapter
from softprompt.interchange.peft import from_peft, to_peft
from tests.interchange.cases import CASES, GOLDEN, method, sizes

ONES = np.ones((3, 8), np.float32)


def refused(text, call, *arguments, **more):
    """Checks that a call is refused in one line that begins so."""
    with pytest.raises(UserError, match=f"^{re.escape(text)}") as caught:
        call(*arguments, **more)
    assert "\n" not in str(caught.value)


def read(name, tensors=None, **config):
    """A golden adapter with other tensors or other fields, as it is read."""
    found = read_adapter(GOLDEN / name)
    made = Adapter(found.config | config, tensors or found.tensors, {}, "theirs")
    return from_peft(made, sizes(CASES[name].model))


def test_tensors():
    """Must show 7. Mutation: zip over what is there, or take shapes as they come."""
    lora, prompt = (read_adapter(GOLDEN / name).tensors for name in ("lora-llama", "prompt-llama"))
    gone = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    fewer = {name: tensor for name, tensor in lora.items() if name != gone}
    message = "theirs: tensors do not match its config and the model; "
    refused(f"{message}missing: {gone}", read, "lora-llama", fewer)
    more = {**lora, "base_model.model.lm_head.lora_A.weight": np.zeros((2, 8), np.float32)}
    refused(
        f"{message}unexpected: base_model.model.lm_head.lora_A.weight", read, "lora-llama", more
    )
    wide = {"prompt_embeddings": np.zeros((3, 9), np.float32)}
    line = f"{message}misshapen: prompt_embeddings [3, 9] (expected [3, 8])"
    refused(line, read, "prompt-llama", wide)
    refused(f"{message}unexpected: other", read, "prompt-llama", {**prompt, "other": ONES})


def test_trained_biases():
    """A LoRA leaves them alone. Breaks when they are passed over, or called unexpected tensors."""
    tensors = read_adapter(GOLDEN / "lora-gpt2").tensors
    more = {"base_model.model.transformer.h.0.attn.c_attn.base_layer.bias": np.ones(24)}
    line = "theirs: bias of its config is 'all'; allowed: 'none', for it trains biases: base_model."
    refused(line, read, "lora-gpt2", tensors | more, bias="all")


def test_an_adapter_of_another_model():
    adapter = read_adapter(GOLDEN / "lora-llama")
    with pytest.raises(UserError, match="it adapts no module of this model|unexpected: base_mod"):
        from_peft(adapter, sizes("gpt2"))
    with pytest.raises(UserError, match="task_type of its config is 'CAUSAL_LM'; allowed: 'SEQ_2"):
        from_peft(adapter, sizes("t5"))


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        (
            "lora-llama",
            {"peft_type": "LOHA"},
            "theirs: unknown peft_type 'LOHA' (did you mean 'LORA'?); known: IA3, LORA",
        ),
        ("lora-llama", {"peft_type": None}, "theirs: unknown peft_type 'None'; known: "),
        (
            "lora-llama",
            {"use_dora": "yes"},
            "theirs: use_dora of its config is 'yes'; allowed: False or True",
        ),
        (
            "lora-llama",
            {"rank_pattern": {"q_proj": 0}},
            "theirs: rank_pattern of its config is {'q_proj': 0}; allowed: patterns with a whole",
        ),
        (
            "lora-llama",
            {"rank_pattern": {"(": 2}},
            "theirs: rank_pattern of its config is {'(': 2}",
        ),
        ("lora-llama", {"rank_pattern": {"q_proj": 4}}, "theirs: tensors do not match its config"),
        ("lora-llama", {"alpha_pattern": {"q": "1"}}, "theirs: alpha_pattern of its config is {'q"),
        ("lora-llama", {"target_modules": "("}, "theirs: target_modules of its config is '('; all"),
        ("lora-llama", {"target_modules": 3}, "theirs: target_modules of its config is 3; allowed"),
        ("lora-llama", {"layers_to_transform": "1"}, "theirs: layers_to_transform of its config"),
        ("lora-llama", {"layers_to_transform": [0]}, "theirs: tensors do not match its config"),
        ("lora-llama", {"layers_pattern": ["("]}, "theirs: layers_pattern of its config is ['(']"),
        ("lora-llama", {"bias": "some"}, "theirs: bias of its config is 'some'; allowed: 'none', "),
        ("lora-llama", {"lora_alpha": 0}, "theirs: lora_alpha of its config is 0; allowed: a numb"),
        ("lora-llama", {"modules_to_save": ["lm_head"]}, "theirs: modules_to_save of its config"),
        (
            "lora-llama",
            {"init_lora_weights": "pissa"},
            "theirs: init_lora_weights of its config is",
        ),
        (
            "lora-llama",
            {"use_new": 3},
            "theirs: use_new of its config is 3; allowed: no such field",
        ),
        ("lora-llama", {"r": 0}, "theirs: r of its config is 0; allowed: a whole number from 1"),
        ("lora-llama", {"r": True}, "theirs: r of its config is True; allowed: a whole number"),
        (
            "lora-llama",
            {"lora_alpha": "8"},
            "theirs: lora_alpha of its config is '8'; allowed: a n",
        ),
        (
            "prompt-llama",
            {"num_virtual_tokens": None},
            "theirs: num_virtual_tokens of its config is",
        ),
        ("prompt-llama", {"num_virtual_tokens": 4}, "theirs: tensors do not match its config"),
        (
            "prompt-llama",
            {"num_transformer_submodules": 2},
            "theirs: num_transformer_submodules of its config is 2; allowed: 1",
        ),
        ("prompt-t5", {"task_type": "SEQ_CLS"}, "theirs: task_type of its config is 'SEQ_CLS'"),
        (
            "prefix-t5",
            {"num_transformer_submodules": 1},
            "theirs: num_transformer_submodules of its config is 1; allowed: 2 for a prefix",
        ),
        ("ia3-llama", {"target_modules": ["o_proj"]}, "theirs: tensors do not match its config"),
    ],
)
def test_configs(name, config, message):
    """Mutation: an unknown or a meaningful field is passed over."""
    refused(message, read, name, None, **config)


def test_fields_that_say_nothing_are_passed_over():
    delta, _ = read("lora-llama", None, use_new=False, later={}, peft_version="9")
    assert delta
    few = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}
    least = Adapter(few, read_adapter(GOLDEN / "prompt-llama").tensors)
    assert from_peft(least, sizes("llama"))[0].keys() == {"prompt"}


def test_of_a_prompt_for_both_stacks_the_encoders_half_is_read():
    """PEFT never reads the rest. Mutation: take the whole, or the last rows."""
    rows = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    for given in (2, None):
        more = {"num_transformer_submodules": given}
        delta, found = read("prompt-t5", {"prompt_embeddings": rows}, **more)
        np.testing.assert_array_equal(delta["encoder"]["prompt"], rows[:3])
        assert found["length"] == 3


@pytest.fixture
def folder(tmp_path):
    """A copy of a golden adapter that may be spoilt."""
    return shutil.copytree(GOLDEN / "prompt-llama", tmp_path / "adapter")


def test_folders(folder, tmp_path):
    (folder / CONFIG).rename(folder / "config.json")
    refused(f"{folder}: no PEFT adapter there (it has no {CONFIG})", read_adapter, folder)
    shutil.copytree(GOLDEN / "prompt-llama", folder / "mine")
    with pytest.raises(UserError, match="there are adapters in its folders mine$"):
        read_adapter(folder)
    (folder / CONFIG).write_text('{"peft_type": ')
    refused(f"{folder / CONFIG}: not readable as JSON (", read_adapter, folder)
    (folder / CONFIG).write_text("[]")
    refused(f"{folder / CONFIG}: expected a JSON object", read_adapter, folder)
    shutil.copyfile(GOLDEN / "prompt-llama" / CONFIG, folder / CONFIG)
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[:-4])
    refused(f"{folder / TENSORS}: not a complete safetensors file", read_adapter, folder)
    (folder / TENSORS).unlink()
    refused(f"{folder}: neither {TENSORS} nor adapter_model.bin", read_adapter, folder)


def test_what_is_no_number(folder):
    """Mutation: take it, and score every example as of the first class."""
    rows = np.zeros((3, 8), np.float32)
    rows[1] = np.inf
    save_file({"prompt_embeddings": rows}, folder / TENSORS)
    message = f"{folder / TENSORS}: prompt_embeddings: 8 of 24 are not finite"
    refused(message, read_adapter, folder)


def test_metadata_that_is_not_ours(folder):
    rows = {"prompt_embeddings": np.zeros((3, 8), np.float32)}
    save_file(rows, folder / TENSORS, metadata={"softprompt": "not JSON"})
    refused(f"{folder / TENSORS}: its metadata 'softprompt' is not JSON", read_adapter, folder)


def export(name, leaves=None, /, **more):
    """A golden adapter as a delta, with more leaves or another method, written again."""
    case = CASES[name]
    delta, _ = from_peft(read_adapter(GOLDEN / name), sizes(case.model))
    flat = flatten_dict(delta, sep="/") | (leaves or {})
    flat = {path: leaf for path, leaf in flat.items() if leaf is not None}
    tree = unflatten_dict(flat, sep="/")
    return to_peft(tree, sizes(case.model), method(case, **more), base=case.model)


@pytest.mark.parametrize(
    ("name", "leaves", "more", "message"),
    [
        ("prompt-llama", {}, {"bos": "before"}, "config key 'method.bos' is 'before': PEFT puts"),
        ("prompt-llama", {"prompt": ONES[:0]}, {}, "the delta has no vectors (length 0)"),
        ("prompt-llama", {"mlp/kernel": ONES}, {}, "the delta has leaves that PEFT's PROMPT_TUN"),
        ("prompt-t5", {"decoder/prompt": ONES}, {}, "decoder/prompt: PEFT reads a prompt before"),
        ("prompt-t5", {}, {"prompt_to_input": False}, "config key 'method.prompt_to_input' is F"),
        ("prefix-t5", {}, {}, "a prefix of an encoder-decoder cannot be exported (decoder/prefix"),
        (
            "prefix-llama",
            {"prefix/v": None},
            {},
            "the delta has no leaf 'prefix/v'; prefix needs it",
        ),
        (
            "lora-llama",
            {},
            {"rank": 3},
            "layers/attn/q/lora_a has rank 2; config key 'method.rank'",
        ),
        (
            "lora-llama",
            {"layers/attn_norm/lora_a": ONES},
            {},
            "the delta has leaves that PEFT's LORA has no tensors for: layers/attn_norm/lora_a",
        ),
        (
            "lora-gpt2",
            {f"layers/attn/{n}/lora_{s}": np.ones(1) for n in "qv" for s in "ab"}
            | {f"layers/attn/qkv/{n}": None for n in ("lora_a", "q", "k", "v")},
            {},
            "layers/attn/q/lora_a, layers/attn/v/lora_a: PEFT has one A for queries, keys",
        ),
        (
            "prompt-llama",
            {},
            {"name": "adapter"},
            "method 'adapter' cannot be exported to PEFT; allowed: prompt, multi",
        ),
    ],
)
def test_deltas_that_peft_would_misread(name, leaves, more, message):
    """Must show 7. Mutation: each check left out."""
    refused(message, lambda: export(name, leaves, **more))


def test_what_can_be_said_otherwise_is():
    """An A that q, k and v share is written for each; parts of c_attn without a B get zeros."""
    lora = read_adapter(GOLDEN / "lora-rs-llama").tensors
    delta, _ = read("lora-rs-llama", lora)
    flat = flatten_dict(delta, sep="/")
    shared = {
        "layers/attn/qkv/lora_a": flat["layers/attn/q/lora_a"],
        **{f"layers/attn/qkv/{n}": flat[f"layers/attn/{n}/lora_b"] for n in "qv"},
        **dict.fromkeys(flat),
    }
    made = export("lora-rs-llama", shared)
    names = [f"base_model.model.model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    for name in names:
        expected = lora[f"{names[0]}.lora_A.weight"]
        np.testing.assert_array_equal(made.tensors[f"{name}.lora_A.weight"], expected)
    assert not made.tensors[f"{names[1]}.lora_B.weight"].any()
    assert made.config["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    less = {"layers/attn/q/ia3": None, "layers/attn/v/ia3": None}
    vector = export("ia3-gpt2", less).tensors["base_model.model.transformer.h.1.attn.c_attn.ia3_l"]
    np.testing.assert_array_equal(vector[:8], 1)
    np.testing.assert_array_equal(vector[16:], 1)
    assert not (vector[8:16] == 1).all()


def test_targets_that_no_ending_tells_apart():
    """One stack of a T5: PEFT is given a pattern. Mutation: endings that name both stacks."""
    delta, _ = from_peft(read_adapter(GOLDEN / "lora-t5"), sizes("t5"))
    flat = flatten_dict(delta, sep="/")
    encoder = {
        path: leaf for path, leaf in flat.items() if path.startswith("encoder/layers/attn/q")
    }
    made = export("lora-t5", {**dict.fromkeys(flat), **encoder})
    pattern = made.config["target_modules"]
    assert isinstance(pattern, str)
    assert re.fullmatch(pattern, "encoder.block.12.layer.0.SelfAttention.q")
    assert not re.fullmatch(pattern, "decoder.block.12.layer.0.SelfAttention.q")
    again, _ = from_peft(made, sizes("t5"))
    assert flatten_dict(again, sep="/").keys() == encoder.keys()


def test_the_config_is_json():
    assert json.loads(json.dumps(export("lora-llama").config))
