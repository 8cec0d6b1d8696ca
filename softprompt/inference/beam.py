"""Beam search with a length penalty.

Source: the rules are those of `generate(num_beams=..., early_stopping=False)` of transformers 5.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from softprompt.errors import UserError
from softprompt.inference.batches import InputBatch, slots_for
from softprompt.inference.decode import NO_TOKEN, Inputs, Report, cut, over_batches
from softprompt.inference.kv_cache import Cache, Tree, empty_cache, extend
from softprompt.models import Model


class Beams(NamedTuple):
    """The search of one input, C beams wide; tokens are NO_TOKEN where none is written.

    Attributes:
        live_C: log-probability of each sequence that goes on, the largest first.
        live_CN: its tokens.
        ended_C: log-probability over length ** penalty of each of the best sequences that have
            ended, the largest first; -inf where there is none yet.
        ended_CN: its tokens.
        open: whether a sequence that goes on may still enter the best.
    """

    live_C: jax.Array
    live_CN: jax.Array
    ended_C: jax.Array
    ended_CN: jax.Array
    open: jax.Array


class State(NamedTuple):
    """What the loop carries: `made` tokens are chosen; beams [B, ...], and their cache."""

    made: jax.Array
    beams: Beams
    cache: Cache


class Rules(NamedTuple):
    """What may change without compiling anew."""

    limit: int
    eos_id: int
    length_penalty: float


def new_beams(beams: int, new: int) -> Beams:
    """The search before its first token: one empty sequence, held by the first beam."""
    none_C = jnp.full(beams, -jnp.inf)
    empty_CN = jnp.full((beams, new), NO_TOKEN, jnp.int32)
    return Beams(none_C.at[0].set(0.0), empty_CN, none_C, empty_CN, jnp.array(True))


def advance(
    beams: Beams, logits_CV: jax.Array, count: jax.Array, rules: Rules
) -> tuple[Beams, jax.Array]:
    """Chooses the next token of one input's beams.

    Of the 2C best continuations, those among the first C that end (by EOS, or at the limit) compete
    with what ended before; the best C that do not end go on. The search is closed once the best
    that goes on, taken at its present length, is no better than the worst of C ended ones.

    Args:
        beams: the search so far.
        logits_CV: of each beam's next token.
        count: tokens that each beam has.
        rules: when sequences end, and how they are ranked.

    Returns:
        The search with one token more, and which beam each live one continues [C].
    """
    width, vocab = logits_CV.shape
    total_CV = jax.nn.log_softmax(logits_CV) + beams.live_C[:, None].astype(logits_CV.dtype)
    best_2C, place_2C = jax.lax.top_k(total_CV.reshape(-1), 2 * width)
    parent_2C, token_2C = place_2C // vocab, (place_2C % vocab).astype(jnp.int32)
    tokens_2CN = beams.live_CN[parent_2C].at[:, count].set(token_2C)
    ends_2C = (token_2C == rules.eos_id) | (count + 1 >= rules.limit)

    live_C, kept_C = jax.lax.top_k(jnp.where(ends_2C, -jnp.inf, best_2C), width)

    length = (count + 1.0) ** rules.length_penalty
    ranked_2C = jnp.where(ends_2C & (jnp.arange(2 * width) < width), best_2C / length, -jnp.inf)
    every_3C = jnp.concatenate([beams.ended_C.astype(ranked_2C.dtype), ranked_2C])
    ended_C, won_C = jax.lax.top_k(every_3C, width)
    ended_CN = jnp.concatenate([beams.ended_CN, tokens_2CN])[won_C]

    still = beams.open & (live_C[0] / length > ended_C[-1])
    return Beams(live_C, tokens_2CN[kept_C], ended_C, ended_CN, still), parent_2C[kept_C]


def search(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    memory: Any,
    logits_BV: jax.Array,
    real_B: jax.Array,
    rules: Rules,
    *,
    beams: int,
    new: int,
) -> jax.Array:
    """The best sequence [B, new] of each input.

    Args:
        model: a decoder or a T5.
        weights: its frozen weights.
        shared: the method's variables and the context.
        memory: from `prefill`; the beams of an input share it.
        logits_BV: of the first new token.
        real_B: which rows hold an example.
        rules: see `Rules`.
        beams: C.
        new: N, room for tokens.
    """

    def step_beams(old: Beams, logits_BCV: jax.Array, count: Any) -> tuple[Beams, jax.Array]:
        next_, parent_BC = jax.vmap(functools.partial(advance, count=count, rules=rules))(
            old, logits_BCV
        )
        was = old.open  # a closed search stays as it is, whatever others of its batch do

        def keep(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(was.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        return jax.tree.map(keep, next_, old), parent_BC

    def more(state: State) -> jax.Array:
        return (state.made < rules.limit) & jnp.any(state.beams.open)

    def step(state: State) -> State:
        last = state.made - 1
        tokens_BC = jax.lax.dynamic_index_in_dim(state.beams.live_CN, last, 2, keepdims=False)
        logits_BCV, cache = extend(model, weights, shared, memory, state.cache, tokens_BC, last)
        found, parent_BC = step_beams(state.beams, logits_BCV, state.made)
        take = jax.vmap(lambda part, parent_C: part[:, parent_C], (1, 0), 1)
        cache = take(cache[0], parent_BC), take(cache[1], parent_BC)
        return State(state.made + 1, found, cache)

    rows = logits_BV.shape[0]
    first = jax.tree.map(lambda x: jnp.broadcast_to(x, (rows, *x.shape)), new_beams(beams, new))
    first = first._replace(open=real_B)
    logits_BCV = jnp.broadcast_to(logits_BV[:, None], (rows, beams, logits_BV.shape[1]))
    found, _ = step_beams(first, logits_BCV, jnp.array(0))
    state = State(jnp.array(1), found, empty_cache(memory, new, beams))
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
    room: int = 0,
    mesh: Mesh | None = None,
    which: Sequence[int] | None = None,
    progress: Report = lambda done, total: None,
) -> list[list[int]]:
    """Continues each input by the best sequence that a beam search finds.

    Args:
        model: a decoder or a T5.
        weights: its frozen weights.
        shared: the method's variables and the context.
        inputs: token ids of each example.
        beams: sequences kept at every step.
        max_new: tokens to generate, at most.
        eos_id: what ends a sequence (and is cut off); None runs to `max_new`.
        length_penalty: sequences are ranked by log-probability / length ** penalty, EOS counted;
            above 0 favours long ones.
        batch: examples run together.
        room: as for `generate`.
        mesh: as for `generate`.
        which: as for `generate`.
        progress: as for `generate`.

    Returns:
        Generated ids of each example.

    Raises:
        UserError: as `generate`; a number of beams below 1, or too many for the vocabulary.
    """
    if not 1 <= beams <= model.config.vocab // 2:
        raise UserError(f"beams is {beams}; allowed: 1 to {model.config.vocab // 2}")
    rules = Rules(max_new, NO_TOKEN if eos_id is None else eos_id, length_penalty)

    def run(memory: Any, logits_BV: jax.Array, batch: InputBatch) -> jax.Array:
        sizes = {"beams": beams, "new": slots_for(max_new)}
        real_B = batch.example_B >= 0
        return search_function(model)(weights, shared, memory, logits_BV, real_B, rules, **sizes)

    options: dict[str, Any] = {"max_new": max_new, "batch": batch, "room": room, "mesh": mesh}
    options |= {"which": which, "progress": progress}
    outputs = over_batches(model, weights, shared, inputs, run, **options)
    return [cut(out_N, max_new, rules.eos_id) for out_N in outputs]
