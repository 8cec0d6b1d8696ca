"""Algebra of the T5 in float64: packing, prompts inline and as contexts, biases; 1e-9 relative."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.models.t5 import T5
from softprompt.models.t5_layers import T5Config, bucket
from tests.models.t5_rows import alone
from tests.tiny_t5 import VARIANTS, load_weights, tiny_t5, write_t5_folder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "t5.json").read_text())

INPUTS = ([5, 9, 9, 31, 2], [40, 41, 42, 43, 44, 45, 46, 47, 48], [7])
TARGETS = ([0, 8, 3], [0, 9], [0, 4, 4, 5, 6])

pytestmark = pytest.mark.usefixtures("x64")


def prompts(**lengths: int) -> dict[str, Any]:
    """Random prompts for the tiny T5, such as encoder=3."""
    rng = np.random.default_rng(5)
    return {k: {"prompt": jnp.asarray(rng.standard_normal((n, 20)))} for k, n in lengths.items()}


def collections(weights: Any, delta: Any = None) -> dict[str, Any]:
    return {"params": weights, "delta": delta or {}}


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-9, atol=1e-11)


def shapes_under_vmap(jaxpr: Any) -> set[tuple[int, ...]]:
    """The shapes of all intermediate values, those inside scans included."""
    shapes = set()
    for eqn in jaxpr.eqns:
        shapes |= {v.aval.shape for v in eqn.outvars}
        for inner in jax.tree.leaves(eqn.params):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                shapes |= shapes_under_vmap(getattr(inner, "jaxpr", inner))
    return shapes


def test_the_bias_of_a_row_and_a_context_are_computed_once_for_all_rows():
    # Breaks if: the bias is taken from positions, or computed inside the layers.
    model, weights = tiny_t5(prompt_to_input=False, heads=3)
    variables = collections(weights, prompts(encoder=7))
    rows = jnp.zeros((6, 11), int), jnp.zeros((6, 5), int)

    def logits(delta, s, t):
        return model.apply(collections(weights, delta), s, t)

    jaxpr = jax.make_jaxpr(jax.vmap(logits, in_axes=(None, 0, 0)))(variables["delta"], *rows)
    bias_shapes = {s for s in shapes_under_vmap(jaxpr.jaxpr) if s[-3:] == (11, 11, 3)}
    assert bias_shapes == {(11, 11, 3)}
    assert (7, 3, 8) in shapes_under_vmap(jaxpr.jaxpr)  # a context's keys in one layer
    assert (6, 7, 3, 8) not in shapes_under_vmap(jaxpr.jaxpr)


@pytest.mark.parametrize("inline", [True, False], ids=["inline", "once"])
def test_an_empty_prompt_equals_the_base_model(inline):
    # Breaks if: positions or masks count a prompt that is not there.
    model, weights = tiny_t5(prompt_to_input=inline)
    base = alone(tiny_t5()[0], collections(weights), INPUTS[0], TARGETS[0])
    empty = collections(weights, prompts(encoder=0, decoder=0))
    close(alone(model, empty, INPUTS[0], TARGETS[0]), base)


def test_a_prompt_made_of_text_equals_feeding_that_text():
    # Breaks if: slots are embedded elsewhere than tokens, or relative positions skip the prompt.
    model, weights = tiny_t5()
    table, texts = weights["embed"]["embedding"], {"encoder": [50, 60, 70], "decoder": [50, 60]}
    fed = texts["encoder"] + INPUTS[0], texts["decoder"] + TARGETS[0]
    delta = {stack: {"prompt": table[jnp.array(text)]} for stack, text in texts.items()}
    found = alone(model, collections(weights, delta), INPUTS[0], TARGETS[0])
    close(found, alone(model, collections(weights), *fed)[len(texts["decoder"]) :])


def test_prompts_on_encoder_and_decoder_both_matter():
    # Breaks if: one of them is not passed on.
    model, weights = tiny_t5()
    both = prompts(encoder=3, decoder=2)
    other = {stack: {"prompt": -part["prompt"]} for stack, part in both.items()}
    deltas = both, both | {"encoder": other["encoder"]}, both | {"decoder": other["decoder"]}
    results = [alone(model, collections(weights, d), INPUTS[0], TARGETS[0]) for d in deltas]
    for i, a in enumerate(results):
        assert all(np.abs(a - b).max() > 1e-3 for b in results[:i])


def test_every_prompt_is_read():
    # Breaks if: a prompt is read past `read_delta`, so that a trial would refuse it.
    for inline in (True, False):
        model, weights = tiny_t5(prompt_to_input=inline)
        variables = collections(weights, prompts(encoder=3, decoder=2))
        apply = functools.partial(model.apply, mutable=["read"])
        _, read = jax.eval_shape(apply, variables, jnp.array([4, 5]), jnp.array([0]))
        assert set(read["read"]) == {"encoder", "decoder"}


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)


def attention(w: Any, x: jax.Array, keys: jax.Array, mask: Any, bias: Any = 0.0) -> jax.Array:
    q, k, v = (
        jnp.einsum("td,dhk->htk", y, w[n]["kernel"])
        for n, y in zip("qkv", (x, keys, keys), strict=True)
    )
    scores = jnp.where(mask, q @ k.swapaxes(1, 2) + bias, -jnp.inf)
    return jnp.einsum("htk,hkd->td", jax.nn.softmax(scores) @ v, w["o"]["kernel"])


def plain_stack(
    config: T5Config, w: Any, x: jax.Array, mask: Any, *, causal: bool, cross: Any = None
) -> jax.Array:
    """A stack written out plainly; `cross`: states, and who may look at them."""
    index = np.arange(x.shape[0])
    sizes = {"buckets": config.buckets, "max_distance": config.max_distance}
    rows = bucket(index - index[:, None], causal=causal, **sizes)
    bias = jnp.moveaxis(w["relative_bias"]["embedding"][rows], 2, 0)

    def run(x: jax.Array, layer: Any) -> tuple[jax.Array, None]:
        y = norm(x, layer["attn_norm"]["scale"])
        x = x + attention(layer["attn"], y, y, mask, bias)
        if cross:
            states, looks = cross
            y = norm(x, layer["cross_norm"]["scale"])
            x = x + looks[:, None] * attention(layer["cross"], y, states, True)
        y = norm(x, layer["mlp_norm"]["scale"])
        up = y @ layer["mlp"]["up"]["kernel"]
        if config.gated:
            up = up * jax.nn.gelu(y @ layer["mlp"]["gate"]["kernel"])
        else:
            up = jnp.maximum(up, 0)
        return x + up @ layer["mlp"]["down"]["kernel"], None

    return norm(jax.lax.scan(run, x, w["layers"])[0], w["final_norm"]["scale"])


def repeated(model: T5, weights: Any, delta: Any, pair: tuple[Any, Any]) -> jax.Array:
    """Logits with the prompts in the rows and hidden from the input by brute-force masks."""
    table = weights["embed"]["embedding"]
    rows, index, length = {}, {}, {}
    for stack, tokens in zip(("encoder", "decoder"), pair, strict=True):
        rows[stack] = jnp.concatenate([delta[stack]["prompt"], table[jnp.array(tokens)]])
        index[stack] = np.arange(rows[stack].shape[0])
        length[stack] = delta[stack]["prompt"].shape[0]
    i, p = index["encoder"], length["encoder"]
    mask = (i[:, None] >= p) | (i < p)
    states = plain_stack(model.config, weights["encoder"], rows["encoder"], mask, causal=False)
    i, p = index["decoder"], length["decoder"]
    cross = (states, i >= p)
    w, mask = weights["decoder"], i[:, None] >= i
    x = plain_stack(model.config, w, rows["decoder"], mask, causal=True, cross=cross)[p:]
    if model.config.tied:
        return x @ table.T / np.sqrt(model.config.width)
    return x @ weights["head"]["kernel"]


def test_once_equals_repeated_behind_a_mask():
    # Breaks if: a context's biases count from 0, the decoder loses the prompt's states, or a
    # context's own run is masked otherwise.
    model, weights = tiny_t5(prompt_to_input=False, encoder_layers=2, decoder_layers=1)
    delta = prompts(encoder=5, decoder=3)
    pair = INPUTS[1], TARGETS[2]

    def once(d: Any) -> jax.Array:
        return model.apply(collections(weights, d), *map(jnp.array, pair))

    def score(form: Any, d: Any) -> Any:
        logits_TV = form(d)
        return jnp.sum(jnp.sin(logits_TV)), logits_TV

    forms = (once, lambda d: repeated(model, weights, d, pair))
    ((_, logits_a), grads_a), ((_, logits_b), grads_b) = (
        jax.jit(jax.value_and_grad(lambda d, f=f: score(f, d), has_aux=True))(delta) for f in forms
    )
    close(logits_a, logits_b)
    jax.tree.map(close, grads_a, grads_b)


@pytest.mark.parametrize("name", GOLDEN["models"])
def test_logits_equal_those_of_transformers(name, tmp_path):
    # Breaks if: scores are scaled, a bias is transposed, or the tied head's scale is dropped.
    golden = GOLDEN["models"][name]
    if name not in ("T5 1.0", "UMT5"):
        golden = [
            case for case in golden if not case["prompt"]
        ]  # a prompt needs both kinds of bias
    write_t5_folder(tmp_path, seed=1, **VARIANTS[name])
    config, weights, _ = load_weights(
        tmp_path, dtype=np.dtype(np.float32), put=lambda path, leaf: jnp.asarray(leaf)
    )
    for case in golden:
        delta = {"encoder": {"prompt": jnp.asarray(case["prompt"], jnp.float32).reshape(-1, 20)}}
        variables = collections(weights, delta)
        logits_TV = alone(T5(config), variables, case["input"], case["target"])
        expected = np.array(case["first_logits"])
        np.testing.assert_allclose(logits_TV[-1, : expected.size], expected, atol=1e-4)


def test_buckets_at_their_edges():
    # Breaks if: the edge of a logarithmic bucket falls below it, or the last does not saturate.
    sizes = {"buckets": 32, "max_distance": 128}
    keys = np.array([-500, -128, -127, -64, -63, -16, -15, -8, -7, 0, 1, 8, 16, 128, 500])
    both = bucket(keys, causal=False, **sizes)
    assert both.tolist() == [15, 15, 15, 14, 13, 10, 9, 8, 7, 0, 17, 24, 26, 31, 31]
    causal = bucket(keys, causal=True, **sizes)
    assert causal.tolist() == [31, 31, 31, 26, 26, 16, 15, 8, 7, 0, 0, 0, 0, 0, 0]


def test_bfloat16_matrices_keep_scales_and_biases_exact(tmp_path):
    write_t5_folder(tmp_path)
    config, weights, _ = load_weights(
        tmp_path, dtype=np.dtype(jnp.bfloat16), put=lambda path, leaf: jnp.asarray(leaf)
    )
    for keys, leaf in jax.tree_util.tree_leaves_with_path(weights):
        path = "/".join(key.key for key in keys)
        exact = path.endswith("scale") or "relative_bias" in path
        assert leaf.dtype == (jnp.float32 if exact else jnp.bfloat16), path
    pair = INPUTS[1], TARGETS[2]
    half = alone(T5(config, dtype=jnp.dtype(jnp.bfloat16)), collections(weights), *pair)
    full = alone(T5(config), collections(jax.tree.map(jnp.float32, weights)), *pair)
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.1 * np.abs(full).max()
