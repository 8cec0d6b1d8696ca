"""PEFT adapters from deltas, and back.

Source: the formats of peft 0.21.2, with which the files agree byte for byte but for one key of the
tensors' metadata. PEFT scores a prompt right only where padding stands on the right, or nowhere:
padding on the left comes between the prompt and the text.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.errors import UserError
from softprompt.interchange.adapter_config import TASKS, check_config, complete_config
from softprompt.interchange.adapter_files import Adapter
from softprompt.interchange.lora_ia3 import ia3_from, ia3_to, lora_from, lora_to
from softprompt.interchange.prompts import (
    Leaves,
    multitask_from,
    multitask_to,
    prefix_from,
    prefix_to,
    prompt_from,
    prompt_to,
)
from softprompt.methods import METHODS
from softprompt.models import ModelConfig
from softprompt.models.t5_layers import T5Config

# PEFT's type -> (leaves, model, method) -> tensors and config fields.
_WRITE: dict[str, Callable[..., tuple[Leaves, dict[str, Any]]]] = {
    "PROMPT_TUNING": prompt_to,
    "MULTITASK_PROMPT_TUNING": multitask_to,
    "PREFIX_TUNING": prefix_to,
    "LORA": lora_to,
    "IA3": ia3_to,
}
# PEFT's type -> (adapter, model) -> leaves, and the method's keys of a config.
_READ: dict[str, Callable[..., tuple[Leaves, dict[str, Any]]]] = {
    "PROMPT_TUNING": prompt_from,
    "P_TUNING": prompt_from,
    "MULTITASK_PROMPT_TUNING": multitask_from,
    "PREFIX_TUNING": prefix_from,
    "LORA": lora_from,
    "IA3": ia3_from,
}


def to_peft(
    delta: Mapping[str, Any],
    model: ModelConfig,
    method: Mapping[str, Any],
    *,
    base: str | None = None,
    revision: str = "",
    imported: Mapping[str, Any] | None = None,
) -> Adapter:
    """The PEFT adapter that does what a delta does.

    Args:
        delta: a tree of dicts, folded: without what only training needs.
        model: the config of the model that it was trained on.
        method: the method section of the config that trained it.
        base: the name that the file gives the model, None where there is none to give.
        revision: of the model, "" for the default.
        imported: the adapter_config.json that the delta was imported from, if it was.

    Raises:
        UserError: PEFT has no such adapter, or would read it as another.
    """
    leaves: Leaves = {
        path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(delta, sep="/").items()
    }
    name, form, known = method["name"], _peft_fields(method["name"]), imported or {}
    if not form:
        allowed = ", ".join(name for name in METHODS if _peft_fields(name))
        raise UserError(f"method {name!r} cannot be exported to PEFT; allowed: {allowed}")
    check_context(leaves, model, method, reader="PEFT")
    try:
        tensors, fields = _WRITE[form["peft_type"]](leaves, model, method, **_vectors(name))
    except KeyError as missing:
        raise UserError(f"the delta has no leaf {missing}; {name} needs it") from missing
    fields = {**form, **fields}
    if known.get("peft_type") == "P_TUNING" and fields["peft_type"] == "PROMPT_TUNING":
        fields["peft_type"] = "P_TUNING"  # a prompt that another network made
    if leaves:
        raise UserError(
            f"the delta has leaves that PEFT's {fields['peft_type']} has no tensors for: "
            f"{', '.join(leaves)}"
        )
    defaults = {
        "base_model_name_or_path": base,
        "revision": revision or None,
        "task_type": TASKS[isinstance(model, T5Config)],
        "encoder_hidden_size": fields.get("token_dim"),
    }
    config = complete_config(fields, defaults=defaults, imported=known)
    plain = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    return Adapter(config, plain)


def _peft_fields(name: str) -> Mapping[str, Any]:
    """The fields of adapter_config.json that say that an adapter is of a method; {} for none."""
    return getattr(METHODS[name], "PEFT", {})


def _vectors(name: str) -> dict[str, Mapping[str, str]]:
    """The argument `vectors` for a method that has some."""
    found = getattr(METHODS[name], "PEFT_VECTORS", None)
    return {"vectors": found} if found else {}


def check_context(
    leaves: Mapping[str, np.ndarray], model: ModelConfig, method: Mapping[str, Any], *, reader: str
) -> None:
    """Refuses a prompt or prefix that another program would put elsewhere; passes anything else.

    Raises:
        UserError: names the key or the leaves, and what the other program does.
    """
    if not METHODS[method["name"]].Settings.is_context:
        return
    if method["bos"] == "before":
        raise UserError(
            f"config key 'method.bos' is 'before': {reader} puts the prompt first, and BOS behind "
            "it; allowed: after, none"
        )
    if any(leaf.size == 0 for leaf in leaves.values()):
        raise UserError(f"the delta has no vectors (length 0); {reader} has no such prompt")
    if not isinstance(model, T5Config):
        return
    if not METHODS[method["name"]].Settings.is_prompt:
        raise UserError(
            f"a prefix of an encoder-decoder cannot be exported ({', '.join(leaves)}): PEFT knows "
            "those of the decoder's self-attention only, and gives layer n those of layer 2n "
            "modulo L"
        )
    if wrong := sorted(path for path in leaves if not path.startswith("encoder/")):
        raise UserError(
            f"{', '.join(wrong)}: {reader} reads a prompt before the encoder's input only"
        )
    if not method.get("prompt_to_input", True):
        raise UserError(
            f"config key 'method.prompt_to_input' is False: in {reader} prompt and input see each "
            "other; allowed: True"
        )


def from_peft(adapter: Adapter, model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """The delta that does what a PEFT adapter does, and its keys of a config's method section.

    Raises:
        UserError: an adapter of another kind than we compute, or not of this model.
    """
    encoder_decoder = isinstance(model, T5Config)
    name = check_config(adapter.config, encoder_decoder=encoder_decoder, file=adapter.file)
    leaves, method = _READ[adapter.config["peft_type"]](adapter, model, **_vectors(name))
    if not leaves:
        raise UserError(f"{adapter.file}: it adapts no module of this model")
    if not encoder_decoder:
        method.pop("place", None)
    plain = {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves.items()}
    return unflatten_dict(plain, sep="/"), {"name": name, **method}
