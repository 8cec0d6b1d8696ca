"""Adapters exchanged with a live PEFT: its files read and written, ours loaded, logits equal."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.interchange.adapter_files import (
    CONFIG,
    PICKLE,
    TENSORS,
    read_adapter,
    tensors_bytes,
    write_adapter,
)
from softprompt.interchange.peft import from_peft, to_peft
from softprompt.pretrained.loading import find
from tests.families import write_family_folder
from tests.interchange import methods, plain
from tests.interchange.cases import CASES, MODELS, Case, exported, same_config, sizes, write_model
from tests.interchange.methods import CONFIGS

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
WRITTEN = [name for name, case in CASES.items() if case.written]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The tiny models' folders, and what PEFT made of each case, side by side."""
    from tests.interchange.live import beside, trained

    folder = tmp_path_factory.mktemp("peft")
    with beside(folder):
        for model in MODELS:
            write_model(Path(model), model)
        for name, case in CASES.items():
            trained(case).save_pretrained(name)
    return folder


def peft_logits(place: Path, case: Case, adapter: str) -> np.ndarray:
    """Logits [T, V] of PEFT's model with the adapter in a folder."""
    import peft

    from tests.interchange.live import base_model, beside, logits

    with beside(place):
        loaded = peft.PeftModel.from_pretrained(base_model(case.model), adapter).eval()
        return logits(loaded, case)


@pytest.mark.parametrize("name", [name for name in WRITTEN if not CASES[name].filled])
def test_files_are_equal(place, name):
    """Must show 2: PEFT saves, we read and write, bytes and config are the same."""
    case, adapter = CASES[name], read_adapter(place / name)
    delta, method = from_peft(adapter, sizes(case.model))
    assert method == case.method
    again = exported(delta, case, adapter.config)
    assert tensors_bytes(again.tensors, {}) == (place / name / TENSORS).read_bytes()
    same_config((place / name / CONFIG).read_text(), again.config)


@pytest.mark.parametrize("name", [name for name in WRITTEN if CASES[name].filled])
def test_adapters_that_are_filled_up_mean_the_same_there(place, name):
    """Read and written again, with zeros and ones for what the file leaves out. Breaks when
    `rank_pattern` or `layers_to_transform` of the imported config is written again."""
    case, adapter = CASES[name], read_adapter(place / name)
    delta, method = from_peft(adapter, sizes(case.model))
    assert method == case.method
    write_adapter(place / f"{name}-again", exported(delta, case, adapter.config))
    again_TV = peft_logits(place, case, f"{name}-again")
    np.testing.assert_allclose(again_TV, peft_logits(place, case, name), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_logits_of_adapters_trained_there(place, name):
    """Must show 2. What the files mean, spelt out in `plain`, is what PEFT computes."""
    case = CASES[name]
    delta, _ = from_peft(read_adapter(place / name), sizes(case.model))
    found_TV = plain.logits(*methods.load(place / case.model), delta, case)
    wanted_TV = peft_logits(place, case, name)
    if case.method["name"] in CONFIGS:
        own_TV = methods.logits(*methods.load(place / case.model), delta, case)
        np.testing.assert_allclose(own_TV, wanted_TV, atol=1e-4, rtol=0)
    assert np.abs(wanted_TV).max() > 0.5
    np.testing.assert_allclose(found_TV, wanted_TV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", WRITTEN)
def test_adapters_made_here_load_there(place, name):
    """Must show 2. A random delta of ours, not PEFT's; its file has provenance in its metadata."""
    case = CASES[name]
    theirs, _ = from_peft(read_adapter(place / name), sizes(case.model))
    delta = random_like(theirs, np.random.default_rng(0))
    made = dataclasses.replace(exported(delta, case), provenance={"fingerprint": "0"})
    write_adapter(place / f"{name}-ours", made)
    found_TV = plain.logits(*methods.load(place / case.model), delta, case)
    wanted_TV = peft_logits(place, case, f"{name}-ours")
    assert np.abs(wanted_TV - peft_logits(place, case, name)).max() > 1e-2, "it was not loaded"
    np.testing.assert_allclose(found_TV, wanted_TV, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["opt-350m", "gemma3", "qwen2-sliding", "mistral"])
@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_narrow_embeddings_and_windows(tmp_path, name, kind):
    """Families whose sizes or layers differ from what PEFT expects by default."""
    write_family_folder(tmp_path / name, name)
    model, weights = methods.load(tmp_path / name)
    case = Case(name, "", {}, {"name": kind})
    found, rng = model.config, np.random.default_rng(0)
    prefix = np.zeros((found.layers, 3, found.kv_heads, found.head_size))
    shapes = {"prompt": np.zeros((3, found.prompt_width)), "prefix": {"k": prefix, "v": prefix}}
    delta = random_like({kind: shapes[kind]}, rng)
    made = to_peft(delta, found, {"name": kind, "bos": "after"}, base=name)
    write_adapter(tmp_path / "adapter", made)
    wanted_TV = peft_logits(tmp_path, case, "adapter")
    np.testing.assert_allclose(plain.logits(model, weights, delta, case), wanted_TV, atol=1e-4)


def random_like(tree, rng):
    """Other values of each leaf's mean and deviation. Updates of LoRA much above the weights would
    multiply the rounding of float32 beyond what is allowed."""
    if isinstance(tree, dict):
        return {key: random_like(value, rng) for key, value in tree.items()}
    return rng.normal(np.mean(tree), np.std(tree), np.shape(tree)).astype(np.float32)


@pytest.mark.real
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["prompt", "prefix", "lora", "ia3"])
def test_a_real_model(smollm2, tmp_path, kind):
    """Adapters made here, on SmolLM2-135M, give PEFT's logits (which reach about 20)."""
    import peft
    from transformers import AutoModelForCausalLM

    from tests.interchange.live import beside, logits

    c, rng = smollm2.config, np.random.default_rng(0)
    prefix = np.zeros((c.layers, 5, c.kv_heads, c.head_size))
    delta = {
        "prompt": {"prompt": np.zeros((5, c.width))},
        "prefix": {"prefix": {"k": prefix, "v": prefix}},
        "lora": {
            "layers": {
                "mlp": {
                    "down": {
                        "lora_a": np.zeros((c.layers, c.ffn, 4)),
                        "lora_b": np.zeros((c.layers, 4, c.width)),
                    }
                }
            }
        },
        "ia3": {"layers": {"attn": {"k": {"ia3": np.zeros((c.layers, c.kv_heads, c.head_size))}}}},
    }[kind]
    delta = random_like(delta, rng)
    if kind in ("prompt", "lora"):
        delta = jax.tree.map(lambda leaf: 0.1 * (leaf - 1), delta)
    method = {"name": kind, "bos": "after", "rank": 4, "alpha": 8, "rslora": False}
    method |= {"dropout": 0.0}
    write_adapter(tmp_path / "adapter", to_peft(delta, c, method, base="smollm2"))
    case = Case("smollm2", "", {}, method)
    found_TV = plain.logits(smollm2.model, smollm2.weights, delta, case)
    path = find("smollm2-135m-instruct-q4")
    base = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with beside(tmp_path):
        wanted_TV = logits(peft.PeftModel.from_pretrained(base, "adapter").eval(), case)
    worst = np.abs(found_TV - wanted_TV).max()
    print(f"{kind}: largest difference of logits {worst:.1e}, largest logit {wanted_TV.max():.1f}")
    assert worst < 1e-3


def test_peft_reads_every_second_pair_of_a_t5s_prefix(place):
    """Why such a prefix is not exported, and is read as it is: layer n has those of 2n modulo L."""
    case, adapter = CASES["prefix-t5"], read_adapter(place / "prefix-t5")
    delta, _ = from_peft(adapter, sizes(case.model))
    k_LPHK = delta["decoder"]["prefix"]["k"]
    np.testing.assert_array_equal(k_LPHK[0], k_LPHK[1])
    rows = adapter.tensors["prompt_embeddings"].reshape(3, 2, 2, -1)
    assert not np.array_equal(rows[:, 0], rows[:, 1])


def test_pefts_default_for_a_t5_is_read_too(place):
    """It has rows for both stacks, of which PEFT reads the first half; written is that half."""
    import peft

    from tests.interchange.live import base_model, beside

    with beside(place):
        config = peft.PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=3)
        peft.get_peft_model(base_model("t5"), config).save_pretrained("two")
    adapter = read_adapter(place / "two")
    assert adapter.tensors["prompt_embeddings"].shape == (6, 8)
    delta, _ = from_peft(adapter, sizes("t5"))
    again = exported(delta, CASES["prompt-t5"], adapter.config)
    assert again.config["num_transformer_submodules"] == 1
    half = adapter.tensors["prompt_embeddings"][:3]
    np.testing.assert_array_equal(again.tensors["prompt_embeddings"], half)


def test_pickles(place, tmp_path):
    """Must show 7: a .bin of tensors is read, one with anything else is refused unread."""
    theirs = read_adapter(place / "prompt-llama")
    tensors = {name: torch.tensor(tensor) for name, tensor in theirs.tensors.items()}
    (tmp_path / CONFIG).write_text(json.dumps(theirs.config))
    torch.save(tensors, tmp_path / PICKLE)
    found = read_adapter(tmp_path).tensors
    np.testing.assert_array_equal(found["prompt_embeddings"], theirs.tensors["prompt_embeddings"])
    torch.save({**tensors, "path": Path("x")}, tmp_path / PICKLE)
    with pytest.raises(UserError, match=f"{PICKLE}: refused: it holds more than tensors"):
        read_adapter(tmp_path)
