"""GGUF files read without PyTorch: config, tensors, and what the tokenizer needs.

Source: the GGUF specification, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
Shapes are stored reversed. llama.cpp stores the query and key rows of each head interleaved for its
own rotary embedding; they are put back into the order of the original weights here.
"""

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.models.names import Source, Table, decoder_table

ARCHITECTURES = ("llama",)

NAMES = {
    "embed": "token_embd",
    "layers/attn_norm": "blk.{}.attn_norm",
    "layers/attn/q": "blk.{}.attn_q",
    "layers/attn/k": "blk.{}.attn_k",
    "layers/attn/v": "blk.{}.attn_v",
    "layers/attn/o": "blk.{}.attn_output",
    "layers/mlp_norm": "blk.{}.ffn_norm",
    "layers/mlp/gate": "blk.{}.ffn_gate",
    "layers/mlp/up": "blk.{}.ffn_up",
    "layers/mlp/down": "blk.{}.ffn_down",
    "final_norm": "output_norm",
    "head": "output",
}


class File:
    """An opened GGUF file: its tensors by name and its metadata.

    Raises:
        UserError: the file is absent, truncated or no GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such GGUF file")
        try:
            reader = gguf.GGUFReader(self.path)
            # Plain values, so that the reader goes: it keeps an array for every token and merge.
            self.metadata = {key: field.contents() for key, field in reader.fields.items()}
        except Exception as e:  # the reader meets a broken file as an error of any type
            raise UserError(f"{self.path}: not a complete GGUF file ({_reason(e)})") from e
        self.tensors = {t.name: t for t in reader.tensors}

    def get(self, key: str, default: Any = None) -> Any:
        """The metadata value of a key, as a Python object, or the default where it is absent."""
        return self.metadata.get(key, default)

    def need(self, key: str) -> Any:
        """The metadata value of a key that must be there.

        Raises:
            UserError: naming the file and the key.
        """
        value = self.get(key)
        if value is None:
            raise UserError(f"{self.path}: metadata has no {key}")
        return value


def read_config(file: File) -> DecoderConfig:
    """The decoder's sizes, from the metadata.

    Raises:
        UserError: another architecture, a variant that the decoder does not have, or a missing key.
    """
    architecture = file.need("general.architecture")
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse_variants(file)
    width, heads = file.need("llama.embedding_length"), file.need("llama.attention.head_count")
    config = DecoderConfig(
        vocab=file.get("llama.vocab_size") or len(file.need("tokenizer.ggml.tokens")),
        width=width,
        layers=file.need("llama.block_count"),
        heads=heads,
        kv_heads=file.get("llama.attention.head_count_kv", heads),
        head_size=file.get("llama.attention.key_length", width // heads),
        ffn=file.need("llama.feed_forward_length"),
        context_length=file.need("llama.context_length"),
        rope_base=file.get("llama.rope.freq_base", 10000.0),
        norm_eps=file.need("llama.attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in file.tensors,
    )
    rotated = file.get("llama.rope.dimension_count", config.head_size)
    if rotated != config.head_size:
        raise UserError(
            f"{file.path}: llama.rope.dimension_count {rotated} must be the head size "
            f"{config.head_size} (partial rotary positions are not supported)"
        )
    return config


def table(config: DecoderConfig) -> Table:
    """Which tensor fills which leaf."""
    return decoder_table(config, NAMES)


def open_source(file: File, config: DecoderConfig) -> Source:
    """The file's tensors as a source of weights, dequantised to float32 one at a time."""

    def read(name: str) -> tuple[np.ndarray, np.ndarray]:
        tensor = file.tensors[name]
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as e:
            raise UserError(
                f"{file.path}: tensor {name} has type {tensor.tensor_type.name}, which cannot be "
                "read; known: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K"
            ) from e
        values = values.reshape(_shape(tensor))
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            values = _uninterleave(values, config.head_size)
        return values, tensor.data

    tensors = {n: (t.tensor_type.name, _shape(t)) for n, t in file.tensors.items()}
    return Source(file=str(file.path), tensors=tensors, read=read)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))


def _uninterleave(rows: np.ndarray, head_size: int) -> np.ndarray:
    """Undoes llama.cpp's order of a head's rows: 0, K/2, 1, K/2 + 1, ... becomes 0, 1, 2, ..."""
    pairs = rows.reshape(-1, head_size // 2, 2, rows.shape[-1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _refuse_variants(file: File) -> None:
    """Refuses Llama variants that would load and then compute something else."""
    experts = file.get("llama.expert_count", 0)
    if experts:
        raise UserError(f"{file.path}: llama.expert_count {experts}: experts are not supported")
    scaling = file.get("llama.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in file.tensors:
        kind = scaling if scaling != "none" else "rope_freqs.weight"
        raise UserError(f"{file.path}: rotary scaling ({kind}) is not supported; allowed: none")


def _reason(error: Exception) -> str:
    """An error on one line, with its type where it says nothing else."""
    return " ".join(str(error).split()) or type(error).__name__
