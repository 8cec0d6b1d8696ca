"""Where a prompt starts: functions (key, embedding_VD, P) -> prompt_PD, reproducible by key.

The embeddings are those that the layers see: scaled, in a model that scales them.

Source: Lester et al. 2021, section 3.2, "Prompt initialization".
"""

import collections
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.errors import UserError

Initializer = Callable[[jax.Array, jax.Array, int], jax.Array]


def embedding_rms(embedding_VD: jax.Array) -> jax.Array:
    """Root mean square of the embedding matrix's entries."""
    return jnp.sqrt(jnp.mean(jnp.square(embedding_VD.astype(jnp.float32))))


def uniform(bound: float | None = None) -> Initializer:
    """Uniform in [-bound, bound]; without a bound, scaled to the embeddings' RMS.

    The paper uses a bound of 0.5 beside embeddings whose entries have an RMS near 10.7 (T5 1.1):
    the same number means another thing for a model whose embeddings are of size 0.1.
    """

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        limit = 3**0.5 * embedding_rms(embedding_VD) if bound is None else bound
        shape = (length, embedding_VD.shape[1])
        return limit * jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)

    return rows


def vocabulary(ids: Sequence[int]) -> Initializer:
    """Rows of the embedding matrix, sampled from `ids` (without replacement while they last)."""
    pool = np.asarray(ids, np.int32)

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        replace = length > len(pool)
        return embedding_VD[jax.random.choice(key, pool, (length,), replace=replace)]

    return rows


def fixed(ids: Sequence[Sequence[int]], rest: Initializer) -> Initializer:
    """One row for each group of token ids (their mean where a group has several), then `rest`.

    With groups that are the verbalizers, this is the paper's class-label initialisation. Groups
    beyond the prompt's length are left out.
    """

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        groups = [np.asarray(g, np.int32) for g in ids[:length]]
        first = jnp.stack([jnp.mean(embedding_VD[g].astype(jnp.float32), axis=0) for g in groups])
        missing = length - len(groups)
        if missing == 0:
            return first
        return jnp.concatenate([first, rest(key, embedding_VD, missing).astype(first.dtype)])

    return rows


def text(ids: Sequence[int]) -> Initializer:
    """The embeddings of a text, cut at the prompt's length, or repeated until it is filled."""

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        return embedding_VD[np.resize(np.asarray(ids, np.int32), length)]

    return rows


def from_rows(prompt_PD: np.ndarray, rest: Initializer, *, name: str) -> Initializer:
    """Another prompt: cut at the wanted length, or extended with rows of `rest`.

    Args:
        prompt_PD: the other prompt.
        rest: what fills the missing rows.
        name: the file it came from, for errors.

    Raises:
        UserError: its width is not the model's (when the initializer is run).
    """

    def rows(key: jax.Array, embedding_VD: jax.Array, length: int) -> jax.Array:
        width = embedding_VD.shape[1]
        if prompt_PD.ndim != 2 or prompt_PD.shape[1] != width:
            raise UserError(
                f"{name}: a prompt of shape {list(prompt_PD.shape)} does not fit this model; "
                f"allowed: [any length, {width}]"
            )
        first = jnp.asarray(prompt_PD[:length])
        missing = length - len(first)
        if missing == 0:
            return first
        return jnp.concatenate([first, rest(key, embedding_VD, missing).astype(first.dtype)])

    return rows


def common_tokens(texts: Iterable[Iterable[int]], number: int) -> list[int]:
    """Ids of the `number` most common tokens of some tokenised texts, most common first.

    The paper samples "from the 5,000 most common tokens", which T5's vocabulary lists first; other
    vocabularies are not sorted by frequency, so they are counted. Ties go to the smaller id.

    Raises:
        UserError: the texts have no token.
    """
    counts: collections.Counter[int] = collections.Counter()
    for one in texts:
        counts.update(one)
    if not counts:
        raise UserError("config.method.common_text: no tokens to sample a prompt from")
    order = sorted(counts, key=lambda i: (-counts[i], i))
    return order[:number]
