"""Hugging Face folders: single and sharded safetensors, and what is wrong with a folder."""

import dataclasses
import fnmatch
import json
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from softprompt.errors import UserError
from softprompt.pretrained import hf
from softprompt.pretrained.loading import load_model
from tests.families import VARIANTS, config_of_folder, write_family_folder
from tests.tiny import tiny_config, write_llama_folder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama.json").read_text())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama_folder(tmp_path / "tiny")


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder: Path, **changes: np.ndarray | None) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({n: x for n, x in tensors.items() if x is not None}, file)


def shard(folder: Path, count: int = 3) -> Path:
    """Splits model.safetensors; returns the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    where = {name: shards[i % count] for i, name in enumerate(tensors)}
    for file in shards:
        save_file({n: x for n, x in tensors.items() if where[n] == file}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index


@pytest.mark.parametrize("case", GOLDEN["tiny"].values(), ids=list(GOLDEN["tiny"]))
def test_logits_are_those_of_transformers(tmp_path, case):
    # Breaks if: two entries of NAMES are swapped, or rope_theta is not read.
    loaded = load_model(str(write_llama_folder(tmp_path, seed=1, **case["sizes"])))
    logits_TV = loaded.model.apply({"params": loaded.weights}, jnp.array(case["ids"]))
    np.testing.assert_allclose(logits_TV[-1, :16], case["first_logits"], atol=1e-4)


def test_sharded_equals_single(folder):
    single = load_model(str(folder))
    shard(folder)
    sharded = load_model(str(folder))
    jax.tree.map(np.testing.assert_array_equal, single.weights, sharded.weights)
    assert single.fingerprint == sharded.fingerprint


def test_a_single_file_is_preferred_to_shards_beside_it(folder):
    """As transformers does. Breaks when the index is read where model.safetensors is there too."""
    tensors = load_file(folder / "model.safetensors")
    shard(folder)
    save_file({name: 2 * x for name, x in tensors.items()}, folder / "model.safetensors")
    found = load_model(str(folder)).weights["final_norm"]["scale"]
    np.testing.assert_array_equal(found, 2 * tensors["model.norm.weight"])


def test_bfloat16_files_are_read_exactly(folder):
    half = {
        n: x.astype(ml_dtypes.bfloat16) for n, x in load_file(folder / "model.safetensors").items()
    }
    save_file(half, folder / "model.safetensors")
    loaded = load_model(str(folder))
    embedding = loaded.weights["embed"]["embedding"]
    assert embedding.dtype == jnp.float32
    np.testing.assert_array_equal(embedding, half["model.embed_tokens.weight"].astype(np.float32))


def test_config_of_either_generation_of_transformers(folder):
    expected = config_of_folder(folder)
    assert expected == tiny_config()
    edit_config(
        folder, rope_theta=None, rope_parameters={"rope_theta": 1e4, "rope_type": "default"}
    )
    assert config_of_folder(folder) == expected
    edit_config(folder, head_dim=None, num_key_value_heads=None)
    assert config_of_folder(folder).head_size == 12
    assert config_of_folder(folder).kv_heads == 4


def test_missing_unexpected_and_misshapen_are_one_error(folder):
    # Breaks if: _check raises at the first of them.
    edit_tensors(
        folder,
        **{
            "model.norm.weight": None,
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.q_proj.bias": np.zeros(48, np.float32),
            "model.layers.2.mlp.gate_proj.weight": np.zeros((48, 64), np.float32),
        },
    )
    with pytest.raises(UserError) as error:
        load_model(str(folder))
    assert str(error.value) == (
        f"{folder}: tensors do not match the config; "
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight; "
        "unexpected: model.layers.0.self_attn.q_proj.bias; "
        "misshapen: model.layers.2.mlp.gate_proj.weight [48, 64] (expected [64, 48])"
    )


def test_harmless_extras_are_known_by_name(folder):
    before = load_model(str(folder))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(
        folder,
        **{
            "lm_head.weight": embedding,
            "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32),
        },
    )
    assert load_model(str(folder)).fingerprint == before.fingerprint
    edit_tensors(folder, **{"lm_head.weight": embedding * 2})
    with pytest.raises(UserError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(str(folder))


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_gemma_that_sees_images(tmp_path, prefix):
    # Breaks if: either spelling is left out, a default of text_config is another, or the vision
    # tower is taken for a mistake.
    plain = write_family_folder(tmp_path / "plain", "gemma3")
    folder = write_family_folder(tmp_path / "images", "gemma3")
    text = {k: v for k, v in VARIANTS["gemma3"].items() if k not in ("architectures", "head_dim")}
    raw = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text}
    (folder / "config.json").write_text(json.dumps(raw))
    assert config_of_folder(folder) == dataclasses.replace(config_of_folder(plain), head_size=256)
    text["head_dim"] = VARIANTS["gemma3"]["head_dim"]
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = load_file(folder / "model.safetensors")
    named = {name.replace("model.", prefix, 1): tensor for name, tensor in tensors.items()}
    named |= {"vision_tower.a": tensors["model.norm.weight"], "multi_modal_projector.b": np.ones(2)}
    save_file(named, folder / "model.safetensors")
    ours, theirs = load_model(str(folder)), load_model(str(plain))
    jax.tree.map(np.testing.assert_array_equal, ours.weights, theirs.weights)


def test_a_tokenizer_of_one_more_token_loses_it(folder):
    # Breaks if: `within` keeps an added token that has no row.
    file = folder / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    backend.add_special_tokens(["<image>"])
    backend.save(str(file))
    tokenizer = load_model(str(folder)).tokenizer
    assert tokenizer.vocab_size == 320
    assert max(tokenizer.encode("an <image> here")) < 320
    assert tokenizer.decode(tokenizer.encode("an <image> here")) == "an <image> here"


def test_an_absent_shard_is_named(folder):
    index = shard(folder)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="index.json.*not there: model-00002-of-00003.safetensors"):
        load_model(str(folder))
    index.write_text("{}")
    with pytest.raises(UserError, match="no weight_map"):
        load_model(str(folder))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.9999])
def test_a_truncated_file_is_one_line_that_names_it(folder, keep):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(UserError, match=r"model\.safetensors: not a complete") as error:
        load_model(str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["BloomForCausalLM"]},
            "json: architecture 'BloomForCausalLM' is not supported; supported: GPT2LM",
        ),
        ({"architectures": None}, "supported: GPT2LMHeadModel, "),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope'.*allowed: .*'yarn'"),
        ({"rope_scaling": {"type": "linear"}}, "json: no key 'rope_scaling.factor'"),
        ({"attention_bias": "some"}, "attention_bias 'some' is not supported; allowed: true, f"),
        ({"rms_norm_eps": "1e-5"}, "json: rms_norm_eps '1e-5' is not supported; allowed: a posit"),
        ({"hidden_act": "tanh"}, "hidden_act 'tanh' is not supported; allowed: 'silu', 'swish'"),
    ],
)
def test_what_the_decoder_does_not_compute_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_incomplete_folders_say_what_is_missing(folder):
    file = folder / "config.json"
    file.write_text("[]")
    with pytest.raises(UserError, match="expected a JSON object"):
        load_model(str(folder))
    file.write_text("{")
    with pytest.raises(UserError, match="not readable as JSON"):
        load_model(str(folder))
    file.unlink()
    with pytest.raises(UserError, match=r"config\.json: no such file"):
        load_model(str(folder))
    write_llama_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_model(str(folder))


def test_an_unreachable_hub_is_one_line():
    with pytest.raises(UserError, match="could not fetch model some/repo@v1 from the hub") as error:
        hf.download("some/repo", revision="v1")
    assert "\n" not in str(error.value)


def test_the_hub_is_asked_for_what_is_read_and_nothing_else(monkeypatch, tmp_path):
    asked = []

    def snapshot(repo, **options):
        asked.append({**options, "repo": repo})
        return str(tmp_path)

    def wanted(call, file):
        return any(fnmatch.fnmatch(file, pattern) for pattern in call["allow_patterns"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    assert hf.download("some/repo", revision="v1") == tmp_path
    (call,) = asked
    assert (call["repo"], call["revision"]) == ("some/repo", "v1")
    assert Path(call["cache_dir"]).is_relative_to(tmp_path / "cache")
    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.json", "spiece.model"]
    assert all(wanted(call, file) for file in files)
    others = ["pytorch_model.bin", "onnx/model.onnx", "README.md", "a.gguf"]
    assert not any(wanted(call, file) for file in others)
    hf.download("some/repo")  # mutation: the hub is asked for a revision named ""
    assert asked[-1]["revision"] is None


def test_pytorch_files_are_fetched_where_there_are_no_safetensors(monkeypatch, tmp_path):
    # Breaks if: .bin files are fetched beside safetensors, or never.
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda repo, **options: asked.append(options["allow_patterns"]) or str(tmp_path),
    )
    hf.download("some/repo")
    assert asked[1:] == [["pytorch_model*.bin", "pytorch_model.bin.index.json"]]
    hf.download("some/repo", patterns=hf.TOKENIZER_FILES)
    assert asked[2:] == [list(hf.TOKENIZER_FILES)]
