"""How a token is chosen: limits, what may be drawn, and that draws follow the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from softprompt.errors import UserError
from softprompt.inference.sampling import (
    GREEDY,
    Sampling,
    allowed,
    choose,
    likeliest,
    row_keys,
    sampling,
)

SHARE_V = np.array([0.3, 0.05, 0.25, 0.02, 0.2, 0.1, 0.08])
KEY = jax.random.key(0)


def drawn(how, count=4000):
    """How often each token of `SHARE_V` is drawn, by so many rows."""
    logits_BV = jnp.broadcast_to(jnp.log(SHARE_V) + 3.0, (count, len(SHARE_V)))
    keys_B = row_keys(KEY, 0, jnp.arange(count))
    return np.bincount(choose(logits_BV, how, keys_B), minlength=len(SHARE_V))


def fits(counts, share_V):
    """Whether counts may come from this distribution, by the chi-square test."""
    share_V = np.asarray(share_V) / np.sum(share_V)
    assert not counts[share_V == 0].any()
    kept = share_V > 0
    return stats.chisquare(counts[kept], counts.sum() * share_V[kept]).pvalue > 1e-3


def test_the_likeliest_token_is_numpys():
    """Mutations: the last of tied tokens, a NaN that is passed over."""
    inf, nan = np.inf, np.nan
    rows = [[1, 3, 3], [-inf, -inf, -inf], [inf, 0, inf], [0, nan, 5], [nan, 5, nan], [-0.0, 0, -1]]
    logits_BV = np.array([*rows, *np.random.default_rng(0).integers(0, 3, (50, 3))], np.float32)
    for dtype in (jnp.float32, jnp.bfloat16):
        got_B = likeliest(jnp.asarray(logits_BV, dtype))
        assert got_B.tolist() == np.argmax(logits_BV, axis=-1).tolist()


def test_draws_follow_the_distribution():
    """Mutation: logits multiplied by the temperature; one key for all rows."""
    assert fits(drawn(sampling(1.0)), SHARE_V)
    assert fits(drawn(sampling(2.0)), SHARE_V**0.5)
    assert not fits(drawn(sampling(2.0)), SHARE_V)


def test_top_k_and_top_p():
    """Mutation: top-p before top-k; the token that crosses the share is left out."""
    assert fits(drawn(sampling(1.0, top_k=3)), SHARE_V * (SHARE_V >= 0.2))
    assert fits(drawn(sampling(1.0, top_p=0.6)), SHARE_V * (SHARE_V >= 0.2))
    assert fits(drawn(sampling(1.0, top_p=0.54)), SHARE_V * (SHARE_V >= 0.25))
    # Of the three that top-k leaves, 0.3 + 0.25 is 0.73; of all, it is 0.55.
    assert fits(drawn(sampling(1.0, top_k=3, top_p=0.7)), SHARE_V * (SHARE_V >= 0.25))


def random_logits(rows=50, vocab=300):
    return 3 * jax.random.normal(jax.random.key(1), (rows, vocab))


@pytest.mark.parametrize(
    "how", [sampling(1e-4), sampling(1.0, top_k=1), sampling(2.0, top_p=1e-6), sampling(0.0)]
)
def test_limits_are_greedy(how):
    """Mutation: the least token that may be drawn is left out; top-k keeps one more."""
    logits_BV = random_logits()
    keys_B = row_keys(KEY, 3, jnp.arange(len(logits_BV)))
    np.testing.assert_array_equal(choose(logits_BV, how, keys_B), jnp.argmax(logits_BV, axis=-1))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_the_least_that_reaches_the_share(share):
    """Mutation: the share is counted after the token rather than before it."""
    logits_BV = random_logits()
    kept_BV = np.isfinite(allowed(logits_BV, sampling(1.0, top_p=share)))
    share_BV = np.asarray(jax.nn.softmax(logits_BV))
    least_B = np.where(kept_BV, share_BV, np.inf).min(axis=1)
    mass_B = (share_BV * kept_BV).sum(axis=1)
    assert (mass_B >= share - 1e-5).all()
    assert (mass_B - least_B < share).all()
    assert (np.where(kept_BV, -np.inf, share_BV).max(axis=1) <= least_B).all()


def test_neutral_settings_change_nothing():
    """Mutation: top-p drops the least token at 1."""
    logits_BV = random_logits()
    for how in (sampling(1.0), sampling(1.0, top_p=1.0), sampling(1.0, top_k=999)):
        np.testing.assert_array_equal(allowed(logits_BV, how), logits_BV)


def test_draws_depend_on_seed_step_and_example_alone():
    """Mutation: a key by the row's place; the step is left out."""
    logits_BV = jnp.broadcast_to(random_logits(1)[0], (40, 300))
    ids_B = jnp.arange(40) * 7

    def draw(seed, step, ids_B):
        keys_B = row_keys(jax.random.key(seed), step, ids_B)
        return np.asarray(choose(logits_BV[: len(ids_B)], sampling(1.0), keys_B))

    base = draw(0, 0, ids_B)
    np.testing.assert_array_equal(draw(0, 0, ids_B[::-1]), base[::-1])
    np.testing.assert_array_equal(draw(0, 0, ids_B[5:9]), base[5:9])
    for other in (draw(1, 0, ids_B), draw(0, 1, ids_B), draw(0, 0, ids_B + 1)):
        assert (other != base).mean() > 0.5


def test_settings_out_of_range():
    """Mutation: drop any of the checks."""
    assert sampling() == sampling(0.0, top_k=5) == GREEDY == Sampling()
    cases = {
        "temperature is -0.5; allowed: 0 (greedy) or more": {"temperature": -0.5},
        "top_k is 0; allowed: 1 or more": {"temperature": 1.0, "top_k": 0},
        "top_p is 0.0; allowed: above 0, up to 1": {"temperature": 1.0, "top_p": 0.0},
        "top_p is 1.5; allowed: above 0, up to 1": {"temperature": 1.0, "top_p": 1.5},
    }
    for message, settings in cases.items():
        with pytest.raises(UserError) as error:
            sampling(**settings)
        assert str(error.value) == message
