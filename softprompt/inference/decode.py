"""Generation for inputs of different lengths after one context.

Each batch of inputs is run once; padding limits the number of shapes to compile. Then one compiled
program generates until every row has ended or the limit is reached. The limit, the inputs' lengths,
the EOS id and the sampling are arguments of this program and need no recompilation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt.errors import UserError
from softprompt.inference.batches import InputBatch, input_batches, slots_for
from softprompt.inference.kv_cache import Cache, Tree, empty_cache, extend, prefill
from softprompt.inference.sampling import GREEDY, Sampling, choose, row_keys
from softprompt.models import Decoder, Model
from softprompt.training.sharding import by_row, put, replicated

Report = Callable[[int, int], None]
Inputs = Sequence[Sequence[int] | np.ndarray]
NO_TOKEN = -1  # an EOS id that no model generates


class State(NamedTuple):
    """The loop's carry: `made` tokens of each row are sampled; the last one has not been run."""

    made: jax.Array
    last_B: jax.Array
    done_B: jax.Array
    out_BN: jax.Array
    cache: Cache


class RowIds(NamedTuple):
    """The rows of a batch: the ids that seed their draws, and which rows have an example."""

    ids_B: Any
    real_B: Any


class Rules(NamedTuple):
    """Arguments of the compiled loop: the number of tokens, EOS, the sampling and its key."""

    limit: int
    eos_id: int
    sampling: Sampling
    key: jax.Array


def decode(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    input_cache: Any,
    logits_BV: jax.Array,
    rows: RowIds,
    rules: Rules,
    *,
    new: int,
) -> jax.Array:
    """Generates until all rows have ended; returns ids [B, new], EOS after the end of a row.

    Args:
        model: a decoder or a T5.
        weights: its frozen weights.
        shared: the method's variables and the context.
        input_cache: from `prefill`.
        logits_BV: of the first new token.
        rows: see `RowIds`.
        rules: when to stop, and how to choose tokens.
        new: N, the most new tokens; `rules.limit` may be less.
    """

    def pick(logits_BV: jax.Array, nth: Any, done_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens_B = choose(logits_BV, rules.sampling, row_keys(rules.key, nth, rows.ids_B))
        tokens_B = jnp.where(done_B, rules.eos_id, tokens_B).astype(jnp.int32)
        return tokens_B, done_B | (tokens_B == rules.eos_id)

    def more(state: State) -> jax.Array:
        return (state.made < rules.limit) & ~jnp.all(state.done_B)

    def step(state: State) -> State:
        logits_BV, cache = extend(
            model, weights, shared, input_cache, state.cache, state.last_B, state.made - 1
        )
        tokens_B, done_B = pick(logits_BV, state.made, state.done_B)
        out_BN = jax.lax.dynamic_update_slice(state.out_BN, tokens_B[:, None], (0, state.made))
        return State(state.made + 1, tokens_B, done_B, out_BN, cache)

    tokens_B, done_B = pick(logits_BV, 0, ~rows.real_B)
    out_BN = jnp.full((len(tokens_B), new), rules.eos_id, jnp.int32).at[:, 0].set(tokens_B)
    first = State(jnp.array(1), tokens_B, done_B, out_BN, empty_cache(input_cache, new))
    return jax.lax.while_loop(more, step, first).out_BN


@functools.lru_cache(maxsize=32)
def prefill_function(model: Model) -> Callable[..., Any]:
    """The compiled `prefill`."""
    return jax.jit(functools.partial(prefill, model), static_argnames="slots")


@functools.lru_cache(maxsize=32)
def decode_function(model: Model, mesh: Mesh | None) -> Callable[..., jax.Array]:
    """The compiled `decode`."""
    sharding = None if mesh is None else replicated(mesh)
    bound = functools.partial(decode, model)
    return jax.jit(bound, static_argnames="new", out_shardings=sharding)


def generate(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    inputs: Inputs,
    *,
    max_new: int,
    eos_id: int | None,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    ids: Sequence[int] | None = None,
    batch: int = 32,
    room: int = 0,
    mesh: Mesh | None = None,
    which: Sequence[int] | None = None,
    progress: Report = lambda done, total: None,
) -> list[list[int]]:
    """Generates a continuation of each input (for a T5, the decoder's output).

    Args:
        model: a decoder or a T5.
        weights: its frozen weights.
        shared: the method's variables and the context (of a soft prompt, a text, or empty).
        inputs: token ids of each example.
        max_new: the most tokens to generate.
        eos_id: the token that ends a continuation (and is removed); None: `max_new` tokens.
        sampling: how tokens are chosen; by default the most likely.
        seed: of the sampling.
        ids: a number for each example; its draws depend on this number and the seed, and not on the
            batch. By default its index in `inputs`.
        batch: examples in a batch.
        room: the most tokens of an input, so that calls with longer and shorter inputs use the same
            program; by default those of the longest input.
        mesh: rows are split over its data axis.
        which: the number of each example's prompt. None: there is one prompt.
        progress: called with the number of finished examples and of all examples.

    Returns:
        Generated ids of each example.

    Raises:
        UserError: an empty input, or one that overruns the model's context.
    """
    numbers = np.arange(len(inputs)) if ids is None else np.asarray(ids)
    eos = NO_TOKEN if eos_id is None else eos_id
    rules = Rules(max_new, eos, sampling, jax.random.key(seed))
    decoded = decode_function(model, mesh)

    def run(input_cache: Any, logits_BV: jax.Array, batch: InputBatch) -> jax.Array:
        real_B = batch.example_B >= 0
        rows = on_rows(mesh, RowIds(numbers[batch.example_B].astype(np.uint32), real_B))
        new = slots_for(max_new)
        return decoded(weights, shared, input_cache, logits_BV, rows, rules, new=new)

    options: dict[str, Any] = {"max_new": max_new, "batch": batch, "room": room, "mesh": mesh}
    options |= {"which": which, "progress": progress}
    outputs = over_batches(model, weights, shared, inputs, run, **options)
    return [cut(out_N, max_new, eos) for out_N in outputs]


def over_batches(
    model: Model,
    weights: Tree,
    shared: tuple[Tree, Any],
    inputs: Inputs,
    run: Callable[[Any, jax.Array, InputBatch], jax.Array],
    *,
    max_new: int,
    batch: int,
    room: int = 0,
    mesh: Mesh | None = None,
    which: Sequence[int] | None = None,
    progress: Report = lambda done, total: None,
) -> list[np.ndarray]:
    """Runs `run(input_cache, logits, batch)` on each batch; returns its output for each input.

    Raises:
        UserError: see `generate`.
    """
    check_inputs(model, shared[1], inputs, max_new)
    if mesh is not None:
        batch = -(-batch // mesh.shape["data"]) * mesh.shape["data"]
    batches = input_batches(inputs, batch=batch)
    slots = slots_for(max([room, *(part.tokens_BT.shape[1] for part in batches)]))
    outputs: dict[int, np.ndarray] = {}
    for part in batches:
        which_B = None if which is None else np.asarray(which, np.int32)[part.example_B]
        rows = on_rows(mesh, (part.tokens_BT, part.lengths_B, which_B))
        logits_BV, input_cache = prefill_function(model)(weights, shared, *rows, slots=slots)
        out_BN = np.asarray(run(input_cache, logits_BV, part))
        outputs.update(zip(part.example_B.tolist(), out_BN, strict=True))
        outputs.pop(-1, None)  # empty rows
        progress(len(outputs), len(inputs))
    return [outputs[example] for example in range(len(inputs))]


def check_inputs(model: Model, context: Any, inputs: Inputs, max_new: int) -> None:
    """Checks that each input has a token, and room for new ones in a decoder's context.

    A T5's relative positions have no limit.

    Raises:
        UserError: an input has no tokens, or too many.
    """
    if max_new < 1:
        raise UserError(f"max_new is {max_new}; allowed: 1 or more")
    for number, tokens in enumerate(inputs):
        if not len(tokens):
            raise UserError(f"input {number} has no tokens; allowed: 1 or more")
        if isinstance(model, Decoder):
            most = model.config.context_length - context.length - max_new + 1
            if len(tokens) > most:
                raise UserError(
                    f"input {number} has {len(tokens)} tokens; allowed: {most} (the model's "
                    f"context of {model.config.context_length} less {context.length} of the prompt "
                    f"and {max_new - 1} of {max_new} new ones)"
                )


def on_rows(mesh: Mesh | None, rows: Any) -> Any:
    """Arrays of rows, sharded over the mesh if there is one."""
    if mesh is None:
        return rows
    sharding = by_row(mesh)
    return jax.tree.map(lambda array: put(array, sharding), rows)


def cut(out_N: np.ndarray, limit: int, eos_id: int) -> list[int]:
    """The generated ids before EOS, at most `limit`."""
    ids = out_N[:limit].tolist()
    return ids[: ids.index(eos_id)] if eos_id in ids else ids
