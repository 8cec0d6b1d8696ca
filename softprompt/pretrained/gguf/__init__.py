"""GGUF files read without PyTorch: config, weights and tokenizer."""

import re

from softprompt.errors import UserError
from softprompt.models import ModelConfig
from softprompt.pretrained.gguf.families import FAMILIES
from softprompt.pretrained.gguf.file import File
from softprompt.pretrained.gguf.text import read_tokenizer
from softprompt.pretrained.name_tables import Source, Table


def open_model(file: File) -> tuple[ModelConfig, Table, Source]:
    """The model in a file, the rules that fill its leaves, and its tensors.

    Each tensor is dequantised to float32 when it is read.

    Raises:
        UserError: another architecture, a variant that the model does not have, or a missing key.
    """
    if file.architecture not in FAMILIES:
        raise UserError(
            f"{file.path}: architecture {file.architecture!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[file.architecture]
    config = family.config(file)
    source = Source(
        file=str(file.path),
        tensors={name: (tensor.kind, tensor.shape) for name, tensor in file.tensors.items()},
        read=file.read,
        harmless=lambda name: bool(re.fullmatch(family.ignored_tensors, name)),
    )
    return config, family.table(config), source
