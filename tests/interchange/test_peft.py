"""Golden adapters that PEFT saved: read, and written again byte for byte; what is refused."""

import functools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from softprompt.interchange.adapter import CONFIG, TENSORS, Adapter, read_adapter, tensors_bytes
from softprompt.interchange.peft import Facts, from_peft, to_peft
from softprompt.pretrained.loading import load_model, make_model
from tests.interchange import methods, plain
from tests.interchange.cases import CASES, GOLDEN, facts, is_t5, same_config, sizes, write_model
from tests.interchange.methods import CONFIGS
from tests.tiny_t5 import load_weights


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_what_peft_saved_is_read_and_written_again(name):
    """Must show 2. Mutations: k and v swapped, or heads before positions, in `prefix_from` and
    `prefix_to` alike do not show here; any one-sided change, another order of tensors, a field
    left out of `FIELDS`, does."""
    case, file = CASES[name], GOLDEN / name / TENSORS
    adapter = read_adapter(GOLDEN / name)
    delta, method = from_peft(adapter, sizes(case.model))
    assert method == case.method
    again = to_peft(delta, facts(case, origin=adapter.config))
    assert tensors_bytes(again.tensors, {}) == file.read_bytes()
    same_config((GOLDEN / name / CONFIG).read_text(), again.config)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_a_trial_writes_the_config_that_peft_writes(name):
    """Mutation: another default in `FIELDS`, or longer names in `targets`."""
    case = CASES[name]
    delta, _ = from_peft(read_adapter(GOLDEN / name), sizes(case.model))
    same_config((GOLDEN / name / CONFIG).read_text(), to_peft(delta, facts(case)).config)


def test_a_prompt_written_through_p_tunings_network_is_one_of_p_tuning():
    """Mutation: it is called prompt tuning, or the network's width is the model's."""
    delta, _ = from_peft(read_adapter(GOLDEN / "ptuning-llama"), sizes("llama"))
    plainly = facts(CASES["ptuning-llama"])
    method = {**plainly.method, "reparam": "mlp", "bottleneck": 5}
    made = to_peft(delta, Facts(plainly.model, method, plainly.base))
    same_config((GOLDEN / "ptuning-llama" / CONFIG).read_text(), made.config)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Name of a tiny model -> the model and its weights, float32."""

    @functools.cache
    def load(name):
        folder = write_model(tmp_path_factory.mktemp("models") / name, name)
        put = {"put": lambda path, leaf: jnp.asarray(leaf)}
        if is_t5(name):
            config, weights, _ = load_weights(folder, dtype=np.dtype("float32"), **put)
            return make_model(config, "float32"), weights
        loaded = load_model(str(folder))
        return loaded.model, loaded.weights

    return load


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_that_peft_gave(name, models):
    """Must show 2. Mutations: k and v swapped in both directions, the thirds of c_attn in another
    order, alpha / r for rsLoRA, a T5's prefix as it lies in the file."""
    case, golden = CASES[name], json.loads((GOLDEN / "logits.json").read_text())
    delta, _ = from_peft(read_adapter(GOLDEN / name), sizes(case.model))
    found_TV = plain.logits(*models(case.model), delta, case)
    np.testing.assert_allclose(found_TV[-1, :16], golden[name], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.method["name"] in CONFIGS])
def test_our_methods_give_the_same_logits(name, models):
    """Must show 2. Mutation: a method reads another leaf than the one that is imported."""
    case, golden = CASES[name], json.loads((GOLDEN / "logits.json").read_text())
    delta, _ = from_peft(read_adapter(GOLDEN / name), sizes(case.model))
    found_TV = methods.logits(*models(case.model), delta, case)
    np.testing.assert_allclose(found_TV[-1, :16], golden[name], atol=1e-4, rtol=0)


def test_other_beginnings_of_names():
    """PEFT on a bare GPT-2 leaves out `transformer.`. Mutation: `spellings` is passed over."""
    golden = read_adapter(GOLDEN / "lora-gpt2")
    short = {name.replace("transformer.", ""): x for name, x in golden.tensors.items()}
    assert short.keys() != golden.tensors.keys()
    for config in (golden.config, golden.config | {"target_modules": None}):
        delta, _ = from_peft(Adapter(config, short), sizes("gpt2"))
        made = to_peft(delta, facts(CASES["lora-gpt2"])).tensors
        assert tensors_bytes(made, {}) == (GOLDEN / "lora-gpt2" / TENSORS).read_bytes()


def test_the_header_is_pefts_but_for_one_key(tmp_path):
    """Mutation: provenance spread over several keys, or written by the library (in any order)."""
    content = (GOLDEN / "prompt-llama" / TENSORS).read_bytes()
    tensors = read_adapter(GOLDEN / "prompt-llama").tensors
    written = {tensors_bytes(tensors, {"é": 1, "a": None}) for _ in range(8)}
    assert len(written) == 1
    (mine,) = written

    def split(content):
        end = 8 + int.from_bytes(content[:8], "little")
        assert end % 8 == 0
        return json.loads(content[8:end]), content[end:]

    (header, data), (theirs, their_data) = split(mine), split(content)
    assert data == their_data
    assert json.loads(header["__metadata__"].pop("softprompt")) == {"é": 1, "a": None}
    assert list(header.items()) == list(theirs.items())


def test_layouts_are_those_of_the_models():
    """A LoRA that GPT-2 has on its fused projection becomes one A and three Bs."""
    delta, _ = from_peft(read_adapter(GOLDEN / "lora-gpt2"), sizes("gpt2"))
    shapes = {path: leaf.shape for path, leaf in flatten_dict(delta, sep="/").items()}
    assert shapes == {
        "layers/attn/qkv/lora_a": (2, 8, 2),
        **{f"layers/attn/qkv/{name}": (2, 2, 2, 4) for name in "qkv"},
        "layers/attn/o/lora_a": (2, 2, 4, 2),
        "layers/attn/o/lora_b": (2, 2, 8),
        "layers/mlp/up/lora_a": (2, 8, 2),
        "layers/mlp/up/lora_b": (2, 2, 10),
    }
    assert all(leaf.dtype == np.float32 for leaf in flatten_dict(delta).values())
