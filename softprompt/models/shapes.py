"""The shapes and dtypes of a model's weights, computed from its config."""

import math

import numpy as np

from softprompt.models import ModelConfig
from softprompt.models.decoder_layers import DecoderConfig
from softprompt.models.t5_layers import T5Config

# Stack -> its attention sublayers, in order, with their names in transformers.
ATTENTIONS = {
    "encoder": {"attn": "SelfAttention"},
    "decoder": {"attn": "SelfAttention", "cross": "EncDecAttention"},
}


def parameter_count(config: ModelConfig) -> int:
    """Exact number of parameters of a model, counted from its config; a tied head counts once."""
    return sum(math.prod(shape) for shape in leaf_shapes(config).values())


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape, for every leaf of the weights; stacked layers are the first axis."""

    def stacked(path: str) -> tuple[int, ...]:
        if isinstance(config, T5Config):
            layers = layer_count(config, path)
            return () if layers is None else (layers,)
        return (config.layers,) if path.startswith("layers/") else ()

    shapes = t5_shapes(config) if isinstance(config, T5Config) else decoder_shapes(config)
    return {path: (*stacked(path), *shape) for path, shape in shapes.items()}


def leaf_dtype(path: str, dtype: np.dtype) -> np.dtype:
    """Dtype of a leaf: the model's for matrices, at least float32 for scales and biases.

    The table of relative biases counts as a bias, because it is added to attention scores.
    """
    small = path.endswith(("/scale", "/bias", "/relative_bias/embedding"))
    return np.promote_types(dtype, np.float32) if small else dtype


def decoder_shapes(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape, for every leaf of the weights; of one layer under "layers/"."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (c.vocab, c.prompt_width)}

    def norm(path: str, size: int) -> None:
        shapes[f"{path}/scale"] = (size,)
        if c.norm == "layer":
            shapes[f"{path}/bias"] = (size,)

    def linear(path: str, inputs: tuple[int, ...], out: tuple[int, ...], bias: bool) -> None:
        shapes[f"{path}/kernel"] = (*inputs, *out)
        if bias:
            shapes[f"{path}/bias"] = out

    if c.positions == "learned":
        shapes["positions/embedding"] = (c.context_length + c.position_offset, c.width)
    if c.embed_width:
        linear("project_in", (c.embed_width,), (c.width,), False)
    norm("layers/attn_norm", c.width)
    for name, heads in {"q": c.heads, "k": c.kv_heads, "v": c.kv_heads}.items():
        linear(f"layers/attn/{name}", (c.width,), (heads, c.head_size), c.qkv_bias)
    for name in ("q_norm", "k_norm") if c.qk_norm else ():
        norm(f"layers/attn/{name}", c.head_size)
    linear("layers/attn/o", (c.heads, c.head_size), (c.width,), c.out_bias)
    norm("layers/mlp_norm", c.width)
    for name in ("gate", "up") if c.gated else ("up",):
        linear(f"layers/mlp/{name}", (c.width,), (c.ffn,), c.mlp_bias)
    linear("layers/mlp/down", (c.ffn,), (c.width,), c.mlp_bias)
    for name in ("attn_post_norm", "mlp_post_norm") if c.norms == "both" else ():
        norm(f"layers/{name}", c.width)
    if c.final_norm:
        norm("final_norm", c.width)
    if c.embed_width:
        linear("project_out", (c.width,), (c.embed_width,), False)
    if not c.tied:
        linear("head", (c.prompt_width,), (c.vocab,), False)
    return shapes


def t5_shapes(config: T5Config) -> dict[str, tuple[int, ...]]:
    """Leaf path -> shape, for every leaf of the weights; of one layer where layers are stacked."""
    c = config
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (c.vocab, c.width)}
    for stack, attentions in ATTENTIONS.items():
        bias = f"{stack}/layers" if c.bias_per_layer else stack
        shapes[f"{bias}/relative_bias/embedding"] = (c.buckets, c.heads)
        for kind in attentions:
            shapes[f"{stack}/layers/{kind}_norm/scale"] = (c.width,)
            for name in "qkv":
                shapes[f"{stack}/layers/{kind}/{name}/kernel"] = (c.width, c.heads, c.head_size)
            shapes[f"{stack}/layers/{kind}/o/kernel"] = (c.heads, c.head_size, c.width)
        shapes[f"{stack}/layers/mlp_norm/scale"] = (c.width,)
        for name in ("gate", "up") if c.gated else ("up",):
            shapes[f"{stack}/layers/mlp/{name}/kernel"] = (c.width, c.ffn)
        shapes[f"{stack}/layers/mlp/down/kernel"] = (c.ffn, c.width)
        shapes[f"{stack}/final_norm/scale"] = (c.width,)
    if not c.tied:
        shapes["head/kernel"] = (c.width, c.vocab)
    return shapes


def layer_count(config: T5Config, path: str) -> int | None:
    """The number of layers stacked in a leaf; None for a leaf outside the layers."""
    counts = {"encoder/layers/": config.encoder_layers, "decoder/layers/": config.decoder_layers}
    return next((n for prefix, n in counts.items() if path.startswith(prefix)), None)
