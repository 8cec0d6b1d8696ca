"""The fields of adapter_config.json: their defaults, and the values that we can read.

Source: the config classes of peft 0.21.2, which writes every field, in alphabetical order.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from softprompt.errors import UserError, unknown
from softprompt.methods import METHODS

VERSION = "0.21.2"  # of peft, whose format this is

_COMMON: dict[str, Any] = {
    **dict.fromkeys(
        "auto_mapping base_model_name_or_path modules_to_save revision task_type".split()
    ),
    "inference_mode": True,
    "peft_version": VERSION,
}
_PROMPT = _COMMON | dict.fromkeys(
    "num_attention_heads num_layers num_transformer_submodules num_virtual_tokens token_dim".split()
)
_TUNED = {
    **_PROMPT,
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
# PEFT's type -> the fields of its config and their defaults.
FIELDS: dict[str, dict[str, Any]] = {
    "PROMPT_TUNING": _TUNED,
    "P_TUNING": {
        **_PROMPT,
        "encoder_dropout": 0.0,
        "encoder_hidden_size": None,
        "encoder_num_layers": 2,
        "encoder_reparameterization_type": "MLP",
    },
    "PREFIX_TUNING": {
        **_PROMPT,
        "encoder_hidden_size": None,
        "init_weights": None,
        "prefix_projection": False,
    },
    "MULTITASK_PROMPT_TUNING": {
        **_TUNED,
        "num_ranks": 1,
        "num_tasks": 1,
        "prompt_tuning_init_state_dict_path": None,
        "prompt_tuning_init_task": 0,
    },
    "LORA": {
        **_COMMON,
        **dict.fromkeys(
            "alora_invocation_tokens arrow_config corda_config eva_config exclude_modules"
            " kasa_config layer_replication layers_pattern layers_to_transform lora_ga_config"
            " megatron_config monteclora_config target_modules target_parameters"
            " trainable_token_indices use_bdlora velora_config".split()
        ),
        **dict.fromkeys(
            "ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora use_rslora".split(),
            False,
        ),
        "alpha_pattern": {},
        "bias": "none",
        "init_lora_weights": True,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "megatron_core": "megatron.core",
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
    },
    "IA3": {
        **_COMMON,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "feedforward_modules": None,
        "init_ia3_weights": True,
        "target_modules": None,
    },
}

# Fields that change what the tensors mean or add others: read only at the default.
_ONLY_DEFAULT = (
    "modules_to_save alora_invocation_tokens arrow_config kasa_config layer_replication lora_bias"
    " megatron_config monteclora_config target_parameters trainable_token_indices use_bdlora"
    " use_qalora velora_config"
).split()

# Fields that select or scale modules. What we write says that itself, so that an imported adapter's
# are not written again.
_SELECTING = (
    "alpha_pattern bias exclude_modules layers_pattern layers_to_transform rank_pattern".split()
)

# Starts of a LoRA that leave the base model's weights as they are.
_LORA_STARTS = (True, False, "gaussian", "eva", "orthogonal")
TASKS = {False: "CAUSAL_LM", True: "SEQ_2_SEQ_LM"}  # by whether the model is an encoder-decoder


def _is_whole(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except re.error:
        return False


def _is_list(value: Any, check: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_table(value: Any, check: Callable[[Any], bool]) -> bool:
    """Whether a value is a table of patterns, with values that a check accepts."""
    is_table = isinstance(value, dict) and all(map(_is_pattern, value))
    return is_table and all(map(check, value.values()))


def _are_modules(value: Any) -> bool:
    return _is_pattern(value) or _is_list(value, lambda one: isinstance(one, str))


def _are_layers(value: Any) -> bool:
    return type(value) is int or _is_list(value, lambda one: type(one) is int)


# Fields that are read -> a check of their value, and what it allows.
_FORMS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alpha_pattern": (lambda x: _is_table(x, _is_number), "patterns with a number each"),
    "bias": (lambda x: x in ("none", "all", "lora_only"), "'none', 'all', 'lora_only'"),
    "exclude_modules": (_are_modules, "a list of names, or a pattern"),
    "layers_pattern": (lambda x: _is_pattern(x) or _is_list(x, _is_pattern), "patterns"),
    "layers_to_transform": (_are_layers, "layers' numbers"),
    "rank_pattern": (lambda x: _is_table(x, _is_whole), "patterns with a whole number each"),
    "target_modules": (_are_modules, "a list of names, or a pattern"),
}


def complete_config(
    fields: Mapping[str, Any], *, defaults: Mapping[str, Any], imported: Mapping[str, Any]
) -> dict[str, Any]:
    """A whole adapter_config.json, with every field that PEFT writes.

    Args:
        fields: what the delta and the model determine, `peft_type` among them.
        defaults: instead of PEFT's. Keys that this type lacks are left out.
        imported: the adapter_config.json that the delta was imported from, {} where it was not. Its
            other fields are kept, such as how the adapter was initialised.
    """
    known = FIELDS[fields["peft_type"]]
    same_type = imported.get("peft_type") == fields["peft_type"]
    kept = {key: value for key, value in imported.items() if key not in _SELECTING and same_type}
    config = {key: ({**known, **defaults, **kept})[key] for key in known}
    return config | {**fields, "peft_version": VERSION, "inference_mode": True}


def check_config(config: Mapping[str, Any], *, encoder_decoder: bool, file: str) -> str:
    """The name of the method that an adapter_config.json describes.

    Raises:
        UserError: names the field: an unknown type; a task of another kind of model; a field with a
            value, or an unknown field, that changes what the tensors do.
    """
    peft_type, task = config.get("peft_type"), config.get("task_type")
    if not isinstance(peft_type, str) or peft_type not in FIELDS:
        raise UserError(f"{file}: {unknown('peft_type', str(peft_type), FIELDS)}")
    if task not in (None, TASKS[encoder_decoder]):
        kind = "an encoder-decoder" if encoder_decoder else "a decoder"
        raise refuse(file, "task_type", task, f"{TASKS[encoder_decoder]!r} for {kind}")
    fields = FIELDS[peft_type]
    for key, value in config.items():
        if key in _ONLY_DEFAULT and key in fields and (value or None) != (fields[key] or None):
            raise refuse(file, key, value, repr(fields[key]))
        if key not in fields and key not in ("peft_type", "runtime_config") and value:
            raise refuse(file, key, value, "no such field, or none that says anything")
        if key in _FORMS and key in fields and value is not None and not _FORMS[key][0](value):
            raise refuse(file, key, value, _FORMS[key][1])
    start = config.get("init_lora_weights", True)
    if start not in _LORA_STARTS:
        allowed = ", ".join(map(repr, _LORA_STARTS))
        raise refuse(
            file, "init_lora_weights", start, f"{allowed} (others change the base model's weights)"
        )
    return _method({**fields, **config}, file)


def _method(config: Mapping[str, Any], file: str) -> str:
    """The method whose `PEFT` fields a config has.

    Raises:
        UserError: names the field that no method has so.
    """
    # A file of P-tuning holds the prompt that its network made.
    peft_type = {"P_TUNING": "PROMPT_TUNING"}.get(config["peft_type"], config["peft_type"])
    config = {**config, "peft_type": peft_type}
    forms = {name: getattr(method, "PEFT", {}) for name, method in METHODS.items()}
    near = {name: form for name, form in forms.items() if form.get("peft_type") == peft_type}
    for name, form in near.items():
        if all(config[key] == value for key, value in form.items()):
            return name
    (key, *_) = [key for form in near.values() for key, x in form.items() if config[key] != x]
    allowed = " or ".join(repr(form[key]) for form in near.values())
    raise refuse(file, key, config[key], allowed)


def whole_number(config: Mapping[str, Any], key: str, *, file: str) -> int:
    """A field that is a positive whole number.

    Raises:
        UserError: it is not, or it is absent.
    """
    value = config.get(key)
    if not isinstance(value, int) or not _is_whole(value):
        raise refuse(file, key, value, "a whole number from 1")
    return value


def number(config: Mapping[str, Any], key: str, default: float, *, file: str) -> float:
    """A field that is a finite number, `default` where it is absent.

    Raises:
        UserError: it is none.
    """
    value = config.get(key, default)
    if not _is_number(value):
        raise refuse(file, key, value, "a number")
    return value


def pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """What `rank_pattern` or `alpha_pattern` says of the module of this name, else `default`.

    Source: `get_pattern_key` of peft 0.21.2.
    """
    matches = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    return next(matches, default)


def refuse(file: str, key: str, value: Any, allowed: str) -> UserError:
    """The error for a field's value."""
    return UserError(f"{file}: {key} of its config is {value!r}; allowed: {allowed}")
