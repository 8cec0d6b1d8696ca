"""Golden adapters that PEFT saved: read, and written again byte for byte; what is refused."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from softprompt.errors import UserError
from softprompt.interchange.adapter_files import (
    CONFIG,
    TENSORS,
    Adapter,
    read_adapter,
    tensors_bytes,
)
from softprompt.interchange.peft import from_peft, to_peft
from softprompt.pretrained.families import read_family
from softprompt.pretrained.loading import load_model, make_model
from tests.families import VARIANTS
from tests.interchange import methods, plain
from tests.interchange.cases import (
    CASES,
    GOLDEN,
    exported,
    is_t5,
    method,
    same_config,
    sizes,
    write_model,
)
from tests.interchange.methods import CONFIGS
from tests.tiny_t5 import load_weights

EXACT = [name for name, case in CASES.items() if case.written and not case.filled]


@pytest.mark.parametrize("name", EXACT)
def test_what_peft_saved_is_read_and_written_again(name):
    """Must show 2. Mutations: k and v swapped, or heads before positions, in `prefix_from` and
    `prefix_to` alike do not show here; any one-sided change, another order of tensors, a field
    left out of `FIELDS`, does."""
    case, file = CASES[name], GOLDEN / name / TENSORS
    adapter = read_adapter(GOLDEN / name)
    delta, found = from_peft(adapter, sizes(case.model))
    assert found == case.method
    again = exported(delta, case, adapter.config)
    assert tensors_bytes(again.tensors, {}) == file.read_bytes()
    same_config((GOLDEN / name / CONFIG).read_text(), again.config)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.filled])
def test_what_a_file_leaves_out_is_filled_up(name):
    """One rank, one scale, all layers. Breaks when a field that selects or scales modules is kept
    beside tensors that are filled up."""
    case, adapter = CASES[name], read_adapter(GOLDEN / name)
    delta, found = from_peft(adapter, sizes(case.model))
    assert found == case.method
    again = exported(delta, case, adapter.config)
    selecting = "rank_pattern alpha_pattern layers_to_transform layers_pattern exclude_modules bias"
    assert {again.config.get(key) or "none" for key in selecting.split()} == {"none"}
    leaves, found = from_peft(again, sizes(case.model))
    assert found == case.method
    jax.tree.map(np.testing.assert_array_equal, leaves, delta)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.plain])
def test_a_trial_writes_the_config_that_peft_writes(name):
    """Mutation: another default in `FIELDS`, or longer names in `targets`."""
    case = CASES[name]
    delta, _ = from_peft(read_adapter(GOLDEN / name), sizes(case.model))
    same_config((GOLDEN / name / CONFIG).read_text(), exported(delta, case).config)


def test_a_prompt_written_through_p_tunings_network_is_one_of_p_tuning():
    """Mutation: it is called prompt tuning, or the network's width is the model's."""
    delta, _ = from_peft(read_adapter(GOLDEN / "ptuning-llama"), sizes("llama"))
    through = method(CASES["ptuning-llama"], reparam="mlp", bottleneck=5)
    made = to_peft(delta, sizes("llama"), through, base="llama")
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
    """PEFT on a bare GPT-2 leaves out `transformer.`. Mutation: `key_mapping` is passed over."""
    golden = read_adapter(GOLDEN / "lora-gpt2")
    short = {name.replace("transformer.", ""): x for name, x in golden.tensors.items()}
    assert short.keys() != golden.tensors.keys()
    for config in (golden.config, golden.config | {"target_modules": None}):
        delta, _ = from_peft(Adapter(config, short), sizes("gpt2"))
        made = exported(delta, CASES["lora-gpt2"]).tensors
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


def random_lora(names, shapes):
    """A file's tensors of rank 2 for modules of these names, each [in, out] as shaped."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, (inputs, outputs) in zip(names, shapes, strict=True):
        for kind, shape in {"A": (2, inputs), "B": (outputs, 2)}.items():
            tensors[f"base_model.model.{name}.lora_{kind}.weight"] = rng.standard_normal(shape)
    return tensors


def test_modules_are_selected_by_the_names_that_the_file_has():
    """A Gemma 3 that sees images spells them otherwise. Breaks when a pattern is held against our
    spelling, or when a tensor that the pattern selects may be missing."""
    model = read_family(VARIANTS["gemma3"])[1]
    names = [f"model.language_model.layers.{n}.self_attn.q_proj" for n in range(model.layers)]
    tensors = random_lora(names, [(model.width, model.heads * model.head_size)] * model.layers)
    fields = {"peft_type": "LORA", "r": 2, "target_modules": r".*language_model.*\.q_proj"}
    delta, found = from_peft(Adapter(fields, tensors), model)
    assert found["targets"] == "q" and delta["layers"]["attn"]["q"]["lora_a"].all()
    del tensors[f"base_model.model.{names[1]}.lora_A.weight"]
    with pytest.raises(UserError, match=f"missing: base_model.model.{names[1]}.lora_A.weight$"):
        from_peft(Adapter(fields, tensors), model)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_a_model_whose_layers_all_attend_to_everything(name):
    """Breaks when a Gemma 2 or 3 without windows is no family's."""
    raw = VARIANTS[name] | {"layer_types": ["full_attention"] * VARIANTS[name]["num_hidden_layers"]}
    model = read_family(raw)[1]
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(model.layers)]
    tensors = random_lora(names, [(model.width, model.ffn)] * model.layers)
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["up_proj"]}
    assert from_peft(Adapter(fields, tensors), model)[1]["targets"] == "up"


def test_the_vectors_of_a_dora():
    """One tensor for a module that q, k and v share, whole or refused. Breaks when magnitudes are
    cut or joined in another order than B, need not be there, or may be there in some layers.
    """
    golden = read_adapter(GOLDEN / "dora-gpt2")
    delta, _ = from_peft(golden, sizes("gpt2"))
    attn, vector = delta["layers"]["attn"], "transformer.h.0.attn.c_attn.lora_magnitude_vector"
    whole = np.concatenate([attn[name]["magnitude"][0].ravel() for name in "qkv"])
    np.testing.assert_array_equal(whole, golden.tensors[f"base_model.model.{vector}"])
    without = {name: x for name, x in golden.tensors.items() if not name.endswith("_vector")}
    with pytest.raises(UserError, match="missing: .*lora_magnitude_vector"):
        from_peft(Adapter(golden.config, without), sizes("gpt2"))
    some = {name: tensor for name, tensor in golden.tensors.items() if ".h.0." in name}
    with pytest.raises(UserError, match=r"adapts transformer\.h\..* in some layers only"):
        from_peft(Adapter(golden.config | {"layers_to_transform": 0}, some), sizes("gpt2"))
