"""Rotary positions in a config.json, in the format of transformers 4 or 5.

Source: `modeling_rope_utils` and `RotaryEmbeddingConfigMixin` of transformers.
"""

import math
from collections.abc import Collection
from typing import Any

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.models.positions import RopeScaling
from softprompt.pretrained.families.keys import (
    Key,
    Raw,
    count,
    flag,
    number,
    one_of,
    read_keys,
    refuse,
    section,
)

# Beside the sizes: `rope_parameters`, or `rope_theta` and perhaps `rope_scaling`.
KEYS = {
    "rope_theta": number(None),
    "rope_scaling": section(),
    "rope_parameters": section(),
    "partial_rotary_factor": one_of(1.0, None),
    "original_max_position_embeddings": count(None),
}

_ANY = Key(None, lambda x: True, "")
_SECTION = {
    "rope_type": _ANY,
    "type": _ANY,
    "rope_theta": number(None),
    "partial_rotary_factor": number(None),
}
_FACTOR = {"factor": number()}
_ORIGINAL = {**_FACTOR, "original_max_position_embeddings": count(None)}

# Kind of scaling -> the keys that it reads.
KINDS: dict[str, dict[str, Key]] = {
    "default": {},
    "linear": _FACTOR,
    "dynamic": _FACTOR,
    "llama3": {**_ORIGINAL, "low_freq_factor": number(), "high_freq_factor": number()},
    "yarn": {
        **_ORIGINAL,
        "attention_factor": number(None),
        "beta_fast": number(32.0),
        "beta_slow": number(1.0),
        "mscale": number(None),
        "mscale_all_dim": number(None),
        "truncate": flag(True),
    },
}


def fields(values: Raw) -> dict[str, Any]:
    """The decoder's `rope_base` and `rope_scaling`.

    As in transformers, the key `rope_scaling` replaces `rope_parameters`.

    Raises:
        UserError: an unknown kind of scaling, or a key that the kind does not have.
    """
    found = read(values)
    if found["partial_rotary_factor"] not in (1.0, None):
        raise refuse("partial_rotary_factor", found["partial_rotary_factor"], 1.0)
    return {
        "rope_base": float(found["rope_theta"] or values["rope_theta"] or 1e4),
        "rope_scaling": scaling(found, values),
    }


def read(values: Raw) -> dict[str, Any]:
    """The values of `rope_scaling` if it is present, else of `rope_parameters`."""
    where = "rope_scaling" if values["rope_scaling"] else "rope_parameters"
    return read_section(values[where] or {}, where)


def read_section(raw: Raw, where: str, *, kinds: Collection[str] = tuple(KINDS)) -> dict[str, Any]:
    """The values of a section on rotary positions; a key that is null counts as absent.

    `where` names the section in errors; `kinds` are the allowed kinds of scaling.

    Raises:
        UserError: an unknown kind, or a key that the kind does not have.
    """
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if kind not in kinds:
        raise refuse(f"{where}.rope_type", kind, *kinds)
    present = {key: value for key, value in raw.items() if value is not None}
    values = read_keys(present, {**_SECTION, **KINDS[kind]}, prefix=f"{where}.")
    return {**values, "rope_type": kind}


def scaling(found: Raw, values: Raw) -> RopeScaling | None:
    """How the frequencies of a rotary embedding are stretched.

    "dynamic" changes nothing up to `max_position_embeddings` positions, the most that a row has.

    Args:
        found: what `read_section` returned.
        values: of the whole config: `max_position_embeddings` and, if the family has the key,
            `original_max_position_embeddings`, which overrides the section's.
    """
    kind = found["rope_type"]
    if kind in ("default", "dynamic"):
        return None
    factor = float(found["factor"])
    if kind == "linear":
        return RopeScaling(kind, factor)
    original = (
        values.get("original_max_position_embeddings")
        or found["original_max_position_embeddings"]
        or values["max_position_embeddings"]
    )
    if kind == "yarn":
        low, high = float(found["beta_slow"]), float(found["beta_fast"])
        attention, truncate = _attention_factor(found, factor), found["truncate"]
        return RopeScaling(kind, factor, low, high, original, attention, truncate)
    low, high = float(found["low_freq_factor"]), float(found["high_freq_factor"])
    if low >= high:
        raise UserError(f"high_freq_factor {high} must be above low_freq_factor {low}")
    return RopeScaling(kind, factor, low, high, original)


def _attention_factor(found: Raw, factor: float) -> float:
    """The factor by which YaRN multiplies cosines and sines."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if found["attention_factor"]:
        return float(found["attention_factor"])
    if found["mscale"] and found["mscale_all_dim"]:
        return scale(found["mscale"]) / scale(found["mscale_all_dim"])
    return scale(1.0)


def raw_fields(config: DecoderConfig) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a config.json."""
    stretch = config.rope_scaling
    if stretch is None:
        return {"rope_theta": config.rope_base}
    found: dict[str, Any] = {"rope_type": stretch.kind, "factor": stretch.factor}
    if stretch.kind != "linear":
        found["original_max_position_embeddings"] = stretch.original
    if stretch.kind == "llama3":
        found |= {"low_freq_factor": stretch.low, "high_freq_factor": stretch.high}
    if stretch.kind == "yarn":
        found |= {"beta_slow": stretch.low, "beta_fast": stretch.high}
        found |= {"attention_factor": stretch.attention, "truncate": stretch.truncate}
    return {"rope_theta": config.rope_base, "rope_scaling": found}
