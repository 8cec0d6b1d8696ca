"""How the next token is chosen from its logits."""

import jax
import jax.numpy as jnp
from flax import struct

from softprompt.errors import UserError


@struct.dataclass
class Sampling:
    """How to draw tokens; the default draws none and takes the likeliest.

    A compiled program serves all values of what is given; only which of them are given is static.

    Attributes:
        temperature: logits are divided by it; None takes the likeliest token.
        top_k: only so many likeliest tokens may be drawn; None: all.
        top_p: only the likeliest tokens that together reach this share of probability may be drawn,
            of those that top_k leaves; None: all. Source: arXiv 1904.09751, section 3.1.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None


GREEDY = Sampling()


def sampling(
    temperature: float = 0.0, *, top_k: int | None = None, top_p: float | None = None
) -> Sampling:
    """A `Sampling` from what a user says.

    A temperature of 0 takes the likeliest token; a top_p of 1 leaves all.

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
    """A key for each row from the seed's key, the step and the example's id, never its place."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), ids_B)


def choose(logits_BV: jax.Array, how: Sampling, keys_B: jax.Array) -> jax.Array:
    """The next token of each row [B]."""
    if how.temperature is None:
        return jnp.argmax(logits_BV, axis=-1)
    return jax.vmap(jax.random.categorical)(keys_B, allowed(logits_BV, how))


def allowed(logits_BV: jax.Array, how: Sampling) -> jax.Array:
    """Logits over the temperature, -inf where a token may not be drawn; ties are kept."""
    x_BV = logits_BV if how.temperature is None else logits_BV / how.temperature
    if how.top_k is not None:
        falling_BV = jnp.sort(x_BV, descending=True)
        least_B = falling_BV[:, how.top_k - 1]  # the last one where the index is beyond it
        x_BV = jnp.where(x_BV < least_B[:, None], -jnp.inf, x_BV)
    if how.top_p is not None:
        falling_BV = jnp.sort(x_BV, descending=True)
        share_BV = jax.nn.softmax(falling_BV)
        before_BV = jnp.cumsum(share_BV, axis=-1) - share_BV
        least_B = jnp.min(jnp.where(before_BV < how.top_p, falling_BV, jnp.inf), axis=-1)
        x_BV = jnp.where(x_BV < least_B[:, None], -jnp.inf, x_BV)
    return x_BV
