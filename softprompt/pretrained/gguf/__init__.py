"""GGUF files read without PyTorch: config, weights and tokenizer."""

import re

from softprompt.errors import UserError
from softprompt.pretrained.gguf.families import FAMILIES, Config, Family
from softprompt.pretrained.gguf.file import File
from softprompt.pretrained.gguf.text import read_tokenizer
from softprompt.pretrained.name_tables import Source, Table


def read_config(file: File) -> Config:
    """The config of the model in a file, from its metadata.

    Raises:
        UserError: another architecture, a variant that the model does not have, or a missing key.
    """
    return _family(file).config(file)


def open_model(file: File) -> tuple[Config, Table, Source]:
    """The model in a file, the rules that fill its leaves, and its tensors.

    Each tensor is dequantised to float32 when it is read.

    Raises:
        UserError: what `read_config` raises.
    """
    family = _family(file)
    config = family.config(file)
    source = Source(
        file=str(file.path),
        tensors={name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()},
        read=file.read,
        harmless=lambda name: bool(re.fullmatch(family.harmless, name)),
    )
    return config, family.table(config), source


def _family(file: File) -> Family:
    if file.architecture not in FAMILIES:
        raise UserError(
            f"{file.path}: architecture {file.architecture!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return FAMILIES[file.architecture]
