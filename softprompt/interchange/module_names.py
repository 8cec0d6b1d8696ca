"""The linear modules of transformers that LoRA and IA3 adapt: their names and sizes."""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig
from softprompt.models.shapes import decoder_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families import FAMILIES, find_family
from softprompt.pretrained.families.gpt2 import GPT2
from softprompt.pretrained.families.t5 import t5_table
from softprompt.pretrained.name_tables import TensorRule

View = Callable[[np.ndarray], np.ndarray]
PREFIX = "base_model.model."  # of every name in a file of PEFT


@dataclasses.dataclass(frozen=True)
class LinearModule:
    """A linear module that transformers has in every layer.

    Attributes:
        name: such as "model.layers.{}.self_attn.q_proj", with `{}` for the layer.
        layers: L.
        inputs: shape of its input in our weights: [D], [H, K] or [F].
        outputs: how many outputs it has.
        projections: path of a projection in our tree, such as "layers/attn/q" -> function from a
            vector of the module's outputs to a view of the projection's own, shaped [H, K], [G, K],
            [D] or [F]. There are three where queries, keys and values share a module (GPT-2).
    """

    name: str
    layers: int
    inputs: tuple[int, ...]
    outputs: int
    projections: Mapping[str, View]

    def layer_names(self) -> list[str]:
        """Its name in each layer."""
        return [self.name.format(layer) for layer in range(self.layers)]

    def tensors(self, kind: str, values: Iterable[np.ndarray]) -> dict[str, np.ndarray]:
        """Name in a file of PEFT -> tensor, from one value for each layer."""
        names = (tensor_name(name, kind) for name in self.layer_names())
        return dict(zip(names, values, strict=True))

    def split(self, rows_LZO: np.ndarray) -> dict[str, np.ndarray]:
        """Path of a projection -> its part [L, Z, ...] of rows of the module's outputs."""
        return {
            path: np.stack([[view(row_O) for row_O in rows_ZO] for rows_ZO in rows_LZO])
            for path, view in self.projections.items()
        }

    def join(self, parts: Mapping[str, np.ndarray], *, rows: int, fill: float) -> np.ndarray:
        """Rows [L, Z, O] from the parts [L, Z, ...]; `fill` stands for parts that are absent."""
        rows_LZO = np.full((self.layers, rows, self.outputs), fill, np.float32)
        for path, part in parts.items():
            for at in np.ndindex(self.layers, rows):
                self.projections[path](rows_LZO[at])[...] = part[at]
        return rows_LZO


def tensor_name(module: str, kind: str) -> str:
    """The name of a module's tensor, such as "lora_A.weight", in a file of PEFT."""
    return f"{PREFIX}{module}.{kind}"


def linear_modules(config: ModelConfig) -> list[LinearModule]:
    """The modules of a model that an adapter may change, in the order of our tree."""
    found: dict[str, LinearModule] = {}
    for path, module in _projections(config):
        same = found.setdefault(module.name, module)
        found[module.name] = dataclasses.replace(
            same, projections={**same.projections, path: module.projections[path]}
        )
    return list(found.values())


def _projections(config: ModelConfig) -> Iterable[tuple[str, LinearModule]]:
    """Each projection's path, and its module as if it had no other projection."""
    if isinstance(config, T5Config):
        for path, part in t5_table(config).items():
            if "/layers/" in path and path.endswith("/kernel"):
                yield path.removesuffix("/kernel"), _own_module(path, part)
        return
    # A family's bias says what module it belongs to, and how the module's outputs are laid out.
    biased = dataclasses.replace(config, qkv_bias=True, out_bias=True, mlp_bias=True)
    kernels = decoder_shapes(biased)
    for path, part in find_family(config)[1].table(biased).items():
        kernel = path.removesuffix("bias") + "kernel"
        if path.startswith("layers/") and path.endswith("/bias") and kernel in kernels:
            inputs = kernels[kernel][: -len(part.leaf)]
            name, (outputs,) = part.name.removesuffix(".bias"), part.source
            path = path.removesuffix("/bias")
            yield (path, LinearModule(name, config.layers, inputs, outputs, {path: part.convert}))


def _own_module(path: str, part: TensorRule) -> LinearModule:
    """The module of a projection that shares it with no other, from the part of its kernel."""
    inputs = part.leaf[:2] if path.endswith("/o/kernel") else part.leaf[:1]
    shape = part.leaf[len(inputs) :]
    assert part.layers is not None, path
    view = {path.removesuffix("/kernel"): lambda x: x.reshape(shape)}
    name = part.name.removesuffix(".weight")
    return LinearModule(name, part.layers, inputs, math.prod(shape), view)


def stored_transposed(config: ModelConfig) -> bool:
    """Whether matrices are stored [in, out], which PEFT calls `fan_in_fan_out`: GPT-2's are."""
    return isinstance(config, DecoderConfig) and find_family(config)[1] is GPT2


def key_mapping(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """(pattern, replacement) of other beginnings that the modules' names may have.

    They are those of every family with the same table: the names in a Gemma 3 that sees images
    begin otherwise.
    """
    if isinstance(config, T5Config):
        return ()
    table = find_family(config)[1].table
    return tuple(one for f in FAMILIES.values() if f.table is table for one in f.key_mapping)


def target_modules(chosen: Iterable[str], config: ModelConfig) -> list[str] | str:
    """The shortest `target_modules` that selects these modules, in all layers, and no other.

    It is a list of the names' endings, or a pattern of whole names where two modules end alike.
    """
    chosen = list(chosen)
    others = [module.name for module in linear_modules(config) if module.name not in chosen]
    endings = [_ending(name, others) for name in chosen]
    if all(endings):
        return sorted({ending for ending in endings if ending})
    return "|".join(re.escape(name).replace(r"\{\}", r"\d+") for name in chosen)


def _ending(name: str, others: list[str]) -> str | None:
    """The shortest end of a module's name behind the layer's number that no other has."""
    words = name.split("{}.", 1)[1].split(".")
    for length in range(1, len(words) + 1):
        ending = ".".join(words[-length:])
        if not any(other.endswith(f".{ending}") for other in others):
            return ending
    return None


def is_targeted(name: str, fields: Mapping[str, Any]) -> bool:
    """Whether an adapter_config.json selects the module of this name, its layer's number included.

    Source: `check_target_module_exists` of peft 0.21.2.
    """
    wanted, layers = fields["target_modules"], fields.get("layers_to_transform")
    if _selects(fields.get("exclude_modules"), name) or not _selects(wanted, name):
        return False
    if isinstance(wanted, str) or name in wanted or layers in (None, []):
        return True
    patterns = fields.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    stems = [rf"(?:^|.*?\.){pattern}" for pattern in patterns] or [r".*?\.[^.]*"]
    matches = (re.match(rf"{stem}\.(?P<layer>\d+)\.", name) for stem in stems)
    first = next((match for match in matches if match), None)
    return first is not None and int(first["layer"]) in np.atleast_1d(layers)


def _selects(wanted: list[str] | str | None, name: str) -> bool:
    """Whether a pattern matches the whole name, or one of a list is the name's end."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, name) is not None
    return any(name == one or name.endswith(f".{one}") for one in wanted or [])
