"""Prefixes: keys and values of words, and the shapes of families whose heads are grouped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.methods import prefix
from softprompt.methods.initializers import text
from softprompt.methods.prefix import PrefixConfig
from tests.families import family_decoder
from tests.tiny_t5 import tiny_t5

KEY = jax.random.key(1)
WORDS = [17, 30, 5, 5, 22]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_prefix_of_words_is_those_words(x64, family):
    """Mutation: keys before rotation; the embeddings' scale left out; keys and values swapped."""
    model, weights = family_decoder(family)
    cfg = PrefixConfig(5, (), "rows", text(WORDS), model.config.embed_scale)
    delta = prefix.init(KEY, model, weights, cfg)
    c = model.config
    assert delta["prefix"]["k"].shape == (c.layers, 5, c.kv_heads, c.head_size)
    ours = model.apply({"params": weights, "delta": delta}, jnp.array([9, 8, 7]))
    whole = model.apply({"params": weights}, jnp.array([*WORDS, 9, 8, 7]))
    np.testing.assert_allclose(ours, whole[5:], atol=1e-9)


@pytest.mark.matrix
@pytest.mark.parametrize("place", ["encoder", "decoder"])
def test_a_prefix_of_words_in_t5(x64, place):
    """Where the words do not see the input. Mutation: the encoder's keys go to the decoder."""
    model, weights = tiny_t5(prompt_to_input=False)
    delta = prefix.init(KEY, model, weights, PrefixConfig(5, (place,), "rows", text(WORDS)))
    rows_PD = weights["embed"]["embedding"][np.array(WORDS)]
    pair = jnp.arange(3, 12), jnp.arange(0, 6)
    prompt = {"params": weights, "delta": {place: {"prompt": rows_PD}}}
    contexts = model.apply(prompt, method="prompt_context")
    prefixes = model.apply({"params": weights, "delta": delta}, method="prompt_context")
    ours, theirs = (getattr(one, place) for one in (prefixes, contexts))
    np.testing.assert_allclose(ours.k_LPGK, theirs.k_LPGK, atol=1e-9)
    np.testing.assert_allclose(ours.v_LPGK, theirs.v_LPGK, atol=1e-9)
    if place == "decoder":  # the encoder's words are also read by cross-attention, a prefix is not
        logits = model.apply({"params": weights, "delta": delta}, *pair)
        np.testing.assert_allclose(logits, model.apply(prompt, *pair), atol=1e-9)
    assert np.abs(model.apply({"params": weights}, *pair) - model.apply(prompt, *pair)).max() > 1e-3


def test_shapes_of_t5(x64):
    """Heads times head size is not the width here. Mutation: D / H in the place of K."""
    model, weights = tiny_t5()
    c = model.config
    assert c.heads * c.head_size != c.width
    cfg = PrefixConfig(3, ("encoder", "decoder", "cross"))
    delta = prefix.init(KEY, model, weights, cfg)
    shapes = jax.tree.map(lambda x: x.shape, delta)
    encoder = (c.encoder_layers, 3, c.heads, c.head_size)
    decoder = (c.decoder_layers, 3, c.heads, c.head_size)
    assert shapes == {
        "encoder": {"prefix": {"k": encoder, "v": encoder}},
        "decoder": {
            "prefix": {"k": decoder, "v": decoder},
            "cross_prefix": {"k": decoder, "v": decoder},
        },
    }
