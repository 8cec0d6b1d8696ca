"""The method's three functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.methods import METHODS, none, prompt
from softprompt.methods.initializers import text, uniform
from softprompt.methods.prompt import PromptConfig

KEY = jax.random.key(0)
WEIGHTS = {"embed": {"embedding": jax.random.normal(KEY, (20, 8), jnp.bfloat16)}}


def test_a_prompt_is_float32_beside_bfloat16_weights():
    """Mutation: the embedding's dtype (updates of a hundredth would vanish)."""
    delta = prompt.init(KEY, None, WEIGHTS, PromptConfig(3, None, text([4, 5, 6])))
    assert delta.keys() == {"prompt"}
    assert delta["prompt"].dtype == jnp.float32
    np.testing.assert_array_equal(delta["prompt"], WEIGHTS["embed"]["embedding"][4:7])


def test_a_prompt_is_float64_beside_float64_weights(x64):
    """Mutation: always float32."""
    weights = {"embed": {"embedding": jnp.ones((20, 8), jnp.float64)}}
    assert prompt.init(KEY, None, weights, PromptConfig(3, None, uniform()))["prompt"].dtype == (
        jnp.float64
    )


@pytest.mark.parametrize("initializer", [None, uniform()])
def test_no_prompt_needs_no_initializer(initializer):
    """Mutation: ask for one."""
    delta = prompt.init(KEY, None, WEIGHTS, PromptConfig(0, None, initializer))
    assert delta["prompt"].shape == (0, 8)


def test_bos_stands_first_and_is_not_trained():
    """Mutation: BOS behind the prompt, or in the delta."""
    cfg = PromptConfig(3, 7, text([4, 5, 6]))
    delta = prompt.init(KEY, None, WEIGHTS, cfg)
    assert delta["prompt"].shape == (3, 8)
    spelled = prompt.variables(delta, WEIGHTS, cfg, None)["prompt"]
    np.testing.assert_array_equal(spelled, WEIGHTS["embed"]["embedding"][jnp.array([7, 4, 5, 6])])
    assert spelled.dtype == jnp.float32
    after = PromptConfig(3, None, text([4, 5, 6]))
    assert prompt.variables(delta, WEIGHTS, after, None) is delta


def test_initializers_do_not_split_programs():
    """Mutation: compare the initializer."""
    one, other = PromptConfig(3, 7, uniform()), PromptConfig(3, 7, text([1]))
    assert one == other and hash(one) == hash(other)
    assert len({one, PromptConfig(4, 7), PromptConfig(3, None), PromptConfig(3, 7)}) == 3


def test_every_method_has_the_three_functions():
    """Mutation: leave one out."""
    for method in METHODS.values():
        assert all(callable(getattr(method, name)) for name in ("init", "variables", "fold"))
    delta = {"prompt": jnp.ones((2, 8))}
    assert prompt.fold(delta, PromptConfig(2)) is delta
    assert none.init(KEY, None, WEIGHTS, None) == none.variables({}, WEIGHTS, None, None) == {}
    assert none.fold({}, None) == {}


def test_a_prompt_enters_after_the_embeddings_scaling(x64):
    """Mutation: start from embeddings as they are stored, or scale the trained rows too."""
    weights = {"embed": {"embedding": jax.random.normal(KEY, (20, 8), jnp.float64)}}
    cfg = PromptConfig(3, 7, text([4, 5, 6]), embed_scale=2.5)
    spelled = prompt.variables(prompt.init(KEY, None, weights, cfg), weights, cfg, None)["prompt"]
    wanted = 2.5 * weights["embed"]["embedding"][jnp.array([7, 4, 5, 6])]
    np.testing.assert_allclose(spelled, wanted, rtol=1e-12)
