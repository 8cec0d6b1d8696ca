"""Counts of parameters and floating-point operations, and what a machine can do of them."""

import functools
import time

import jax
import jax.numpy as jnp

from softprompt.models.decoder import DecoderConfig


def layer_parameters(config: DecoderConfig) -> int:
    """N: entries of the matrices that every token is multiplied with; no embeddings, no norms."""
    c = config
    attention = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads)
    return c.layers * (attention + (3 if c.gated else 2) * c.width * c.ffn)


def forward_flops(
    config: DecoderConfig, *, tokens: float, keys: float, targets: float, context: int = 0
) -> float:
    """Multiplications and additions of one forward pass, useful tokens only.

    Args:
        config: sizes.
        tokens: tokens run, the context's own not counted.
        keys: keys that those tokens attend to, summed over tokens, context included.
        targets: positions whose logits are computed.
        context: P, computed once.
    """
    products = 2 * layer_parameters(config) * (tokens + context)
    pairs = keys + context * (context + 1) / 2
    attention = 4 * config.layers * config.heads * config.head_size * pairs
    return products + attention + 2 * targets * config.vocab * config.prompt_width


def train_flops(
    config: DecoderConfig, *, tokens: float, keys: float, targets: float, context: int
) -> float:
    """A training step of a frozen model: 4 N a token, not 6 N, for no weight has a gradient.

    Attention has two operands that depend on the delta, and costs three times its forward pass.
    See `forward_flops` for the arguments.
    """
    forward = forward_flops(config, tokens=tokens, keys=keys, targets=targets, context=context)
    pairs = keys + context * (context + 1) / 2
    attention = 4 * config.layers * config.heads * config.head_size * pairs
    return 2 * forward + attention


@functools.cache
def machine_flops(dtype: str) -> float:
    """Operations a second of all devices together, measured on a square matrix product.

    Args:
        dtype: "float32" or "bfloat16".
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(64):  # a shared machine shows its best only now and then
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    devices = jax.device_count() if jax.default_backend() != "cpu" else 1
    return 2 * size**3 / best * devices
