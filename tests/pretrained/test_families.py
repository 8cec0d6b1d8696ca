"""Decoder families as Hugging Face folders hold them: numbers, names, configs and refusals."""

import functools
import itertools
import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from softprompt.errors import UserError
from softprompt.models.decoder import Decoder, DecoderConfig
from softprompt.models.positions import RopeScaling
from softprompt.models.shapes import decoder_shapes, parameter_count, t5_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families import FAMILIES, find_family, read_family
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
    paths |= {
        path for per in (False, True) for path in t5_shapes(tiny_t5_config(bias_per_layer=per))
    }
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
        ("mistral", ("model.", ""), ("layers.0.self_attn.rotary_emb.inv_freq",)),
        ("qwen3", ("model.", ""), ()),
        ("gemma2", ("model.", ""), ()),
        ("neox", ("gpt_neox.", ""), ("layers.0.attention.bias",)),
    ],
)
def test_other_spellings_and_buffers(tmp_path, name, rename, extra):
    """Mutation: drop `key_mapping` or `ignored_tensors` of a family."""
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


UNLIKE = ("gpt2", "neox", "opt", "llama", "gemma3")
LINEAR, DEFAULT = {"type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 7.0}
LLAMA3 = VARIANTS["llama3"]["rope_scaling"]


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        (
            "llama",
            {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
            {"rope_base": 500.0, "rope_scaling": RopeScaling("linear", 2.0)},
        ),
        (
            "neox",
            {"rope_parameters": DEFAULT, "rope_scaling": LINEAR},
            {"rope_base": 100.0, "rope_scaling": RopeScaling("linear", 2.0)},
        ),
        (
            "gemma3",
            {
                "rope_parameters": {"full_attention": DEFAULT},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            {"rope_base": 7.0, "rope_base_local": 100.0, "rope_scaling": RopeScaling("linear", 2)},
        ),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default"}}},
            {"rope_base": 5000.0, "rope_base_local": 100.0, "rope_scaling": None},
        ),
        (
            "llama3",
            {"original_max_position_embeddings": 16},
            {"rope_scaling": RopeScaling("llama3", 4.0, 1.0, 4.0, 16)},
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "attention_factor": 0.5}},
            {"rope_scaling": RopeScaling("yarn", 8.0, 1.0, 32.0, 128, 0.5)},
        ),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, {"rope_scaling": None}),
    ],
)
def test_rotary_scalings_are_those_that_transformers_reads(name, changes, expected):
    """Breaks when rope_parameters beat rope_scaling, a key of the top level is not the fallback of
    a section, or the section's original_max_position_embeddings beats that of the top level."""
    config = config_of(name, **changes)
    assert {key: getattr(config, key) for key in expected} == expected


def test_the_logits_of_a_gemma_that_sees_images_are_not_capped():
    """Breaks when final_logit_softcapping or tie_word_embeddings of the text part is read."""
    text = {**VARIANTS["gemma3-scaled"], "tie_word_embeddings": False}
    text = {key: text[key] for key in text if key != "architectures"}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    config = read_family(raw)[1]
    assert (config.final_softcap, config.tied) == (0.0, True)
    assert config.windows == config_of("gemma3-scaled").windows
    with pytest.raises(UserError, match=r"text_config\.sliding_window 0 is not supported"):
        read_family({**raw, "text_config": {**text, "sliding_window": 0}})


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_layers_that_all_see_everything_have_a_family(name):
    """Breaks when `raw` leaves layer_types out where no layer has a window."""
    config = config_of(name, layer_types=["full_attention"] * VARIANTS[name]["num_hidden_layers"])
    assert config.windows == ()
    assert find_family(config)[0] == VARIANTS[name]["architectures"][0]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_keys_and_defaults_are_those_of_transformers(architecture):
    """Breaks when an absent key gets another value than transformers gives it, or when a key that
    transformers writes of its own accord is refused."""
    from transformers import AutoConfig

    family = FAMILIES[architecture]
    written = AutoConfig.for_model(family.keys["model_type"].default).to_dict()
    named = {"architectures": [architecture]}
    assert read_family({**written, **named})[1] == read_family(named)[1]


# What else the config.json of published models says.
HUB = {
    "GPT2LMHeadModel": {"n_ctx": 1024, "summary_type": "cls_index", "resid_pdrop": 0.1},
    "GPTNeoXForCausalLM": {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0},
    "OPTForCausalLM": {"prefix": "</s>", "layerdrop": 0.0, "init_std": 0.02, "dropout": 0.1},
    "LlamaForCausalLM": {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}},
        "pretraining_tp": 1,
        "max_sequence_length": 2048,
        "sliding_window": None,
    },
    "GemmaForCausalLM": {"hidden_act": "gelu", "hidden_activation": None},
    "Gemma2ForCausalLM": {"hidden_act": "gelu_pytorch_tanh", "cache_implementation": "hybrid"},
    "Gemma3ForConditionalGeneration": {
        "vision_config": {"hidden_size": 1152},
        "mm_tokens_per_image": 256,
        "image_token_index": 262144,
        "eos_token_id": [1, 106],
    },
    "T5ForConditionalGeneration": {"output_past": True, "task_specific_params": {"a": 1}},
    "MT5ForConditionalGeneration": {"tokenizer_class": "T5Tokenizer"},
    "UMT5ForConditionalGeneration": {"scalable_attention": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("architecture", HUB)
def test_keys_of_published_models_are_known(architecture):
    """Breaks when a key of a model on the hub is taken off the harmless ones."""
    named = {"architectures": [architecture], "torch_dtype": "bfloat16", "use_cache": True}
    assert isinstance(read_family({**named, **HUB[architecture]})[1], DecoderConfig | T5Config)


@pytest.mark.parametrize("name", VARIANTS)
def test_an_unknown_key_is_refused_unless_it_says_null(name):
    """Breaks when a key that no code reads is passed over, or a harmless one is refused."""
    harmless = {"torch_dtype": "float32", "temperature": 0.7, "unheard_of": None}
    assert config_of(name, **harmless) == config_of(name)
    with pytest.raises(UserError, match="config.json: unknown keys: unheard_of 7: they may change"):
        config_of(name, unheard_of=7)


ANY_VALUE = (None, True, 0, -1, 3, 2.5, math.nan, math.inf, "3", [], [None], {}, {"a": 1})


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_value_of_any_type_is_read_or_refused_by_name(architecture):
    """Breaks when a value of another type gets past its key, to end as a TypeError."""
    refused = 0
    for key, value in itertools.product(FAMILIES[architecture].keys, ANY_VALUE):
        try:
            read_family({"architectures": [architecture], key: value})
        except UserError as e:
            assert re.fullmatch("config.json: .*", str(e))
            refused += 1
    assert refused > 8 * len(FAMILIES[architecture].keys)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention True is not supported"),
        ("gpt2", {"activation_function": "tanh"}, "activation_function 'tanh' is not supported"),
        ("neox", {"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ("neox", {"rotary_pct": 0.01}, "rotary_pct 0.01 rotates 0 of the 16 entries of a head"),
        ("neox", {"head_dim": 8}, "head_dim 8 is not supported; allowed: 16"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine False"),
        ("gemma", {"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported"),
        (
            "gemma2",
            {"final_logit_softcapping": 0.0},
            "final_logit_softcapping 0.0 is not supported",
        ),
        ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 is not supported"),
        ("gemma3", {"_sliding_window_pattern": 2}, "_sliding_window_pattern 2 is not supported"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        ("gemma2", {"layer_types": ["chunked"] * 4}, "layer_types 'chunked' is not supported"),
        ("gemma2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 4 layers"),
        ("gemma2", {"sliding_window": None}, "sliding_window None beside layers of type"),
        ("gemma3", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 is not supp"),
        (
            "gemma3",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_parameters.sliding_attention.rope_type 'linear' is not supported; allowed: 'def",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        (
            "llama",
            {"rope_scaling": {"type": "yarn", "short_factor": [1]}},
            "unknown keys: rope_scal",
        ),
        (
            "llama",
            {"num_key_value_heads": 2},
            "num_key_value_heads 2 does not divide num_attention",
        ),
        ("llama", {"head_dim": 5}, "head size 5 is odd"),
        ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported"),
        (
            "llama",
            {"quantization_config": {"bits": 4}},
            "unknown keys: quantization_config {'bits'",
        ),
        ("llama", {"architectures": ["T5"]}, f"supported: {', '.join(FAMILIES)}"),
        ("llama", {"architectures": "T5"}, "architecture 'T5' is not supported"),
        ("llama", {"architectures": [5]}, "architecture 5 is not supported"),
        *((name, {"is_causal": False}, "is_causal False is not supported") for name in UNLIKE),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(name, changes, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config_of(name, **changes)
    assert str(error.value).startswith("config.json: ")
