"""Floating-point operations of a pass, and the measured FLOP/s and bandwidth of the machine."""

import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.data.rows import RowLayout
from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig


class ContextLengths(NamedTuple):
    """The contexts of a pass.

    Attributes:
        encoder: length of the encoder's context (0 for a decoder).
        decoder: length of the decoder's context, including the opening.
        runs: the number of contexts that are computed: 1, one for each task, or 0 if keys and
            values are given (a prefix).
        opening: tokens at the end of the decoder's context, which are run in any case.
    """

    encoder: int = 0
    decoder: int = 0
    runs: int = 1
    opening: int = 0


@dataclasses.dataclass(frozen=True)
class Work:
    """Counts of one pass, without padding; contexts are counted once.

    Attributes:
        tokens: tokens in the decoder's layers.
        keys: keys that these attend to in self-attention, summed over tokens.
        targets: positions whose logits are computed.
        inputs: tokens in the encoder's layers.
        input_keys: keys that these attend to, summed over tokens.
        cross_keys: encoder states that the decoder's tokens attend to, summed over tokens.
    """

    tokens: float
    keys: float
    targets: float
    inputs: float = 0.0
    input_keys: float = 0.0
    cross_keys: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in pairs))

    def times(self, factor: float) -> "Work":
        """The work of `factor` such passes."""
        return Work(*(factor * count for count in dataclasses.astuple(self)))


def train_work(
    encoded: Encoded, layout: RowLayout, contexts: ContextLengths, examples: int
) -> Work:
    """Work of an average training step.

    Args:
        encoded: the training split, without the opening.
        layout: how an example is laid out in rows.
        contexts: of the step.
        examples: in a step.
    """
    targets_N = np.array([len(target) for target in encoded.targets], np.float64)
    own_N = targets_N + layout.target_slots if layout.encoder else targets_N - 1
    total = _rows_work(encoded, layout, contexts, own_N, heads=float(targets_N.sum()))
    return total.times(examples / len(targets_N)) + _context_work(contexts)


def scoring_work(encoded: Encoded, layout: RowLayout, contexts: ContextLengths) -> Work:
    """Work of scoring every candidate of a split once; see `train_work` for the arguments."""
    ranked = [encoded.ranked(example) for example in range(len(encoded.inputs))]
    counts_N = np.array([len(candidates) for candidates in ranked], np.float64)
    lengths_N = np.array([sum(map(len, candidates)) for candidates in ranked], np.float64)
    if layout.encoder:
        own_N, heads_N = lengths_N + layout.target_slots * counts_N, lengths_N
    else:
        own_N, heads_N = lengths_N - counts_N, 1 + lengths_N - counts_N
    rows = _rows_work(encoded, layout, contexts, own_N, heads=float(heads_N.sum()))
    return rows + _context_work(contexts)


def _context_work(contexts: ContextLengths) -> Work:
    """Work of the contexts that are computed."""
    before, context, own = contexts.encoder, contexts.decoder, contexts.opening
    if not contexts.runs:
        return Work(own, own * (context - own) + own * (own + 1) / 2, 0)
    one = Work(context, context * (context + 1) / 2, 0, before, before**2, context * before)
    return one.times(contexts.runs)


def _rows_work(
    encoded: Encoded,
    layout: RowLayout,
    contexts: ContextLengths,
    own_N: np.ndarray,
    *,
    heads: float,
) -> Work:
    """Work of all examples after the contexts, with `own_N` target tokens in the decoder."""
    inputs_N = np.array([len(ids) for ids in encoded.inputs], np.float64)
    before, context = contexts.encoder, contexts.decoder
    if not layout.encoder:
        inputs_N = inputs_N + own_N
        keys = (inputs_N * (inputs_N + 1) / 2 + inputs_N * context).sum()
        return Work(inputs_N.sum(), keys, heads)
    inputs_N = inputs_N + layout.input_slots
    return Work(
        tokens=own_N.sum(),
        keys=(own_N * (own_N + 1) / 2 + own_N * context).sum(),
        targets=heads,
        inputs=inputs_N.sum(),
        input_keys=(inputs_N * (inputs_N + before)).sum(),
        cross_keys=(own_N * (inputs_N + before)).sum(),
    )


def forward_flops(config: ModelConfig, work: Work) -> float:
    """Multiplications and additions of one forward pass."""
    return _products(config, work) + _attention(config, work)


def train_flops(config: ModelConfig, work: Work, *, weights: bool = False) -> float:
    """FLOPs of a training step: 4 N a token for a frozen model, 6 N if the weights are trained.

    Both operands of attention's products depend on the delta, so attention costs three times its
    forward pass. The products of a delta inside the layers (LoRA, adapters) are not counted here;
    `matrix_flops` of `softprompt.trials.prepare` counts them.
    """
    return (3 if weights else 2) * _products(config, work) + 3 * _attention(config, work)


def _products(config: ModelConfig, work: Work) -> float:
    """FLOPs of products with frozen matrices; those of embeddings and norms are negligible."""
    c, ffn = config, (3 if config.gated else 2) * config.width * config.ffn
    head = 2 * work.targets * c.vocab
    if isinstance(c, DecoderConfig):
        layer = c.width * c.head_size * (2 * c.heads + 2 * c.kv_heads) + ffn
        return 2 * c.layers * layer * work.tokens + head * c.prompt_width
    pair = 2 * c.width * c.heads * c.head_size  # two of an attention's four projections
    encoder = c.encoder_layers * (2 * pair + ffn) * work.inputs
    decoder = c.decoder_layers * ((3 * pair + ffn) * work.tokens + pair * work.inputs)
    return 2 * (encoder + decoder) + head * c.width


def _attention(config: ModelConfig, work: Work) -> float:
    """FLOPs of scores and mixed values."""
    c = config
    if isinstance(c, DecoderConfig):
        pairs = c.layers * work.keys
    else:
        pairs = c.encoder_layers * work.input_keys
        pairs += c.decoder_layers * (work.keys + work.cross_keys)
    return 4 * c.heads * c.head_size * pairs


@functools.cache
def machine_flops(dtype: str) -> float:
    """FLOP/s of all devices together, measured on a square matrix product.

    Args:
        dtype: "float32" or "bfloat16".
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    x = jnp.ones((size, size), jnp.dtype(dtype))
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    best = float("inf")
    for _ in range(64):  # a shared machine rarely reaches its best
        began = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    devices = jax.device_count() if jax.default_backend() != "cpu" else 1
    return 2 * size**3 / best * devices


@functools.cache
def machine_bandwidth() -> float:
    """Memory bandwidth of all devices together in bytes/s, measured on a long addition."""
    size = 2**26 if jax.default_backend() == "cpu" else 2**28
    x = jnp.ones(size, jnp.float32)
    add = jax.jit(lambda a: a + 1)
    add(x).block_until_ready()
    best = float("inf")
    for _ in range(8):
        began = time.perf_counter()
        add(x).block_until_ready()
        best = min(best, time.perf_counter() - began)
    devices = jax.device_count() if jax.default_backend() != "cpu" else 1
    return 2 * x.nbytes / best * devices
