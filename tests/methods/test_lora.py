"""LoRA: its scale, its targets, and weights that it is merged into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.methods import lora
from softprompt.methods.lora import LoraConfig
from softprompt.pretrained.loading import load_model
from tests.families import family_decoder
from tests.tiny_t5 import tiny_t5

KEY = jax.random.key(1)
CASES = {
    "default": LoraConfig(3, 5.0),
    "everywhere": LoraConfig(3, 5.0, True, ("q", "k", "v", "o", "up", "down")),
    "one A for three": LoraConfig(3, 5.0, False, ("qkv",)),
}


def trained(cfg, model, weights):
    """Factors that are no longer fresh."""
    delta = lora.init(KEY, model, weights, cfg)
    leaves, tree = jax.tree.flatten(delta)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def check_merged(model, weights, cfg, *tokens, tolerance):
    """Merged weights alone are the weights with LoRA beside them; returns the largest logit."""
    delta = trained(cfg, model, weights)
    variables = lora.variables(delta, weights, cfg, None)
    beside = model.apply({"params": weights, "delta": variables}, *tokens)
    merged = model.apply({"params": lora.merge(delta, weights, cfg)}, *tokens)
    plain = model.apply({"params": weights}, *tokens)
    assert np.abs(beside - plain).max() > 100 * tolerance
    np.testing.assert_allclose(merged, beside, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_merged_decoders(x64, name, family):
    """Mutation: the scale is left out of `merge`; B is laid out as [outputs, rank]."""
    model, weights = family_decoder(family)
    tokens_T = jnp.arange(5, 25)
    check_merged(model, weights, CASES[name], tokens_T, tolerance=1e-9)


def test_a_merged_t5(x64):
    """Mutation: cross-attention is left out of `merge`."""
    model, weights = tiny_t5()
    cfg = LoraConfig(3, 5.0, False, ("q", "k", "o", "down"))
    assert "cross" in lora.init(KEY, model, weights, cfg)["decoder"]["layers"]
    check_merged(model, weights, cfg, jnp.arange(3, 20), jnp.arange(0, 6), tolerance=1e-9)


@pytest.mark.real
def test_merged_smollm2(smollm2):
    """Mutation: as above. The change is one that training makes: some per cent of a logit."""
    ids = smollm2.tokenizer.encode("Review: a quiet, moving film\nSentiment:")
    cfg = LoraConfig(8, 0.16)
    check_merged(smollm2.model, smollm2.weights, cfg, jnp.array(ids), tolerance=3e-4)


def test_rounded_weights_are_refused(tiny_folder):
    """Mutation: the kernel's integers are added to."""
    loaded = load_model(str(tiny_folder), quantize="int8")
    cfg = LoraConfig(2, 4.0)
    delta = lora.init(KEY, loaded.model, loaded.weights, cfg)
    with pytest.raises(UserError, match="LoRA does not merge into quantised weights"):
        lora.merge(delta, loaded.weights, cfg)


def test_first_values_and_scale():
    """Mutation: A has the spread of another initialiser; rsLoRA divides by the rank."""
    with jax.enable_x64(True):
        model, weights = family_decoder("gpt2")
        delta = lora.init(KEY, model, weights, LoraConfig(4, 8.0, False, ("o",)))
    a, b = (delta["layers"]["attn"]["o"][name] for name in ("lora_a", "lora_b"))
    c = model.config
    assert a.shape == (c.layers, c.heads, c.head_size, 4) and b.shape == (c.layers, 4, c.width)
    bound = (c.heads * c.head_size) ** -0.5
    assert 0.9 * bound < np.abs(a).max() <= bound and not b.any()
    assert LoraConfig(16, 8.0).scale == 0.5 and LoraConfig(16, 8.0, True).scale == 2.0


@pytest.mark.parametrize("more", ["q", "v,k"])
def test_one_factor_for_three_takes_the_place_of_each(more):
    """Mutation: factors of q's own are kept beside it, and never trained."""
    model, weights = family_decoder("llama")
    cfg = LoraConfig(3, 5.0, False, ("qkv", *more.split(",")))
    with pytest.raises(UserError, match="'method.targets' names qkv and .*; allowed: one of the"):
        lora.init(KEY, model, weights, cfg)
