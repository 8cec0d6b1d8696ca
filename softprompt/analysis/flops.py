"""Floating-point operations of a pass, and the measured FLOP/s and bandwidth of the machine."""

import dataclasses
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.encode import Encoded
from softprompt.data.rows import RowLayout
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config


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


def train_work(
    encoded: Encoded,
    layout: RowLayout,
    contexts: tuple[int, int],
    examples: int,
    *,
    runs: int = 1,
) -> Work:
    """Work of an average training step.

    Args:
        encoded: the training split.
        layout: how an example is laid out in rows.
        contexts: lengths of the encoder's context (0 for a decoder) and of the decoder's.
        examples: in a step.
        runs: the number of contexts that a step computes: 1, one for each task, or 0 (a prefix).
    """
    targets_N = np.array([len(target) for target in encoded.targets], np.float64)
    own_N = targets_N + layout.target_slots if layout.encoder else targets_N - 1
    total = _work(encoded, layout, contexts, own_N, heads=float(targets_N.sum()))
    share = examples / len(targets_N)
    once = _work(_without_examples(encoded), layout, contexts, np.zeros(0), heads=0.0)
    fields = [field.name for field in dataclasses.fields(Work)]
    rest = {f: (getattr(total, f) - getattr(once, f)) * share for f in fields}
    return Work(**{f: rest[f] + runs * getattr(once, f) for f in fields})


def scoring_work(encoded: Encoded, layout: RowLayout, contexts: tuple[int, int]) -> Work:
    """Work of scoring every candidate of a split once; see `train_work` for the arguments."""
    ranked = [encoded.ranked(example) for example in range(len(encoded.inputs))]
    counts_N = np.array([len(candidates) for candidates in ranked], np.float64)
    lengths_N = np.array([sum(map(len, candidates)) for candidates in ranked], np.float64)
    if layout.encoder:
        own_N, heads_N = lengths_N + layout.target_slots * counts_N, lengths_N
    else:
        own_N, heads_N = lengths_N - counts_N, 1 + lengths_N - counts_N
    return _work(encoded, layout, contexts, own_N, heads=float(heads_N.sum()))


def _work(
    encoded: Encoded,
    layout: RowLayout,
    contexts: tuple[int, int],
    own_N: np.ndarray,
    *,
    heads: float,
) -> Work:
    """Work of all examples, with `own_N` target tokens in the decoder, and of contexts once."""
    inputs_N = np.array([len(ids) for ids in encoded.inputs], np.float64)
    before, context = contexts
    if not layout.encoder:
        inputs_N = inputs_N + own_N
        keys = (inputs_N * (inputs_N + 1) / 2 + inputs_N * context).sum()
        return Work(inputs_N.sum() + context, keys + context * (context + 1) / 2, heads)
    inputs_N = inputs_N + layout.input_slots
    return Work(
        tokens=own_N.sum() + context,
        keys=(own_N * (own_N + 1) / 2 + own_N * context).sum() + context * (context + 1) / 2,
        targets=heads,
        inputs=inputs_N.sum() + before,
        input_keys=(inputs_N * (inputs_N + before)).sum() + before**2,
        cross_keys=(own_N * (inputs_N + before)).sum() + context * before,
    )


def _without_examples(encoded: Encoded) -> Encoded:
    return dataclasses.replace(encoded, inputs=[], targets=[])


def forward_flops(config: DecoderConfig | T5Config, work: Work) -> float:
    """Multiplications and additions of one forward pass."""
    return _products(config, work) + _attention(config, work)


def train_flops(config: DecoderConfig | T5Config, work: Work, *, weights: bool = False) -> float:
    """FLOPs of a training step: 4 N a token for a frozen model, 6 N if the weights are trained.

    Both operands of attention's products depend on the delta, so attention costs three times its
    forward pass. The products of a delta inside the layers (LoRA, adapters) are not counted here;
    `matrix_flops` of `softprompt.trials.prepare` counts them.
    """
    return (3 if weights else 2) * _products(config, work) + 3 * _attention(config, work)


def _products(config: DecoderConfig | T5Config, work: Work) -> float:
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


def _attention(config: DecoderConfig | T5Config, work: Work) -> float:
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
