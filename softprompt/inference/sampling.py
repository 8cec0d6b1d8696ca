"""Choice of the next token from its logits."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from softprompt.errors import UserError


@struct.dataclass
class Sampling:
    """How tokens are sampled; the default is greedy.

    Values are arguments of a compiled program. Only whether a field is None is static.

    Attributes:
        temperature: logits are divided by it; None chooses the most likely token.
        top_k: only this many of the most likely tokens may be drawn; None: all.
        top_p: of those, only the most likely tokens whose probabilities together reach this value
            may be drawn; None: all. Source: arXiv 1904.09751, section 3.1.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


GREEDY = Sampling()


def sampling(
    temperature: float = 0.0, *, top_k: int | None = None, top_p: float | None = None
) -> Sampling:
    """A `Sampling` from a user's values.

    A temperature of 0 chooses the most likely token; a top_p of 1 allows all tokens.

    Raises:
        UserError: a value out of range.
    """
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature is {temperature}; allowed: 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}; allowed: 1 or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}; allowed: above 0, up to 1")
    return Sampling(temperature, top_k, None if top_p == 1 else top_p) if temperature else GREEDY


def row_keys(key: jax.Array, step: jax.Array, ids_B: jax.Array) -> jax.Array:
    """A key for each row from the seed's key, the step and the example's id."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), ids_B)


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """The first of the most likely tokens of each row [B], int32; that of a NaN if there is one.

    As `jnp.argmax`, which takes nine times as long on a CPU, a tenth of a decoding step.
    """
    most_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, logits_BV.ndim - 1)
    found_BV = (logits_BV == most_B1) | jnp.isnan(logits_BV)
    return jnp.min(jnp.where(found_BV, ids_BV, logits_BV.shape[-1]), axis=-1)


def choose(logits_BV: jax.Array, how: Sampling, keys_B: jax.Array) -> jax.Array:
    """The next token of each row [B]."""
    if how.temperature is None:
        return likeliest(logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, allowed(logits_BV, how))


def allowed(logits_BV: jax.Array, how: Sampling) -> jax.Array:
    """Logits / temperature, -inf for tokens that may not be drawn; tied tokens are all allowed."""
    x_BV = logits_BV if how.temperature is None else logits_BV / how.temperature
    if how.top_k is not None:
        sorted_BV = jnp.sort(x_BV, descending=True)
        least_B = sorted_BV[:, how.top_k - 1]  # JAX clamps an index beyond the vocabulary
        x_BV = jnp.where(x_BV < least_B[:, None], -jnp.inf, x_BV)
    if how.top_p is not None:
        sorted_BV = jnp.sort(x_BV, descending=True)
        probability_BV = jax.nn.softmax(sorted_BV)
        before_BV = jnp.cumsum(probability_BV, axis=-1) - probability_BV
        least_B = jnp.min(jnp.where(before_BV < how.top_p, sorted_BV, jnp.inf), axis=-1)
        x_BV = jnp.where(x_BV < least_B[:, None], -jnp.inf, x_BV)
    return x_BV


@struct.dataclass
class RowSampling:
    """How the next token of each row is chosen; all fields are [B].

    Attributes:
        temperature: 0 chooses the most likely token.
        top_k: see `Sampling`; 0: all.
        top_p: see `Sampling`; 1: all.
        seed: of the row's draws, uint32.
        nth: the number of the token in its output, from 0.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    seed: Any
    nth: Any


def choose_by_row(logits_BV: jax.Array, how: RowSampling) -> jax.Array:
    """The next token of each row [B], with settings of its own.

    A row's draw depends on its logits, seed and `nth` only, and is that of `generate` for a single
    input with this seed. Noise and sorting are computed only if some row needs them.
    """
    likeliest_B = likeliest(logits_BV)

    def limited(logits_V: jax.Array, temperature: Any, top_k: Any, top_p: Any) -> jax.Array:
        most: Any = jnp.where(top_k == 0, len(logits_V), jnp.minimum(top_k, len(logits_V)))
        share: Any = jnp.where(top_p < 1, top_p, 2.0)  # rounding may sum shares to more than 1
        return allowed(logits_V[None], Sampling(temperature, most, share))[0]

    def drawn() -> jax.Array:
        temperature_B = jnp.where(how.temperature > 0, how.temperature, 1.0)
        x_BV = jax.lax.cond(
            jnp.any((how.temperature > 0) & ((how.top_k > 0) | (how.top_p < 1))),
            lambda: jax.vmap(limited)(logits_BV, temperature_B, how.top_k, how.top_p),
            lambda: logits_BV / temperature_B[:, None],
        )
        tokens_B = jax.vmap(jax.random.categorical)(jax.vmap(_key)(how.seed, how.nth), x_BV)
        return jnp.where(how.temperature > 0, tokens_B.astype(jnp.int32), likeliest_B)

    return jax.lax.cond(jnp.any(how.temperature > 0), drawn, lambda: likeliest_B)


def _key(seed: jax.Array, nth: jax.Array) -> jax.Array:
    """The key of a token's draw, as `row_keys` has it for row 0."""
    return row_keys(jax.random.key(seed), nth, jnp.zeros(1, jnp.uint32))[0]
