"""Models that `softprompt pretrain` makes: their names, the sizes of the ladder, their folders.

A model is a Hugging Face folder in the cache, with a file `provenance.json` beside its weights.
"ladder/d1@1of4" is "ladder/d1" after a quarter of its tokens; "ladder/t0@lm10" is "ladder/t0" after
10 % of its LM adaptation, and "ladder/t0@lm0" is "ladder/t0" itself.
"""

from pathlib import Path
from typing import Any

from softprompt.downloads import cache_dir
from softprompt.errors import UserError
from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config

PREFIX = "ladder/"
PROVENANCE = "provenance.json"
VOCABULARY = 4096
HEAD_SIZE = 32


def _decoder(layers: int, width: int, ffn: int) -> DecoderConfig:
    heads = width // HEAD_SIZE
    sizes: dict[str, Any] = {"heads": heads, "kv_heads": heads, "head_size": HEAD_SIZE, "ffn": ffn}
    return DecoderConfig(vocab=VOCABULARY, width=width, layers=layers, context_length=512, **sizes)


def _t5(layers: int, width: int, ffn: int) -> T5Config:
    return T5Config(
        vocab=VOCABULARY,
        width=width,
        encoder_layers=layers,
        decoder_layers=layers,
        heads=width // HEAD_SIZE,
        head_size=HEAD_SIZE,
        ffn=ffn,
    )


# Llama's architecture, and that of T5 1.1.
RUNGS: dict[str, ModelConfig] = {
    "ladder/d0": _decoder(2, 64, 192),
    "ladder/d1": _decoder(3, 96, 256),
    "ladder/d2": _decoder(3, 160, 448),
    "ladder/d3": _decoder(4, 224, 608),
    "ladder/d4": _decoder(6, 320, 864),
    "ladder/t0": _t5(2, 96, 256),
    "ladder/t1": _t5(3, 160, 448),
}


def ladder_dir() -> Path:
    """The folder of pretrained models in the cache."""
    return cache_dir() / "ladder"


def model_folder(name: str) -> Path:
    """Where a pretrained model is, or will be."""
    return ladder_dir() / name.removeprefix(PREFIX).removesuffix("@lm0")


def is_made(name: str) -> bool:
    """Whether a model of the ladder is in the cache."""
    return (model_folder(name) / PROVENANCE).is_file()


def find_made(name: str) -> Path:
    """The Hugging Face folder of a pretrained model.

    Raises:
        UserError: it is not in the cache; names the commands that put it there.
    """
    if not is_made(name):
        raise UserError(
            f"model {name!r} is not in {ladder_dir()}; `softprompt pretrain {name}` makes it, and "
            "`softprompt ladder import FILE` reads it from an archive"
        )
    return model_folder(name)
