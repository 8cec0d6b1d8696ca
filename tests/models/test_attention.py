"""Attention against one softmax over joined keys, differentiated by JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.models.attention import Part, attend
from tests.models.parts import G, H, K, T, random_parts


def plain(q_THK, parts, *, scale, softcap):
    """The same by joining keys and values, in one softmax."""
    k_SHK, v_SHK = (
        jnp.repeat(jnp.concatenate([part[n] for part in parts]), H // G, axis=1) for n in (0, 1)
    )
    score_HTS = jnp.einsum("thk,shk->hts", q_THK * scale, k_SHK)
    if softcap:
        score_HTS = softcap * jnp.tanh(score_HTS / softcap)
    masks, biases = [], []
    for part in parts:
        shape = T, part.k_SGK.shape[0]
        masks.append(True if part.mask_TS is None else part.mask_TS)
        masks[-1] = jnp.broadcast_to(masks[-1], shape)
        biases.append(jnp.zeros((H, *shape)) if part.bias_HTS is None else part.bias_HTS)
    score_HTS += jnp.concatenate(biases, axis=-1)
    score_HTS = jnp.where(jnp.concatenate(masks, axis=-1), score_HTS, -jnp.inf)
    return jnp.einsum("hts,shk->thk", jax.nn.softmax(score_HTS, axis=-1), v_SHK)


def floats(parts):
    """What of the parts is differentiated."""
    return [(part.k_SGK, part.v_SGK, part.bias_HTS) for part in parts]


def loss(attention, masks, settings, weight_THK, q_THK, arrays):
    """A sum over what is mixed."""
    parts = [Part(k, v, mask, bias) for (k, v, bias), mask in zip(arrays, masks, strict=True)]
    return jnp.sum(weight_THK * attention(q_THK, parts, **settings))


# Mutations: softcap's derivative left out (`_score` without tanh in the backward pass); the mean
# left out of `backward`; division by the total left out of `g_GQTK`;
# heads split as [Q, G] in `by_head`; a bias read as that of [Q, G] heads.
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 0.7])
def test_values_and_gradients_are_those_of_one_softmax(x64, softcap, bias):
    random = np.random.default_rng(0)
    parts, settings = random_parts(random, bias=bias), {"scale": 0.6, "softcap": softcap}
    q_THK, weight_THK = (jnp.array(random.normal(size=(T, H, K))) for _ in range(2))
    masks = [part.mask_TS for part in parts]
    np.testing.assert_allclose(
        attend(q_THK, parts, **settings), plain(q_THK, parts, **settings), rtol=1e-9
    )
    ours, theirs = (
        jax.grad(loss, argnums=(4, 5))(how, masks, settings, weight_THK, q_THK, floats(parts))
        for how in (attend, plain)
    )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


# Mutation: mask_TS broadcast over the wrong axis.
def test_a_query_that_sees_nothing_gives_finite_gradients(x64):
    random = np.random.default_rng(1)
    (part,) = random_parts(random, bias=False)[2:]
    q_THK = jnp.array(random.normal(size=(T, H, K)))
    masks = [part.mask_TS.at[2].set(False)]
    settings = {"scale": 1.0, "softcap": 0.0}
    found = jax.grad(loss, argnums=(4, 5))(attend, masks, settings, 1.0, q_THK, floats([part]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


# Mutation: `_mix` without its own backward pass (a plain function keeps shares of every key).
def test_nothing_as_large_as_the_scores_is_kept_for_the_backward_pass():
    tokens, random = 64, np.random.default_rng(2)
    q, k, v = (jnp.array(random.normal(size=(tokens, H, K)), jnp.float32) for _ in range(3))
    mask_TS = jnp.tri(tokens, dtype=bool)

    def kept(q_THK, k_SGK, v_SGK):
        parts = [Part(k_SGK[:, :G], v_SGK[:, :G], mask_TS)]
        return jax.vjp(lambda q: attend(q, parts), q_THK)[1]

    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(kept, q, k, v))]
    assert sizes and max(sizes) <= max(q.size, mask_TS.size)
