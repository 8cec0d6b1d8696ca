"""The architectures of GGUF files: how their metadata and tensors become config and weights.

Keys and tensor names are those of llama.cpp's converter, which stores every matrix as [out, in].
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from softprompt.errors import UserError
from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig
from softprompt.models.positions import RopeScaling, stretch
from softprompt.models.shapes import ATTENTIONS
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.gguf.file import File
from softprompt.pretrained.name_tables import (
    Table,
    TensorRule,
    decoder_table,
    encoder_decoder_table,
    fused_qkv,
    third,
)

NAMES: Mapping[str, str] = {
    "embed": "token_embd",
    "positions": "position_embd",
    "layers/attn_norm": "blk.{}.attn_norm",
    "layers/attn/q": "blk.{}.attn_q",
    "layers/attn/k": "blk.{}.attn_k",
    "layers/attn/v": "blk.{}.attn_v",
    "layers/attn/q_norm": "blk.{}.attn_q_norm",
    "layers/attn/k_norm": "blk.{}.attn_k_norm",
    "layers/attn/o": "blk.{}.attn_output",
    "layers/attn_post_norm": "blk.{}.post_attention_norm",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "layers/mlp/gate": "blk.{}.ffn_gate",
    "layers/mlp/up": "blk.{}.ffn_up",
    "layers/mlp/down": "blk.{}.ffn_down",
    "layers/mlp_post_norm": "blk.{}.post_ffw_norm",
    "final_norm": "output_norm",
    "head": "output",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        config: file -> config, from the metadata.
        table: config -> the rules that fill the leaves.
        ignored_tensors: pattern of tensors that fill no leaf and may be ignored.
    """

    config: Callable[[File], ModelConfig]
    table: Callable[[Any], Table]
    ignored_tensors: str = ""


# A tensor for each leaf. The converter has already added 1 to the scales of Gemma's norms.
_plain = functools.partial(decoder_table, names=NAMES)


def _sizes(file: File) -> dict[str, Any]:
    """The keys that all decoders share."""
    width, heads = file.size("embedding_length"), file.size("attention.head_count")
    return {
        "vocab": file.size("vocab_size", len(file.need("tokenizer.ggml.tokens", list))),
        "width": width,
        "layers": file.size("block_count"),
        "heads": heads,
        "kv_heads": file.size("attention.head_count_kv", heads),
        "head_size": file.size("attention.key_length", width // heads),
        "ffn": file.size("feed_forward_length"),
        "context_length": file.size("context_length"),
        "tied": "output.weight" not in file.tensors,
    }


def _rotary(file: File, base: float = 10000.0) -> dict[str, Any]:
    """The keys of all decoders but GPT-2: sizes, norm and rotary positions."""
    name, sizes = file.architecture, _sizes(file)
    rotated = file.size("rope.dimension_count", sizes["head_size"])
    if rotated != sizes["head_size"]:
        raise UserError(
            f"{file.path}: {name}.rope.dimension_count {rotated} must be the head size "
            f"{sizes['head_size']} (partial rotary positions are not supported)"
        )
    if experts := file.get(f"{name}.expert_count", 0):
        raise UserError(f"{file.path}: {name}.expert_count {experts}: experts are not supported")
    rope_base = file.number("rope.freq_base", base)
    return {
        **sizes,
        "norm_eps": file.number("attention.layer_norm_rms_epsilon"),
        "rope_base": rope_base,
        "rope_scaling": _scaling(file, sizes["head_size"], rope_base),
    }


def _scaling(file: File, size: int, base: float) -> RopeScaling | None:
    """The metadata describe linear scaling; Llama 3's is a tensor of divisors of the frequencies.

    The file lacks its three constants, which are the same in every published Llama since 3.1.
    """
    key = f"{file.architecture}.rope.scaling"
    kind = file.get(f"{key}.type", "none")
    if kind == "linear":
        return RopeScaling("linear", file.number("rope.scaling.factor"))
    if kind != "none":
        raise UserError(
            f"{file.path}: rotary scaling ({key}.type {kind!r}) is not supported; "
            "allowed: none, linear"
        )
    if "rope_freqs.weight" not in file.tensors:
        return None
    factors_K, _ = file.read("rope_freqs.weight")
    scaling = RopeScaling("llama3", float(factors_K.max()))
    frequency_K = base ** -(np.arange(0, size, 2, dtype=np.float32) / size)
    expected_K = frequency_K / np.asarray(stretch(jnp.asarray(frequency_K), scaling, base))
    if factors_K.shape != expected_K.shape or not np.allclose(factors_K, expected_K, rtol=1e-4):
        raise UserError(
            f"{file.path}: rotary scaling (rope_freqs.weight) is not supported; allowed: that of "
            f"Llama 3.1 and later, from {scaling.original} positions on"
        )
    return scaling


def _llama(file: File) -> DecoderConfig:
    return DecoderConfig(
        **_rotary(file),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        out_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
    )


def _llama_table(config: DecoderConfig) -> Table:
    """The plain table, with queries and keys in the order that transformers rotates.

    llama.cpp interleaves the two halves of a head.
    """
    rules = decoder_table(config, NAMES)
    for path, rule in rules.items():
        if path.startswith(("layers/attn/q/", "layers/attn/k/")):
            rules[path] = _uninterleaved(rule, config.head_size)
    return rules


def _uninterleaved(rule: TensorRule, head_size: int) -> TensorRule:
    """The rule that first restores the order of a head's rows from 0, K/2, 1, K/2 + 1, ..."""

    def convert(x: np.ndarray) -> np.ndarray:
        pairs = x.reshape(-1, head_size // 2, 2, *x.shape[1:])
        return rule.convert(pairs.swapaxes(1, 2).reshape(x.shape))

    return dataclasses.replace(rule, convert=convert)


def _qwen2(file: File) -> DecoderConfig:
    return DecoderConfig(**_rotary(file), qkv_bias=True)


def _qwen3(file: File) -> DecoderConfig:
    return DecoderConfig(**_rotary(file), qk_norm=True)


def _gemma(file: File, biggest: int, base: float = 10000.0) -> dict[str, Any]:
    """The keys that Gemma 2 and 3 share.

    The file does not say how queries are scaled: by the root of the head size, except in the
    biggest model, which scales by the root of width / heads.
    """
    shared = _rotary(file, base)
    wide = shared["layers"] == biggest
    return {
        **shared,
        "embed_scale": shared["width"] ** 0.5,
        "activation": "gelu_tanh",
        "norms": "both",
        "query_scale": ((shared["width"] // shared["heads"]) if wide else shared["head_size"])
        ** -0.5,
    }


def _gemma2(file: File) -> DecoderConfig:
    shared, window = _gemma(file, biggest=46), file.size("attention.sliding_window", 4096)
    return DecoderConfig(
        **shared,
        attn_softcap=file.number("attn_logit_softcapping", 50.0),
        final_softcap=file.number("final_logit_softcapping", 30.0),
        windows=_windows(shared["layers"], window, 2),
    )


def _gemma3(file: File) -> DecoderConfig:
    shared, window = _gemma(file, biggest=62, base=1e6), file.size("attention.sliding_window")
    return DecoderConfig(
        **shared,
        qk_norm=True,
        rope_base_local=file.number("rope.freq_base_swa", 10000.0),
        final_softcap=file.number("final_logit_softcapping", 0.0),
        windows=_windows(
            shared["layers"], window, file.size("attention.sliding_window_pattern", 6)
        ),
    )


def _windows(layers: int, window: int, period: int) -> tuple[int, ...]:
    """The last layer of each period sees everything."""
    return tuple(window if (n + 1) % period else 0 for n in range(layers))


def _gpt2(file: File) -> DecoderConfig:
    return DecoderConfig(
        **_sizes(file),
        positions="learned",
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        gated=False,
        activation="gelu_tanh",
        norm="layer",
        norm_eps=file.number("attention.layer_norm_epsilon"),
    )


def _gpt2_table(config: DecoderConfig) -> Table:
    """Queries, keys and values are three equal blocks of one matrix's rows."""
    fused = {f"layers/attn/{name}": "blk.{}.attn_qkv" for name in "qkv"}
    return fused_qkv(decoder_table(config, {**NAMES, **fused}), third)


def _t5(file: File) -> T5Config:
    """A T5. The file lacks the largest distance of the relative bias: 128 in published T5s."""
    layers, gated = file.size("block_count"), "enc.blk.0.ffn_gate.weight" in file.tensors
    return T5Config(
        vocab=file.size("vocab_size", len(file.need("tokenizer.ggml.tokens", list))),
        width=file.size("embedding_length"),
        encoder_layers=layers,
        decoder_layers=file.size("decoder_block_count", layers),
        heads=file.size("attention.head_count"),
        head_size=file.size("attention.key_length"),
        ffn=file.size("feed_forward_length"),
        gated=gated,
        activation="gelu_tanh" if gated else "relu",
        tied="output.weight" not in file.tensors,
        norm_eps=file.number("attention.layer_norm_rms_epsilon"),
        buckets=file.size("attention.relative_buckets_count"),
        context_length=file.size("context_length"),
        start=int(file.number("decoder_start_token_id", 0)),
    )


def _t5_tensor_names() -> dict[str, str]:
    """Path of a leaf -> name of its tensor, `{}` for the layer."""
    names = {"embed/embedding": "token_embd.weight", "head/kernel": "output.weight"}
    prefixes = {"attn": "attn", "cross": "cross_attn"}
    for stack, attentions in ATTENTIONS.items():
        short, layers = stack[:3], f"{stack}/layers"
        names[f"{stack}/relative_bias/embedding"] = f"{short}.blk.0.attn_rel_b.weight"
        names[f"{stack}/final_norm/scale"] = f"{short}.output_norm.weight"
        for kind in attentions:
            theirs = f"{short}.blk.{{}}.{prefixes[kind]}"
            names[f"{layers}/{kind}_norm/scale"] = f"{theirs}_norm.weight"
            for p in "qkvo":
                names[f"{layers}/{kind}/{p}/kernel"] = f"{theirs}_{p}.weight"
        names[f"{layers}/mlp_norm/scale"] = f"{short}.blk.{{}}.ffn_norm.weight"
        for name in ("gate", "up", "down"):
            names[f"{layers}/mlp/{name}/kernel"] = f"{short}.blk.{{}}.ffn_{name}.weight"
    return names


_t5_table = functools.partial(encoder_decoder_table, names=_t5_tensor_names())

FAMILIES: dict[str, Family] = {
    "gemma2": Family(_gemma2, _plain),
    "gemma3": Family(_gemma3, _plain),
    "gpt2": Family(_gpt2, _gpt2_table),
    "llama": Family(_llama, _llama_table, r"rope_freqs\.weight"),
    "qwen2": Family(_qwen2, _plain),
    "qwen3": Family(_qwen3, _plain),
    "t5": Family(_t5, _t5_table, r"dec\.blk\.0\.cross_attn_rel_b\.weight"),
}
