"""LoRA and DoRA: their scale, their targets, and weights that they are merged into."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.methods import METHODS, dora, lora
from softprompt.methods.lora import LoraConfig
from softprompt.pretrained.loading import load_model
from tests.families import family_decoder
from tests.matrix import matrix
from tests.tiny_t5 import tiny_t5

KEY = jax.random.key(1)
CASES = {
    "default": LoraConfig(3, 5.0),
    "everywhere": LoraConfig(3, 5.0, True, ("q", "k", "v", "o", "up", "down")),
    "one A for three": LoraConfig(3, 5.0, False, ("qkv",)),
}


def trained(cfg, model, weights, method=lora):
    """A delta that is no longer fresh."""
    delta = method.init(KEY, model, weights, cfg)
    leaves, tree = jax.tree.flatten(delta)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    )


def check_merged(model, weights, cfg, *tokens, tolerance, method=lora):
    """Merged weights alone compute what the weights do with the delta beside them."""
    delta = trained(cfg, model, weights, method)
    variables = method.variables(delta, weights, cfg, None)
    beside = model.apply({"params": weights, "delta": variables}, *tokens)
    merged = model.apply({"params": method.merge(delta, weights, cfg)}, *tokens)
    plain = model.apply({"params": weights}, *tokens)
    assert np.abs(beside - plain).max() > 100 * tolerance
    np.testing.assert_allclose(merged, beside, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    ("name", "family"), [("everywhere", "llama"), ("everywhere", "gpt2"), ("default", "gemma3")]
)
@pytest.mark.parametrize("method", matrix(("lora", "dora"), keep=("dora",)))
def test_merged_decoders(x64, method, name, family):
    """Mutation: the scale is left out of `merge`; B is laid out as [outputs, rank]; the scale of a
    column multiplies its bias."""
    model, weights = family_decoder(family)
    tokens_T, method = jnp.arange(5, 25), METHODS[method]
    check_merged(model, weights, CASES[name], tokens_T, tolerance=1e-9, method=method)


@pytest.mark.matrix
@pytest.mark.parametrize("method", ("lora", "dora"))
def test_a_merged_t5(x64, method):
    """Mutation: cross-attention is left out of `merge`."""
    model, weights = tiny_t5()
    cfg = LoraConfig(3, 5.0, False, ("q", "k", "o", "down"))
    assert "cross" in lora.init(KEY, model, weights, cfg)["decoder"]["layers"]
    tokens = jnp.arange(3, 20), jnp.arange(0, 6)
    check_merged(model, weights, cfg, *tokens, tolerance=1e-9, method=METHODS[method])


@pytest.mark.matrix
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


def test_the_columns_of_a_dora_have_its_magnitudes(x64):
    """Equation 5 of the paper, written out. Breaks when the norm is over a row, over W alone, or
    without LoRA's scale; or when fresh magnitudes are not those of the frozen columns.
    """
    model, weights = family_decoder("gpt2")
    cfg = CASES["everywhere"]
    fresh, delta = dora.init(KEY, model, weights, cfg), trained(cfg, model, weights, dora)
    merged = dora.merge(delta, weights, cfg)
    for scope, name, inputs in (("attn", "q", 1), ("attn", "o", 2), ("mlp", "down", 1)):
        kernel, ours, node = (tree["layers"][scope][name] for tree in (weights, merged, delta))
        a, b, m = (np.asarray(node[leaf]) for leaf in ("lora_a", "lora_b", "magnitude"))
        axes = tuple(range(1, 1 + inputs))
        whole = np.asarray(kernel["kernel"]) + cfg.scale * np.tensordot(a[0], b[0], 1)[None]
        norm = np.sqrt((whole[:1] ** 2).sum(axis=axes, keepdims=True))
        wanted = m[:1].reshape(norm.shape) * whole[:1] / norm
        np.testing.assert_allclose(ours["kernel"][:1], wanted, atol=1e-12)
        frozen = np.sqrt((np.asarray(kernel["kernel"]) ** 2).sum(axis=axes))
        np.testing.assert_allclose(fresh["layers"][scope][name]["magnitude"], frozen, rtol=1e-12)


def test_the_norm_of_a_doras_columns_is_a_constant_to_the_gradient(x64):
    """Section 4.3 of the paper. Breaks when the gradient goes through the norm, or the backward
    pass keeps what has the shape of a matrix.
    """
    model, weights = family_decoder("llama")
    cfg = CASES["default"]
    delta = trained(cfg, model, weights, dora)
    norms = dora.column_norms(delta, weights, cfg)

    def through(delta):
        return dora.variables(delta, weights, cfg, None)["layers"]["attn"]["q"]["output_scale"]

    def constant(delta):
        return delta["layers"]["attn"]["q"]["magnitude"] / norms["layers/attn/q"]

    ours, wanted = (jax.grad(lambda d, f=f: (f(d) ** 2).sum())(delta) for f in (through, constant))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), ours, wanted)
    kept = jax.eval_shape(lambda d: jax.vjp(through, d)[1], delta)
    kernel = weights["layers"]["attn"]["q"]["kernel"].shape
    assert not {kernel, kernel[1:]} & {leaf.shape for leaf in jax.tree.leaves(kept)}


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_fresh_dora_of_rounded_weights_scales_nothing(tiny_folder, kind):
    """Breaks when the norms are those of the integers."""
    loaded = load_model(str(tiny_folder), quantize=kind)
    cfg = LoraConfig(2, 4.0, False, ("q", "o", "down"))
    delta = dora.init(KEY, loaded.model, loaded.weights, cfg)
    layers = dora.variables(delta, loaded.weights, cfg, None)["layers"]
    for node in (layers["attn"]["q"], layers["attn"]["o"], layers["mlp"]["down"]):
        np.testing.assert_allclose(node["output_scale"], 1, rtol=1e-6)
    plain = load_model(str(tiny_folder))
    exact = dora.init(KEY, plain.model, plain.weights, cfg)["layers"]["attn"]["q"]["magnitude"]
    np.testing.assert_allclose(delta["layers"]["attn"]["q"]["magnitude"], exact, rtol=0.2)
