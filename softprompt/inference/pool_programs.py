"""The programs of a pool: rows that generate side by side, each after its own lane's context.

A lane holds one task: its context's keys and values, padded to the pool's P, and the variables that
its rows read (LoRA's factors, for instance). A pool of A lanes x B rows is one program, `vmap` over
lanes of `vmap` over rows, which reads a lane once for all its rows: B x 1 serves mixed tasks, 1 x B
a single one.

A row's memory is fixed: S slots for its input, and N columns for the tokens that it generates. All
rows write the same column in a step, because a write of another column for each row would be a
scatter. The columns are a ring: a row that has run n tokens sees the n newest. Rows may therefore
join and leave between any two steps. The caches are donated and never copied.

The caches hold finite values only. What a row leaves in its slot is masked for the next one, but
the weight 0 times an overflowing task's infinity is not 0.

Nothing that a row computes depends on the content of other rows. Its rounding depends on the pool,
on its slot and on the column of its first token only.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from softprompt.inference.sampling import RowSampling, choose_by_row
from softprompt.models.decoder import Cached, Context, Decoder, InputCache
from softprompt.models.layers import collections

Tree = Any
KeysValues = tuple[jax.Array, jax.Array]
ALTERNATIVES = 5  # of each token, with their log-probabilities


@struct.dataclass
class Lane:
    """What the rows of a task share: a padded context, and the variables that rows read."""

    context: Context
    variables: Tree


@dataclasses.dataclass(frozen=True)
class Grid:
    """A pool's sizes.

    Attributes:
        lanes: A.
        rows: B, the rows of a lane.
        slots: S, for the tokens of a row's input.
        columns: N, for the tokens that a row generates.
        together: inputs in one prefill. Fewer are padded to this number, so that a row's rounding
            does not depend on how many join with it.
    """

    lanes: int
    rows: int
    slots: int
    columns: int
    together: int = 1


class Choice(NamedTuple):
    """Chosen tokens [...], their log-probabilities, and the most likely tokens [..., 5].

    Log-probabilities are those of the model, before temperature and limits. `top_ids` and
    `top_logprobs` are zeros where no row of the step needs them.
    """

    ids: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any


def pad_context(context: Context, slots: int) -> Context:
    """The context on the host, padded to `slots` positions."""
    spare = ((0, 0), (0, slots - context.slots), (0, 0), (0, 0))
    k_LPGK, v_LPGK = (np.pad(np.asarray(x), spare) for x in (context.k_LPGK, context.v_LPGK))
    return Context(k_LPGK, v_LPGK, used=np.int32(context.slots))  # type: ignore[arg-type]


def lane_axes(lane: Lane) -> Lane:
    """The axis along which lanes are stacked, for each leaf: behind L for what layers scan."""

    def axis(path: Any, leaf: Any) -> int:
        return int(path[0].key == "layers")

    variables = jax.tree_util.tree_map_with_path(axis, lane.variables)
    return Lane(Context(1, 1, used=0), variables)  # type: ignore[arg-type]


def select_lane(lanes: Lane, axes: Lane, number: Any) -> Lane:
    """One of the stacked lanes."""
    pick = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
    chosen: Lane = jax.tree.map(lambda leaf, axis: pick(leaf, number, axis), lanes, axes)
    return chosen


def set_lane(axes: Lane, lanes: Lane, number: Any, lane: Lane) -> Lane:
    """The stacked lanes with one of them replaced."""
    put = jax.lax.dynamic_update_index_in_dim
    changed: Lane = jax.tree.map(
        lambda leaf, new, axis: put(leaf, new, number, axis), lanes, lane, axes
    )
    return changed


def choose(logits_BV: jax.Array, how: RowSampling, alternatives: Any) -> Choice:
    """Chooses the next token of each row; `alternatives`: whether any row needs them."""
    ids_B = choose_by_row(logits_BV, how)
    norm_B = jax.nn.logsumexp(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, ids_B[:, None], axis=-1)[:, 0]
    shape = len(ids_B), ALTERNATIVES
    top, top_ids = jax.lax.cond(
        alternatives,
        lambda: jax.lax.top_k(logits_BV, ALTERNATIVES),
        lambda: [jnp.zeros(shape, logits_BV.dtype), jnp.zeros(shape, jnp.int32)],
    )
    return Choice(ids_B, chosen_B - norm_B, top_ids, top - norm_B[:, None])


class PrefillBatch(NamedTuple):
    """The inputs of B joining rows: lanes and rows in them [B], ids [B, T] and their lengths."""

    lanes: Any
    rows: Any
    ids: Any
    lengths: Any


def prefill(
    model: Decoder,
    axes: Lane,
    weights: Tree,
    lanes: Lane,
    caches: KeysValues,
    inputs: PrefillBatch,
    how: RowSampling,
    alternatives: Any,
) -> tuple[Choice, KeysValues]:
    """Runs the inputs of joining rows, and chooses their first tokens.

    Args:
        model: the decoder.
        axes: see `lane_axes`.
        weights: the frozen weights.
        lanes: all, stacked.
        caches: keys and values of inputs [L, A, B, S, G, K], donated.
        inputs: see `PrefillBatch`; padded on the right.
        how: fields [B].
        alternatives: see `choose`.

    Returns:
        The first tokens, fields [B]; and the caches.
    """

    def one(inputs: PrefillBatch) -> tuple[jax.Array, KeysValues]:
        lane = select_lane(lanes, axes, inputs.lanes)
        apply: Any = functools.partial(model.apply, collections(weights, lane.variables))
        row = inputs.ids, inputs.lengths
        x_D, input_cache = apply(lane.context, *row, slots=len(inputs.ids), method="prefill")
        logits_1V: Any = apply(x_D[None], method="logits")
        return logits_1V[0], (input_cache.cached.k_LSGK, input_cache.cached.v_LSGK)

    logits_BV, new = jax.vmap(one, out_axes=(0, 1))(inputs)

    def write(cache: jax.Array, new_LBTGK: jax.Array) -> jax.Array:
        for n in range(len(logits_BV)):
            zero = jnp.zeros_like(inputs.lanes[n])
            start = (zero, inputs.lanes[n], inputs.rows[n], zero, zero, zero)
            row = jnp.nan_to_num(new_LBTGK[:, n, None, None])
            cache = jax.lax.dynamic_update_slice(cache, row, start)
        return cache

    return choose(logits_BV, how, alternatives), (
        write(caches[0], new[0]),
        write(caches[1], new[1]),
    )


class RowState(NamedTuple):
    """The rows of a step, int32 [A, B].

    The last sampled token, which has not been run; the input's length; and the number of generated
    tokens that have been.
    """

    ids: Any
    lengths: Any
    counts: Any


def step(
    model: Decoder,
    axes: Lane,
    weights: Tree,
    lanes: Lane,
    inputs: KeysValues,
    ring: KeysValues,
    column: Any,
    rows: RowState,
    how: RowSampling,
    alternatives: Any,
) -> tuple[Choice, KeysValues]:
    """Runs the last token of every row, and chooses the next; rows in use or not.

    Args:
        model: the decoder.
        axes: see `lane_axes`.
        weights: the frozen weights.
        lanes: all, stacked.
        inputs: keys and values of inputs [L, A, B, S, G, K].
        ring: keys and values of generated tokens [L, A, B, N, G, K], donated.
        column: of the ring, which this step writes.
        rows: see `RowState`.
        how: fields [A, B].
        alternatives: see `choose`.

    Returns:
        The next tokens, fields [A, B]; and the ring.
    """
    slots_S, columns_N = (jnp.arange(cache[0].shape[3]) for cache in (inputs, ring))
    age_N = (column - 1 - columns_N) % len(columns_N)  # 0: the newest

    def in_lane(lane: Lane, inputs: KeysValues, ring: KeysValues, rows: RowState) -> Any:
        apply: Any = functools.partial(model.apply, collections(weights, lane.variables))

        def one(inputs: KeysValues, ring: KeysValues, row: RowState) -> Any:
            input_cache = InputCache(Cached(*inputs, slots_S, slots_S < row.lengths), row.lengths)
            position = row.lengths + row.counts
            cached = Cached(*ring, position - 1 - age_N, age_N < row.counts)
            new = row.ids[None], position[None]
            x_1D, kv = apply(lane.context, input_cache, cached, *new, method="extend")
            return x_1D[0], kv

        x_BD, kv = jax.vmap(one, (1, 1, 0), (0, 1))(inputs, ring, rows)
        return apply(x_BD, method="logits"), kv

    logits_ABV, new = jax.vmap(in_lane, (axes, 1, 1, 0), (0, 1))(lanes, inputs, ring, rows)

    def write(cache: jax.Array, column_LAB1GK: jax.Array) -> jax.Array:
        finite = jnp.nan_to_num(column_LAB1GK)
        return jax.lax.dynamic_update_slice_in_dim(cache, finite, column, axis=3)

    flat: RowSampling = jax.tree.map(jnp.ravel, how)
    choice = choose(logits_ABV.reshape(-1, logits_ABV.shape[-1]), flat, alternatives)
    shape = logits_ABV.shape[:2]
    shaped = Choice(*(field.reshape(*shape, *field.shape[1:]) for field in choice))
    return shaped, (write(ring[0], new[0]), write(ring[1], new[1]))
