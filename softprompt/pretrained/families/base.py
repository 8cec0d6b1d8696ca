"""What a family's file says of it, and how a config.json is read or refused."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.models.positions import RopeScaling
from softprompt.pretrained.name_tables import Table

Raw = Mapping[str, Any]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

NAMED = (("silu", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu", "relu"))


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    Attributes:
        config: config.json -> DecoderConfig. Raises KeyError for a key that must be there, and
            UserError for what the decoder does not compute.
        table: config -> which tensors fill which leaves.
        raw: DecoderConfig -> config.json without `architectures`, so that `config` of it gives the
            same decoder again where the family has it at all.
        harmless: pattern of tensors that follow from the config: masks, rotary frequencies.
        spellings: (pattern, replacement) of other beginnings of the tensors' names, in files of
            other origin; the first that matches counts.
    """

    config: Callable[[Raw], DecoderConfig]
    table: Callable[[DecoderConfig], Table]
    raw: Callable[[DecoderConfig], dict[str, Any]]
    harmless: str = ""
    spellings: tuple[tuple[str, str], ...] = ()


def activation_name(config: DecoderConfig) -> str:
    """What transformers calls the decoder's activation."""
    return next(theirs for theirs, ours in NAMED if ours == config.activation)


def refuse(key: str, value: Any, *allowed: Any) -> UserError:
    """The error for a value that the decoder does not compute."""
    return UserError(f"{key} {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


def only(raw: Raw, key: str, *allowed: Any) -> Any:
    """The value of a key, which must be one of those allowed; the first where it is absent.

    Raises:
        UserError: another value.
    """
    value = raw.get(key, allowed[0])
    if value not in allowed:
        raise refuse(key, value, *allowed)
    return value


def activation(raw: Raw, key: str, default: str) -> str:
    """The decoder's name of the activation under a key.

    Raises:
        UserError: another activation.
    """
    return ACTIVATIONS[only(raw, key, default, *(a for a in ACTIVATIONS if a != default))]


def rope(raw: Raw, *, base: float = 10000.0) -> dict[str, Any]:
    """The decoder's `rope_base` and `rope_scaling`, from a config of either generation.

    Args:
        raw: has `rope_parameters`, or `rope_theta` and perhaps `rope_scaling`.
        base: where neither says.

    Raises:
        UserError: another kind of scaling.
    """
    found = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    for part in (raw, found):
        only(part, "partial_rotary_factor", 1.0)
    theta = found.get("rope_theta") or raw.get("rope_theta") or base
    return {"rope_base": float(theta), "rope_scaling": rope_scaling(found)}


def rope_scaling(found: Raw) -> RopeScaling | None:
    """How a rotary embedding is stretched, from its own part of a config.

    Raises:
        UserError: another kind of scaling.
    """
    key = "rope_type" if "rope_type" in found else "type"
    kind = found.get(key) or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind, float(found["factor"]))
    if kind != "llama3":
        raise refuse("rope_type", kind, "default", "linear", "llama3")
    return RopeScaling(
        kind,
        float(found["factor"]),
        low=float(found["low_freq_factor"]),
        high=float(found["high_freq_factor"]),
        original=int(found["original_max_position_embeddings"]),
    )


def windows(raw: Raw, slides: Callable[[int], bool]) -> tuple[int, ...]:
    """The decoder's `windows`.

    Args:
        raw: has `sliding_window`, `num_hidden_layers` and perhaps `layer_types`.
        slides: whether a layer has the window, where the config does not list its layers' types.

    Raises:
        UserError: another type of layer, or not one for each layer.
    """
    layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    types = raw.get("layer_types") or [
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
    return tuple(int(window) if one == "sliding_attention" else 0 for one in types)


def raw_rope(config: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_theta": config.rope_base}
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "llama3":
        found["low_freq_factor"] = scaling.low
        found["high_freq_factor"] = scaling.high
        found["original_max_position_embeddings"] = scaling.original
    return {"rope_theta": config.rope_base, "rope_scaling": found}


def raw_windows(config: DecoderConfig) -> dict[str, Any]:
    """`sliding_window` and `layer_types` of a config.json; {} where no layer has a window."""
    if not any(config.windows):
        return {}
    types = ["sliding_attention" if window else "full_attention" for window in config.windows]
    return {"sliding_window": max(config.windows), "layer_types": types}
