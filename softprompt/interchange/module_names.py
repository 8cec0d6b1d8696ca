"""What transformers, and so PEFT, calls the matrices that a delta may adapt."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable

import numpy as np

from softprompt.models.decoder import DecoderConfig
from softprompt.models.shapes import decoder_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families import FAMILIES, find_family
from softprompt.pretrained.families.gpt2 import GPT2
from softprompt.pretrained.families.t5 import t5_table
from softprompt.pretrained.name_tables import TensorRule

Config = DecoderConfig | T5Config
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Projection:
    """A projection of every layer, and the module of transformers that holds it.

    Attributes:
        module: its name, `{}` for the layer. Several projections may share one (GPT-2's c_attn).
        layers: L.
        inputs: [D], [H, K] or [F].
        out: [H, K], [G, K], [D] or [F].
        width: the module's outputs, more than those of `out` where it is shared.
        own: of a vector of the module's outputs, a view of this projection's, shaped `out`.
    """

    module: str
    layers: int
    inputs: tuple[int, ...]
    out: tuple[int, ...]
    width: int
    own: Callable[[np.ndarray], np.ndarray]


def projections(config: Config) -> dict[str, Projection]:
    """Path of a projection in the tree, such as "layers/attn/q" -> what it is in transformers."""
    if isinstance(config, T5Config):
        table = t5_table(config)
        return {
            path.removesuffix("/kernel"): _plain(path, rule)
            for path, rule in table.items()
            if "/layers/" in path and path.endswith("/kernel")
        }
    # A family's bias says what module it belongs to, and how the module's outputs are laid out.
    biased = dataclasses.replace(config, qkv_bias=True, out_bias=True, mlp_bias=True)
    kernels = decoder_shapes(biased)
    found = {}
    for path, rule in find_family(config)[1].table(biased).items():
        kernel = path.removesuffix("bias") + "kernel"
        if path.startswith("layers/") and path.endswith("/bias") and kernel in kernels:
            inputs = kernels[kernel][: -len(rule.leaf)]
            module, (width,) = rule.name.removesuffix(".bias"), rule.source
            projection = Projection(module, config.layers, inputs, rule.leaf, width, rule.convert)
            found[path.removesuffix("/bias")] = projection
    return found


def _plain(path: str, rule: TensorRule) -> Projection:
    """A projection whose module is all its own, from the rule of its kernel."""
    inputs = rule.leaf[:2] if path.endswith("/o/kernel") else rule.leaf[:1]
    out = rule.leaf[len(inputs) :]
    assert rule.layers is not None, path
    module = rule.name.removesuffix(".weight")
    return Projection(module, rule.layers, inputs, out, math.prod(out), lambda x: x.reshape(out))


def modules(config: Config) -> dict[str, dict[str, Projection]]:
    """Module -> its projections by path, in the order of the tree."""
    found: dict[str, dict[str, Projection]] = {}
    for path, projection in projections(config).items():
        found.setdefault(projection.module, {})[path] = projection
    return found


def transposed(config: Config) -> bool:
    """Whether matrices are stored [in, out], which PEFT calls `fan_in_fan_out`: GPT-2's are."""
    return isinstance(config, DecoderConfig) and find_family(config)[1] is GPT2


def spellings(config: Config) -> tuple[tuple[str, str], ...]:
    """(pattern, replacement) of other beginnings of modules' names.

    Those of every family with the same table: a Gemma 3 that sees images has other beginnings.
    """
    if isinstance(config, T5Config):
        return ()
    table = find_family(config)[1].table
    return tuple(one for f in FAMILIES.values() if f.table is table for one in f.spellings)


def layer_names(module: str, layers: int) -> list[str]:
    """The names of a module in every layer."""
    return [module.format(layer) for layer in range(layers)]


def targets(chosen: Iterable[str], config: Config) -> list[str] | str:
    """The shortest endings that name these modules and no other; a pattern where there are none.

    PEFT adapts each module that ends in one of the list, or that the pattern matches whole.
    """
    chosen = list(chosen)
    others = [module for module in modules(config) if module not in chosen]
    endings = [_ending(module, others) for module in chosen]
    if all(endings):
        return sorted({ending for ending in endings if ending})
    return "|".join(re.escape(module).replace(r"\{\}", r"\d+") for module in chosen)


def _ending(module: str, others: list[str]) -> str | None:
    """The shortest end of a module's name behind the layer's number that no other has."""
    words = module.split("{}.", 1)[1].split(".")
    for length in range(1, len(words) + 1):
        ending = ".".join(words[-length:])
        if not any(other.endswith(f".{ending}") for other in others):
            return ending
    return None


def targeted(name: str, wanted: list[str] | str | None) -> bool:
    """Whether PEFT's `target_modules` or `exclude_modules` name a module."""
    if not wanted:
        return False
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted)
