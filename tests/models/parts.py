"""Random keys and values that a few tokens attend to, in parts."""

import jax.numpy as jnp
import numpy as np

from softprompt.models.attention import Part

T, P, H, G, K = 6, 5, 4, 2, 8


def random_parts(random, *, bias):
    """A context that all see, a cached part with a mask [S], and the row."""
    parts = []
    for keys, mask in ((P, None), (3, np.array([1, 0, 1], bool)), (T, np.tri(T, dtype=bool))):
        kv = (jnp.array(random.normal(size=(keys, G, K))) for _ in range(2))
        biases = jnp.array(random.normal(size=(H, T, keys))) if bias else None
        parts.append(Part(*kv, None if mask is None else jnp.array(mask), biases))
    return parts
