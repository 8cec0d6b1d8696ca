"""T5 from files: sizes, names, shardings, Hugging Face folders and T5X checkpoints."""

import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from softprompt.errors import UserError
from softprompt.models.t5 import T5
from softprompt.pretrained import t5x
from softprompt.pretrained.families.t5 import t5_table
from softprompt.pretrained.t5_sizes import BYT5, MT5, T5_10, T5_11
from softprompt.training.sharding import make_mesh, path_name, weight_shardings
from tests.families import config_of_folder
from tests.pretrained.t5x_folders import write_t5x
from tests.tiny_t5 import FAMILIES, load_weights, tiny_t5_config, tiny_t5_tensors, write_t5_folder

LOAD = {"dtype": np.dtype(np.float32), "put": lambda path, leaf: leaf}
T5X = {**LOAD, "open_folder": t5x.open_folder}

# The paper's totals, less the prompt.
PAPER = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
}

ALL = {
    f"{family} {size}": config
    for family, sizes in {"1.0": T5_10, "1.1": T5_11, "mT5": MT5, "ByT5": BYT5}.items()
    for size, config in sizes.items()
}


@pytest.mark.parametrize("size", PAPER)
def test_parameters_of_t5_11_are_those_of_the_paper(size):
    c = T5_11[size]
    inner = 64 * c.heads
    encoder = 4 * c.width * inner + 3 * c.width * c.ffn + 2 * c.width
    decoder = 8 * c.width * inner + 3 * c.width * c.ffn + 3 * c.width
    outside = 2 * c.vocab * c.width + 2 * 32 * c.heads + 2 * c.width
    assert outside + c.encoder_layers * (encoder + decoder) == PAPER[size]
    table = t5_table(c)
    assert sum(math.prod(part.shape) for part in table.values()) == PAPER[size]


@pytest.mark.parametrize("name", ALL)
def test_every_leaf_at_full_size_has_its_shape_and_a_sharding_rule(name):
    # Breaks if: a rule of the table is dropped, or a table names a leaf that no module has.
    config, tokens = ALL[name], jax.ShapeDtypeStruct((8,), jnp.int32)
    model, key = T5(config), jax.ShapeDtypeStruct((2,), jnp.uint32)
    weights = jax.eval_shape(model.init, key, tokens, tokens)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(weights)
    shapes = {path_name(path): leaf.shape for path, leaf in leaves}
    assert shapes == {path: part.shape for path, part in t5_table(config).items()}
    for sharding in jax.tree.leaves(weight_shardings(weights, make_mesh(4, 2))):
        assert sharding.mesh.shape == {"data": 4, "model": 2}


@pytest.mark.parametrize("bucket", [False, True], ids=["written locally", "written on gs://"])
@pytest.mark.parametrize("family", FAMILIES)
def test_t5x_gives_the_weights_of_the_hugging_face_form(family, bucket, tmp_path):
    # Breaks if: a kernel or the relative bias is transposed, or two names are swapped.
    folder = write_t5_folder(tmp_path / "hf", **FAMILIES[family])
    theirs = write_t5x(tmp_path, load_file(folder / "model.safetensors"), bucket=bucket)
    expected_config, expected, _ = load_weights(folder, **LOAD)
    config, weights, fingerprint = load_weights(str(theirs), **T5X)
    assert config == expected_config
    assert re.fullmatch("[0-9a-f]{16}", fingerprint)
    jax.tree.map(np.testing.assert_array_equal, weights, expected)


def test_t5x_arrays_in_bfloat16(tmp_path):
    tensors = tiny_t5_tensors(tiny_t5_config(), 0)
    half = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    _, weights, _ = load_weights(str(write_t5x(tmp_path, half)), **T5X)
    expected = half["shared.weight"].astype(np.float32)
    np.testing.assert_array_equal(weights["embed"]["embedding"], expected)


def test_t5x_checkpoints_that_are_none(tmp_path):
    with pytest.raises(UserError, match="no file named checkpoint; name the folder of one step"):
        load_weights(str(tmp_path), **T5X)
    (tmp_path / "checkpoint").write_bytes(b'model_checkpoint_path: "model.ckpt-1000"')
    with pytest.raises(UserError, match="no readable T5X checkpoint|not a T5X checkpoint"):
        load_weights(str(tmp_path), **T5X)
    old = serialization.msgpack_serialize({"version": 1, "optimizer": {"target": {}}})
    (tmp_path / "checkpoint").write_bytes(old)
    with pytest.raises(UserError, match="not a T5X checkpoint of format version 3"):
        load_weights(str(tmp_path), **T5X)
    empty = serialization.msgpack_serialize({"version": 3, "optimizer": {"target": {}}})
    (tmp_path / "checkpoint").write_bytes(empty)
    with pytest.raises(UserError, match="no T5: token_embedder/embedding is not there"):
        load_weights(str(tmp_path), **T5X)


def test_t5x_arrays_that_are_absent(tmp_path):
    folder = write_t5x(tmp_path, tiny_t5_tensors(tiny_t5_config(), 0))
    name = "decoder.layers_1.encoder_decoder_attention.out.kernel"
    shutil.rmtree(folder / f"target.{name}")
    with pytest.raises(UserError, match=f"array {name.replace('.', '/')} is not readable"):
        load_weights(str(folder), **T5X)


def test_copies_of_the_embeddings_are_harmless_where_they_are_copies(tmp_path):
    # Breaks if: a copy is taken on trust.
    folder = write_t5_folder(tmp_path, gated=False, activation="relu", tied=True)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    copies = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    more = tensors | {name: tensors["shared.weight"].copy() for name in copies}
    unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    save_file(more | {unused: np.zeros((32, 3), np.float32)}, file)
    load_weights(folder, **LOAD)
    for name in copies:
        save_file(more | {name: more[name] + 1}, file)
        with pytest.raises(UserError, match=f"{re.escape(name)} differs from shared.weight"):
            load_weights(folder, **LOAD)


def change(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_a_config_says_of_the_head(tmp_path):
    # Breaks if: transformers 5's own key for an untied head is not read.
    folder = write_t5_folder(tmp_path)
    assert not config_of_folder(folder).tied
    change(folder, tie_word_embeddings=True)
    assert config_of_folder(folder).tied
    change(folder, scale_decoder_outputs=False)
    assert not config_of_folder(folder).tied
    mt5 = {"architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5"}
    change(folder, scale_decoder_outputs=True, **mt5)
    assert not config_of_folder(folder).tied


@pytest.mark.parametrize(
    ("changes", "gated", "activation"),
    [
        ({}, True, "gelu_tanh"),
        ({"feed_forward_proj": "gelu"}, False, "gelu"),
        ({"feed_forward_proj": "gated-silu"}, True, "silu"),
        ({"dense_act_fn": "gelu"}, True, "gelu"),
        ({"feed_forward_proj": "relu", "dense_act_fn": "silu"}, False, "silu"),
        ({"feed_forward_proj": "relu", "is_gated_act": True}, True, "relu"),
    ],
)
def test_the_feed_forward_of_a_config(changes, gated, activation, tmp_path):
    """Breaks when dense_act_fn does not override feed_forward_proj, as it does in transformers."""
    folder = write_t5_folder(tmp_path)
    change(folder, **changes)
    config = config_of_folder(folder)
    assert (config.gated, config.activation) == (gated, activation)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["T5EncoderModel"]}, "'T5EncoderModel' is not supported; .* T5For"),
        ({"feed_forward_proj": "gated-tanh"}, "'gated-tanh' is not supported; allowed: 'relu', "),
        ({"decoder_start_token_id": 99}, "decoder_start_token_id 99 is not below vocab_size 99"),
        ({"relative_attention_max_distance": 16}, "max_distance 16 must be above half of"),
        ({"d_kv": 16}, r"misshapen: decoder\.block\.0.*expected \[20, 48\]"),
        ({"num_decoder_layers": 3}, r"missing: decoder\.block\.2\.layer\.0"),
        ({"num_layers": 1}, r"unexpected: encoder\.block\.1\.layer\.0"),
        ({"feed_forward_proj": "relu"}, r"missing: .*DenseReluDense\.wi\.weight"),
    ],
)
def test_configs_that_do_not_fit(changes, message, tmp_path):
    folder = write_t5_folder(tmp_path)
    change(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_weights(folder, **LOAD)
