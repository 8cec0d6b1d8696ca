"""A loss over chunks of positions, so that the logits of all positions never exist at once.

The gradients of a chunk are computed with its loss, while its logits exist. The backward pass
only scales them, so that no logits are computed twice.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Value = tuple[jax.Array, Any]  # the loss, and metrics
Loss = Callable[[Tree, jax.Array, Tree], Value]


def chunked(loss: Loss, head: Tree, x_RMD: jax.Array, targets: Tree, size: int) -> Value:
    """A loss that is a sum over positions, computed for `size` positions of every row at a time.

    Args:
        loss: (head, inputs of the head [R, m, D], targets [R, m]) -> a loss and metrics. A position
            whose targets are all zero must add nothing.
        head: the weights that the loss depends on.
        x_RMD: the head's inputs.
        targets: a tree of arrays [R, M].
        size: m.

    Returns:
        The sum over the chunks. Metrics have no gradient.
    """
    chunks = -(-x_RMD.shape[1] // size)

    def cut(array: jax.Array) -> jax.Array:
        spare = chunks * size - array.shape[1]
        padded = jnp.pad(array, [(0, 0), (0, spare)] + [(0, 0)] * (array.ndim - 2))
        return padded.reshape(len(array), chunks, size, *array.shape[2:]).swapaxes(0, 1)

    return _summed(loss, head, cut(x_RMD), jax.tree.map(cut, targets))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(loss: Loss, head: Tree, x_CRMD: jax.Array, targets: Tree) -> Value:
    """The sum of the loss over chunks [C, ...]."""
    return _scan(lambda part: (loss(head, *part), None), (x_CRMD, targets))[0]


def _scan(function: Callable[[Any], tuple[Tree, Any]], parts: Any) -> tuple[Tree, Any]:
    """Sums the first results of the parts, and stacks the second ones."""
    shapes = jax.eval_shape(lambda: function(jax.tree.map(lambda x: x[0], parts))[0])
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Tree, part: Any) -> tuple[Tree, Any]:
        one, other = function(part)
        return jax.tree.map(jnp.add, total, one), other

    return jax.lax.scan(add, zeros, parts)


def _forward(loss: Loss, head: Tree, x_CRMD: jax.Array, targets: Tree) -> tuple[Value, Any]:
    """The sum, and the gradients of head and inputs."""
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)

    def one(part: Any) -> tuple[Tree, jax.Array]:
        value, (head_grad, x_grad) = gradient(head, *part)
        return (value, head_grad), x_grad

    (value, head_grad), x_grads = _scan(one, (x_CRMD, targets))
    return value, (head_grad, x_grads)


def _backward(loss: Loss, gradients: Any, cotangent: Value) -> tuple[Tree, Tree, None]:
    head, x_CRMD = jax.tree.map(lambda g: (g * cotangent[0]).astype(g.dtype), gradients)
    return head, x_CRMD, None


_summed.defvjp(_forward, _backward)
