"""Decoder families as Hugging Face folders hold them: numbers, names, configs and refusals."""

import functools
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softprompt.errors import UserError
from softprompt.models.decoder import Decoder
from softprompt.models.positions import RopeScaling
from softprompt.models.shapes import decoder_shapes, parameter_count, t5_shapes
from softprompt.pretrained.families import FAMILIES, read_family
from softprompt.pretrained.loading import load_model
from softprompt.training.sharding import WEIGHT_RULES, make_mesh, path_name, weight_spec
from tests.families import FAMILY_IDS, VARIANTS, family_tensors, golden_prompt, write_family_folder
from tests.tiny_t5 import tiny_t5_config

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "families.json").read_text())


def config_of(name, **changes):
    return read_family({**VARIANTS[name], **changes})[1]


def declared(config):
    """Leaf path -> shape, as the model declares it."""
    init = functools.partial(Decoder(config).init, jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(jax.eval_shape(init, jnp.arange(4))["params"])
    return {path_name(path): leaf.shape for path, leaf in leaves}


@functools.partial(jax.jit, static_argnames="model")
def last_logits(model, weights, delta):
    """After a soft prompt and `FAMILY_IDS`."""
    return model.apply({"params": weights, "delta": delta}, jnp.array(FAMILY_IDS))[-1, :16]


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_those_of_transformers(tmp_path, name):
    """Mutation: any part of the family's config or table that is misread."""
    loaded = load_model(str(write_family_folder(tmp_path, name)))
    delta = {"prompt": golden_prompt(loaded.config.prompt_width)}
    logits_V = last_logits(loaded.model, loaded.weights, delta)
    np.testing.assert_allclose(logits_V, GOLDEN[name], atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_tables_and_rules_cover_every_leaf(name):
    """Mutation: delete a rule of sharding, or a leaf of `decoder_shapes`."""
    family, config = read_family(VARIANTS[name])
    shapes = declared(config)
    layers = (config.layers,)
    for path, shape in decoder_shapes(config).items():
        assert shapes[path] == (layers + shape if path.startswith("layers/") else shape)
    assert set(family.table(config)) == set(shapes) == set(decoder_shapes(config))
    assert parameter_count(config) == sum(map(np.prod, shapes.values()))
    mesh = make_mesh(4, 2)
    for path, shape in shapes.items():
        assert sum(bool(re.fullmatch(rule, path)) for rule, _ in WEIGHT_RULES) == 1, path
        for size, axis in zip(shape, weight_spec(path, shape, mesh), strict=False):
            assert axis is None or size % mesh.shape[axis] == 0


def test_every_rule_is_some_leafs():
    """Mutation: a rule that nothing needs, or a second one for the same leaf."""
    paths = {path for raw in VARIANTS.values() for path in decoder_shapes(read_family(raw)[1])}
    paths |= set(t5_shapes(tiny_t5_config()))
    for rule, _ in WEIGHT_RULES:
        assert any(re.fullmatch(rule, path) for path in paths), rule


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_scales_and_biases_stay_float32(tmp_path, name):
    """Mutation: they get the matrices' dtype; a 1 added in bfloat16 would cost them seven bits."""
    write_family_folder(tmp_path, name)
    exact, half = (load_model(str(tmp_path), dtype=d).weights for d in ("float32", "bfloat16"))
    for path, leaf in jax.tree_util.tree_leaves_with_path(half):
        small = path[-1].key in ("scale", "bias")
        assert leaf.dtype == (jnp.float32 if small else jnp.bfloat16)
    np.testing.assert_array_equal(half["final_norm"]["scale"], exact["final_norm"]["scale"])
    if name == "gemma3":
        stored = family_tensors(name)["model.norm.weight"].astype(np.float32)
        np.testing.assert_array_equal(half["final_norm"]["scale"], stored + 1)


@pytest.mark.parametrize(
    ("name", "rename", "extra"),
    [
        ("gpt2", ("transformer.", ""), ("h.0.attn.bias", "h.2.attn.masked_bias")),
        ("gpt2", ("wte.", "wte."), ("transformer.h.1.attn.bias",)),
        (
            "neox",
            ("embed_out.", "lm_head."),
            ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.1.attention.rotary_emb.inv_freq"),
        ),
        ("opt", ("model.decoder.", "decoder."), ()),
        ("mistral", ("lm_head.", "lm_head."), ("model.layers.0.self_attn.rotary_emb.inv_freq",)),
    ],
)
def test_other_spellings_and_buffers(tmp_path, name, rename, extra):
    """Mutation: drop `spellings` or `harmless` of a family."""
    folder = write_family_folder(tmp_path, name)
    before = load_model(str(folder))
    file = folder / "model.safetensors"
    tensors = {stored.replace(*rename): x for stored, x in load_file(file).items()}
    save_file({**tensors, **{one: np.ones((1, 4), np.float32) for one in extra}}, file)
    after = load_model(str(folder))
    assert after.fingerprint == before.fingerprint
    jax.tree.map(np.testing.assert_array_equal, after.weights, before.weights)
    save_file({**tensors, "h.0.attn.other": np.ones(4, np.float32)}, file)
    with pytest.raises(UserError, match=r"unexpected: (transformer\.)?h.0.attn.other$"):
        load_model(str(folder))


def test_a_fused_tensor_of_another_shape_is_named_once(tmp_path):
    folder = write_family_folder(tmp_path, "gpt2")
    file = folder / "model.safetensors"
    fused = "transformer.h.1.attn.c_attn.weight"
    save_file({**load_file(file), fused: np.zeros((108, 36), np.float32)}, file)
    with pytest.raises(UserError) as error:
        load_model(str(folder))
    assert str(error.value).endswith(f"misshapen: {fused} [108, 36] (expected [36, 108])")


def test_windows_of_layers():
    assert config_of("mistral").windows == (7, 7, 7, 7)
    assert config_of("mistral", sliding_window=None).windows == ()
    assert config_of("qwen2").windows == ()
    assert config_of("qwen2-sliding").windows == (0, 0, 7, 7)
    assert config_of("gemma2").windows == (7, 0, 7, 0)
    assert config_of("gemma3").windows == (7, 7, 0, 7, 7)
    kinds = ["full_attention", "sliding_attention"] * 2
    assert config_of("gemma2", layer_types=kinds).windows == (0, 7, 0, 7)


def test_rotary_positions_of_either_generation_of_transformers():
    stretched = {"rope_type": "linear", "factor": 8.0}
    old = config_of("gemma3", rope_scaling=stretched)
    ropes = {
        "full_attention": {**stretched, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    }
    new = {k: v for k, v in VARIANTS["gemma3"].items() if not k.startswith("rope_")}
    assert read_family({**new, "rope_parameters": ropes})[1] == old
    assert (old.rope_base, old.rope_base_local) == (5000.0, 100.0)
    assert old.rope_scaling == RopeScaling("linear", 8.0)
    neox = config_of("neox")
    assert (neox.rotary_size, neox.rope_base) == (4, 100.0)
    rope = {"partial_rotary_factor": 0.5, "rope_theta": 50, "rope_type": "default"}
    assert config_of("neox", rope_parameters=rope).rotary_size == 8


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
        ("neox", {"rope_scaling": {"type": "dynamic"}}, "rope_type 'dynamic' is not supported"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        ("gemma", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"layer_types": ["chunked"] * 4}, "layer_types 'chunked' is not supported"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ("gemma2", {"sliding_window": None}, "sliding_window None beside layers of type"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supp"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type of sliding_attention 'linear' is not supported; allowed: 'default'",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ("llama", {"architectures": ["T5"]}, f"supported: {', '.join(FAMILIES)}"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(name, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config_of(name, **changes)
    assert str(error.value).startswith("config.json: ")
