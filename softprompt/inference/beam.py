"""Beam search with a length penalty.

Source: the rules are those of `generate(num_beams=..., early_stopping=False)` of transformers 5.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softprompt.errors import UserError
from softprompt.inference.batches import InputBatch, slots_for
from softprompt.inference.decode import NO_TOKEN, Inputs, cut, over_batches
from softprompt.inference.kv_cache import Cache, Tree, empty_cache, extend
from softprompt.models import Model


class Beams(NamedTuple):
    """The search of one input with C beams; unwritten tokens are NO_TOKEN.

    Attributes:
        live_C: log-probabilities of the live sequences, in descending order.
        live_CN: their tokens.
        ended_C: log-probability / length ** penalty of the best ended sequences, in descending
            order; -inf where fewer than C have ended.
        ended_CN: their tokens.
        open: whether a live sequence may still become one of the best.
    """

    live_C: jax.Array
    live_CN: jax.Array
    ended_C: jax.Array
    ended_CN: jax.Array
    open: jax.Array


class State(NamedTuple):
    """The loop's carry: the number of chosen tokens (`made`), the beams [B, ...], their cache."""

    made: jax.Array
    beams: Beams
    cache: Cache


class Rules(NamedTuple):
    """Arguments of the compiled search, which may change without recompilation."""

    limit: int
    eos_id: int
    length_penalty: float


def new_beams(beams: int, new: int) -> Beams:
    """The search before its first token: one empty sequence in the first beam."""
    none_C = jnp.full(beams, -jnp.inf)
    empty_CN = jnp.full((beams, new), NO_TOKEN, jnp.int32)
    return Beams(none_C.at[0].set(0.0), empty_CN, none_C, empty_CN, jnp.array(True))


def advance(
    beams: Beams, logits_CV: jax.Array, count: jax.Array, rules: Rules
) -> tuple[Beams, jax.Array]:
    """Chooses the next token of one input's beams.

    Of the 2C best continuations, those of the first C that end (by EOS, or at the limit) compete
    with the sequences that ended before. The best C that do not end stay live. The search closes
    when the best live sequence, at its present length, is no better than the worst of C ended ones.

    Args:
        beams: the search so far.
        logits_CV: of each beam's next token.
        count: the number of tokens of each beam.
        rules: when sequences end, and how they are ranked.

    Returns:
        The search after the token, and the beam that each live sequence continues [C].
    """
    width, vocab = logits_CV.shape
    total_CV = jax.nn.log_softmax(logits_CV) + beams.live_C[:, None].astype(logits_CV.dtype)
    best_2C, index_2C = jax.lax.top_k(total_CV.reshape(-1), 2 * width)
    parent_2C, token_2C = index_2C // vocab, (index_2C % vocab).astype(jnp.int32)
    tokens_2CN = beams.live_CN[parent_2C].at[:, count].set(token_2C)
    ends_2C = (token_2C == rules.eos_id) | (count + 1 >= rules.limit)

    live_C, live_index_C = jax.lax.top_k(jnp.where(ends_2C, -jnp.inf, best_2C), width)

    length = (count + 1.0) ** rules.length_penalty
    ranked_2C = jnp.where(ends_2C & (jnp.arange(2 * width) < width), best_2C / length, -jnp.inf)
    ranked_3C = jnp.concatenate([beams.ended_C.astype(ranked_2C.dtype), ranked_2C])
    ended_C, ended_index_C = jax.lax.top_k(ranked_3C, width)
    ended_CN = jnp.concatenate([beams.ended_CN, tokens_2CN])[ended_index_C]
    open_ = beams.open & (live_C[0] / length > ended_C[-1])
    found = Beams(live_C, tokens_2CN[live_index_C], ended_C, ended_CN, open_)
    return found, parent_2C[live_index_C]


def search(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    input_cache: Any,
    logits_BV: jax.Array,
    real_B: jax.Array,
    rules: Rules,
    *,
    beams: int,
    new: int,
) -> jax.Array:
    """The best sequence [B, new] of each input; `real_B` is true where a row has an example.

    The other arguments are as for `decode`. The input cache of an input is the same for all of its
    beams.
    """

    def step_beams(old: Beams, logits_BCV: jax.Array, count: Any) -> tuple[Beams, jax.Array]:
        next_, parent_BC = jax.vmap(functools.partial(advance, count=count, rules=rules))(
            old, logits_BCV
        )
        was_open_B = old.open  # a closed search no longer changes

        def select(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(was_open_B.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(select, next_, old), parent_BC

    def more(state: State) -> jax.Array:
        return (state.made < rules.limit) & jnp.any(state.beams.open)

    def step(state: State) -> State:
        last = state.made - 1
        tokens_BC = jax.lax.dynamic_index_in_dim(state.beams.live_CN, last, 2, keepdims=False)
        logits_BCV, cache = extend(
            model, weights, shared, input_cache, state.cache, tokens_BC, last
        )
        found, parent_BC = step_beams(state.beams, logits_BCV, state.made)
        reorder = jax.vmap(lambda part, parent_C: part[:, parent_C], (1, 0), 1)
        cache = reorder(cache[0], parent_BC), reorder(cache[1], parent_BC)
        return State(state.made + 1, found, cache)

    rows = logits_BV.shape[0]
    first = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), new_beams(beams, new))
    first = first._replace(open=real_B)
    logits_BCV = jnp.broadcast_to(logits_BV[:, None], (rows, beams, logits_BV.shape[1]))
    found, _ = step_beams(first, logits_BCV, jnp.array(0))
    state = State(jnp.array(1), found, empty_cache(input_cache, new, beams))
    return jax.lax.while_loop(more, step, state).beams.ended_CN[:, 0]


@functools.lru_cache(maxsize=32)
def search_function(model: Model) -> Callable[..., jax.Array]:
    """The compiled `search`."""
    return jax.jit(functools.partial(search, model), static_argnames=("beams", "new"))


def beam_search(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    inputs: Inputs,
    *,
    beams: int,
    max_new: int,
    eos_id: int | None,
    length_penalty: float = 1.0,
    batch: int = 8,
    **options: Any,
) -> list[list[int]]:
    """Continues each input with the best sequence of a beam search.

    Args:
        model: a decoder or a T5.
        weights: its frozen weights.
        shared: the method's variables and the context.
        inputs: token ids of each example.
        beams: the number of live sequences at every step.
        max_new: the most tokens to generate.
        eos_id: the token that ends a sequence (and is removed); None: `max_new` tokens.
        length_penalty: sequences are ranked by log-probability / length ** penalty, where the
            length includes EOS; a value above 0 favours long ones.
        batch: examples in a batch.
        **options: room, mesh, which and progress, as for `generate`.

    Returns:
        Generated ids of each example.

    Raises:
        UserError: as `generate`; a number of beams below 1, or too many for the vocabulary.
    """
    if not 1 <= beams <= model.config.vocab // 2:
        raise UserError(f"beams is {beams}; allowed: 1 to {model.config.vocab // 2}")
    rules = Rules(max_new, NO_TOKEN if eos_id is None else eos_id, length_penalty)

    def run(input_cache: Any, logits_BV: jax.Array, batch: InputBatch) -> jax.Array:
        sizes = {"beams": beams, "new": slots_for(max_new)}
        real_B = batch.example_B >= 0
        return search_function(model)(
            weights, shared, input_cache, logits_BV, real_B, rules, **sizes
        )

    given = model, weights, shared, inputs, run
    outputs = over_batches(*given, max_new=max_new, batch=batch, **options)
    return [cut(out_N, max_new, rules.eos_id) for out_N in outputs]
