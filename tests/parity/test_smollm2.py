"""The Llama family and its files against transformers on PyTorch, in float32."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.methods import initializers
from softprompt.pretrained.loading import find, load_model
from tests.parity.real import largest_difference, reference_logits
from tests.texts import AWKWARD, as_published, real_lines
from tests.tiny import tiny_config, write_llama_folder, write_tokenizer

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def reference() -> tuple[Any, Any]:
    """The model and tokenizer that transformers reads from the same GGUF file."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = find("smollm2-135m-instruct-q4")
    where = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    return model.eval(), as_published(AutoTokenizer.from_pretrained(**where))


def test_real_logits(smollm2, reference, shared_data):
    # Breaks if: rotary halves are swapped, or q/k rows are left in llama.cpp's order.
    model, tokenizer = reference
    lines = (shared_data / "sst2" / "stsa.binary.test").read_text().splitlines()
    texts = [line[2:] for line in lines[:20]]
    worst = largest_difference(smollm2, model, [tokenizer(text)["input_ids"] for text in texts])
    print(f"largest difference of logits: {worst:.2e}")
    assert worst < 1e-3


def test_a_prompt_of_text_is_that_text(smollm2, reference, shared_data):
    # Breaks if: positions of a row do not go on after the context, or the context is not rotated.
    model, _ = reference
    lines = (shared_data / "sst2" / "stsa.binary.test").read_text().splitlines()
    for first, second in zip(lines[20:24], lines[24:28], strict=True):
        prompt, text = (smollm2.tokenizer.encode(line[2:]) for line in (first, second))
        start = initializers.text(prompt)
        embedding_VD = smollm2.weights["embed"]["embedding"]
        delta = {"prompt": start(jax.random.key(0), embedding_VD, len(prompt))}
        variables = {"params": smollm2.weights, "delta": delta}
        ours_TV = np.asarray(smollm2.model.apply(variables, jnp.array(text)))
        theirs_TV = reference_logits(model, prompt + text)[len(prompt) :]
        assert np.abs(ours_TV - theirs_TV).max() < 1e-3


def test_token_ids_and_decoding_on_a_thousand_lines(smollm2, reference, shared_data):
    # Breaks if: any of from_gguf's pre-tokenizer, merges or special tokens is left out.
    _, tokenizer = reference
    lines = real_lines(shared_data, 1000)
    assert len(lines) == 1000
    for line in (*lines, *AWKWARD):
        ids = tokenizer(line)["input_ids"]
        assert smollm2.tokenizer.encode(line) == ids, line
        assert smollm2.tokenizer.decode(ids) == tokenizer.decode(ids) == line
    assert smollm2.tokenizer.vocab_size == len(tokenizer)
    assert smollm2.tokenizer.bos_id == tokenizer.bos_token_id
    assert smollm2.tokenizer.eos_id == tokenizer.eos_token_id


SIZES = {
    "tied": {},
    "untied": {"tied": False},
    "wide heads, one kv head": {"heads": 3, "kv_heads": 1, "head_size": 24, "tied": False},
    "every head its own kv": {"heads": 4, "kv_heads": 4},
}


def saved_by_transformers(folder: Any, sizes: dict[str, Any], **options: Any) -> Any:
    """Saves a random Llama in transformers' own format, the tokenizer beside it; reads it back."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    c = tiny_config(**sizes)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=c.vocab,
        hidden_size=c.width,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_size,
        intermediate_size=c.ffn,
        max_position_embeddings=c.context_length,
        rms_norm_eps=3e-5,
        rope_parameters={"rope_theta": 5000.0, "rope_type": "default"},
        tie_word_embeddings=c.tied,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(0.2 * torch.randn_like(tensor))
    model.to(options.pop("dtype", torch.float32)).save_pretrained(folder, **options)
    write_tokenizer(folder, c)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


TINY_IDS = [[5, 300, 7, 7, 0, 12], list(range(40, 100)), [319]]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_folders_saved_by_transformers(tmp_path, sizes):
    model = saved_by_transformers(tmp_path, sizes)
    ours = load_model(str(tmp_path))
    assert np.abs(reference_logits(model, TINY_IDS[1])).max() > 1
    assert largest_difference(ours, model, TINY_IDS) < 1e-4


def test_sharded_bfloat16_folders_saved_by_transformers(tmp_path):
    model = saved_by_transformers(tmp_path, {}, dtype=torch.bfloat16, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert largest_difference(load_model(str(tmp_path)), model, TINY_IDS) < 1e-4


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_the_tests_own_tiny_folders_are_read_by_transformers(tmp_path, sizes):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_llama_folder(tmp_path, seed=2, **sizes)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ours, tokenizer = load_model(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert largest_difference(ours, model, TINY_IDS) < 1e-4
    for text in AWKWARD:
        assert ours.tokenizer.encode(text) == tokenizer(text)["input_ids"]
        assert ours.tokenizer.decode(ours.tokenizer.encode(text)) == text
