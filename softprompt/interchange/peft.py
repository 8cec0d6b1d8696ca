"""PEFT adapters from deltas, and back: pure functions of leaves, model sizes and the method's keys.

Source: the formats of peft 0.21.2, with which the files agree byte for byte but for one key of the
tensors' metadata. PEFT scores a prompt right only where padding stands on the right, or nowhere:
padding on the left comes between the prompt and the text.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.errors import UserError, unknown
from softprompt.interchange.adapter import Adapter
from softprompt.interchange.fields import TASKS, check_fields, complete
from softprompt.interchange.lora_ia3 import ia3_from, ia3_to, lora_from, lora_to
from softprompt.interchange.module_names import Config
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
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config

_REASONS = {
    "adapter": "PEFT has no bottleneck adapters of this form",
    "bitfit": "PEFT has no adapter of biases alone",
    "full": "all weights are no adapter; save the model as a folder instead",
    "none": "it trains nothing",
    "fewshot": "it trains nothing",
}
_READ = {
    "PROMPT_TUNING": prompt_from,
    "P_TUNING": prompt_from,
    "PREFIX_TUNING": prefix_from,
    "MULTITASK_PROMPT_TUNING": multitask_from,
    "LORA": lora_from,
    "IA3": ia3_from,
}
_LIKELY = ("target_modules", "feedforward_modules")


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a delta does not say of itself.

    Attributes:
        model: its sizes.
        method: the method section of the config that trained the delta.
        base: what the model is called.
        revision: of the model, "" for the default.
        origin: the adapter_config.json that the delta was imported from, {} where it was not.
    """

    model: Config
    method: Mapping[str, Any]
    base: str
    revision: str = ""
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def to_peft(delta: Mapping[str, Any], facts: Facts) -> Adapter:
    """The PEFT adapter that does what a delta does.

    Args:
        delta: a tree of dicts, folded: with nothing that only training needs.
        facts: the model and the method.

    Raises:
        UserError: PEFT has no such adapter, or would read it as another.
    """
    leaves: Leaves = {
        path: np.asarray(leaf, np.float32) for path, leaf in flatten_dict(delta, sep="/").items()
    }
    name = facts.method["name"]
    if name in _REASONS:
        raise UserError(f"method {name!r} cannot be exported: {_REASONS[name]}")
    check_contexts(leaves, facts, reader="PEFT")
    try:
        peft_type, tensors, fields = _written(name, leaves, facts)
    except KeyError as missing:
        raise UserError(f"the delta has no leaf {missing}; {name} needs it") from missing
    if leaves:
        raise UserError(
            f"the delta has leaves that PEFT's {peft_type} has no place for: {', '.join(leaves)}"
        )
    likely = {key: fields.pop(key) for key in _LIKELY if key in fields} | {
        "base_model_name_or_path": facts.base,
        "revision": facts.revision or None,
        "task_type": TASKS[isinstance(facts.model, T5Config)],
        "encoder_hidden_size": fields.get("token_dim"),
    }
    config = complete(peft_type, fields, likely, facts.origin)
    plain = {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}
    return Adapter(config, plain)


def _written(name: str, leaves: Leaves, facts: Facts) -> tuple[str, Leaves, dict[str, Any]]:
    """PEFT's type, tensors and config fields; what is read is taken out of `leaves`."""
    if name == "prompt":
        tensors, fields = prompt_to(leaves, facts.model)
        if facts.method.get("reparam") == "mlp":
            return "P_TUNING", tensors, fields | {"encoder_hidden_size": facts.method["bottleneck"]}
        imported = facts.origin.get("peft_type") == "P_TUNING"
        return "P_TUNING" if imported else "PROMPT_TUNING", tensors, fields
    if name == "multitask":
        return "MULTITASK_PROMPT_TUNING", *multitask_to(leaves, facts.model)
    if name == "prefix" and isinstance(facts.model, DecoderConfig):
        return "PREFIX_TUNING", *prefix_to(leaves, facts.model)
    if name == "lora":
        return "LORA", *lora_to(leaves, facts.model, facts.method)
    if name == "ia3":
        return "IA3", *ia3_to(leaves, facts.model)
    raise unknown("method", name, (name for name in METHODS if name not in _REASONS))


def check_contexts(leaves: Mapping[str, np.ndarray], facts: Facts, *, reader: str) -> None:
    """Refuses prompts and prefixes that another program would put elsewhere.

    Raises:
        UserError: names the key or the leaves, and what the other does.
    """
    method = facts.method
    settings = METHODS[method["name"]].Settings
    if not settings.is_context:
        return
    if method["bos"] == "before":
        raise UserError(
            f"config key 'method.bos' is 'before': {reader} puts the prompt first, and BOS behind "
            "it; allowed: after, none"
        )
    if any(leaf.size == 0 for leaf in leaves.values()):
        raise UserError(f"the delta has no vectors (length 0); {reader} has no such prompt")
    if not isinstance(facts.model, T5Config):
        return
    if not settings.is_prompt:
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


def from_peft(adapter: Adapter, model: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """The delta that does what a PEFT adapter does, and its keys of a config's method section.

    Raises:
        UserError: an adapter of another kind than we compute, or not of this model.
    """
    encoder_decoder = isinstance(model, T5Config)
    peft_type = check_fields(adapter.config, encoder_decoder=encoder_decoder, file=adapter.file)
    leaves, method = _READ[peft_type](adapter, model)
    if not leaves:
        raise UserError(f"{adapter.file}: it adapts no module of this model")
    if not encoder_decoder:
        method.pop("place", None)
    plain = {path: np.ascontiguousarray(leaf, np.float32) for path, leaf in leaves.items()}
    return unflatten_dict(plain, sep="/"), method
