"""What a family's file defines, and the parts of a config.json that several families share."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families.keys import COMMON, Key, Raw, one_of, refuse
from softprompt.pretrained.name_tables import Table

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

NAMED = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        keys: the keys of config.json that it reads.
        config: their values, and the fields that keys state directly -> the model's config. Raises
            UserError for what the model does not compute.
        table: config -> the rules that fill the leaves.
        others: config -> the keys of config.json that state no field directly.
        ignored: further keys of config.json that change nothing.
        ignored_tensors: pattern of tensors that fill no leaf and may be ignored, such as masks.
        key_mapping: (pattern, replacement) for tensors stored under other prefixes; the first match
            is applied.
        copies: names of tensors that may repeat the embeddings.
    """

    keys: Mapping[str, Key]
    config: Callable[[Raw, Raw], Any]
    table: Callable[[Any], Table]
    others: Callable[[Any], dict[str, Any]]
    ignored: frozenset[str] = frozenset()
    ignored_tensors: str = ""
    key_mapping: tuple[tuple[str, str], ...] = ()
    copies: tuple[str, ...] = ()

    def read(self, values: Raw) -> Any:
        """The model's config, from the values of `keys`."""
        found = {key.field: values[name] for name, key in self.keys.items() if key.field}
        if "activation" in found:
            found["activation"] = ACTIVATIONS[found["activation"]]
        return self.config(values, found)

    def raw(self, config: Any) -> dict[str, Any]:
        """A config.json without `architectures`.

        Reading it gives the same config again if the family has such a model at all.
        """
        found = {name: getattr(config, key.field) for name, key in self.keys.items() if key.field}
        found |= {
            name: NAMED[config.activation]
            for name, key in self.keys.items()
            if key.field == "activation"
        }
        return {"model_type": self.keys["model_type"].default, **found, **self.others(config)}


def decoder_keys(model_type: str, **keys: Key) -> dict[str, Key]:
    """A decoder family's keys: its own, and those of every decoder."""
    own = {"model_type": one_of(model_type), "is_encoder_decoder": one_of(False)}
    return {**COMMON, **own, **keys}


def activation(default: str) -> Key:
    """The key of an activation, which is one of `ACTIVATIONS`."""
    others = (name for name in ACTIVATIONS if name != default)
    return one_of(default, *others, field="activation")


def windows(values: Raw, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The decoder's `windows`; `slides` says which layers have the window if `layer_types` is null.

    Raises:
        UserError: an unknown type of layer, or another number of types than layers.
    """
    layers, window = values["num_hidden_layers"], values["sliding_window"]
    types = values["layer_types"] or [
        "sliding_attention" if slides(n) else "full_attention" for n in range(layers)
    ]
    for one in types:
        if one not in ("full_attention", "sliding_attention"):
            raise refuse("layer_types", one, "full_attention", "sliding_attention")
    if len(types) != layers:
        raise UserError(f"layer_types has {len(types)} entries for {layers} layers")
    if "sliding_attention" not in types:
        return ()
    if not window:
        raise UserError(f"sliding_window {window!r} beside layers of type 'sliding_attention'")
    return tuple(window if one == "sliding_attention" else 0 for one in types)


LAYER_TYPES = Key(None, lambda x: x is None or isinstance(x, list), "a list, null")


def raw_windows(config: DecoderConfig) -> dict[str, Any]:
    """`layer_types` and, if a layer has a window, `sliding_window` of a config.json."""
    windows = config.windows or (0,) * config.layers
    types = ["sliding_attention" if window else "full_attention" for window in windows]
    return {"layer_types": types} | ({"sliding_window": max(windows)} if any(windows) else {})
