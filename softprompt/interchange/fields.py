"""The fields of adapter_config.json: which there are, their defaults, and which we can read.

Source: the config classes of peft 0.21.2, which writes every field, in alphabetical order.
"""

from collections.abc import Mapping
from typing import Any

from softprompt.errors import UserError, unknown

VERSION = "0.21.2"  # of peft, whose format this is

_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "modules_to_save": None,
    "peft_version": VERSION,
    "revision": None,
    "task_type": None,
}
_PROMPT: dict[str, Any] = {
    **_COMMON,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": None,
    "num_virtual_tokens": None,
    "token_dim": None,
}
_TUNED: dict[str, Any] = {
    **_PROMPT,
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "tokenizer_kwargs": None,
    "tokenizer_name_or_path": None,
}
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
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "kasa_config": None,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 8,
        "lora_bias": False,
        "lora_dropout": 0.0,
        "lora_ga_config": None,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "monteclora_config": None,
        "qalora_group_size": 16,
        "r": 8,
        "rank_pattern": {},
        "target_modules": None,
        "target_parameters": None,
        "trainable_token_indices": None,
        "use_bdlora": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
        "velora_config": None,
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

# Fields that change what the tensors mean or add others: read only at the value that is ours.
_FIXED = (
    "modules_to_save",
    "alora_invocation_tokens",
    "alpha_pattern",
    "arrow_config",
    "bias",
    "kasa_config",
    "layer_replication",
    "layers_to_transform",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)

# How a LoRA may start and leave the base model's weights as they were.
_KIND_STARTS = (True, False, "gaussian", "eva", "orthogonal")
TASKS = {False: "CAUSAL_LM", True: "SEQ_2_SEQ_LM"}  # by whether there is an encoder


def complete(
    peft_type: str,
    certain: Mapping[str, Any],
    likely: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """A whole adapter_config.json.

    Args:
        peft_type: a key of `FIELDS`.
        certain: what delta and model say.
        likely: what they suggest where `origin` does not know better.
        origin: the adapter_config.json that the delta was imported from, {} where it was not. It
            keeps what only it knows: how the adapter began, say.
    """
    fields = FIELDS[peft_type]
    known = origin if origin.get("peft_type") == peft_type else {}
    config = {
        **fields,
        **{key: value for key, value in likely.items() if key in fields},
        **{key: value for key, value in known.items() if key in fields},
        **certain,
    }
    return config | {"peft_type": peft_type, "peft_version": VERSION, "inference_mode": True}


def check_fields(config: Mapping[str, Any], *, encoder_decoder: bool, file: str) -> str:
    """The adapter's `peft_type`, once nothing in its config means what we would misread.

    Raises:
        UserError: an unknown type; a task of another kind of model; a field with a value, or an
            unknown field, that changes what the tensors do.
    """
    peft_type = config.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in FIELDS:
        raise UserError(f"{file}: {unknown('peft_type', str(peft_type), FIELDS)}")
    task = config.get("task_type")
    if task not in (None, TASKS[encoder_decoder]):
        kind = "an encoder-decoder" if encoder_decoder else "a decoder"
        raise _refuse(file, "task_type", task, f"{TASKS[encoder_decoder]!r} for {kind}")
    fields = FIELDS[peft_type]
    for key, value in config.items():
        if key in _FIXED and key in fields and (value or None) != (fields[key] or None):
            raise _refuse(file, key, value, repr(fields[key]))
        if key not in fields and key not in ("peft_type", "runtime_config") and value:
            raise _refuse(file, key, value, "no such field, or none that says anything")
    if config.get("init_lora_weights", True) not in _KIND_STARTS:
        raise _refuse(
            file,
            "init_lora_weights",
            config["init_lora_weights"],
            f"{', '.join(map(repr, _KIND_STARTS))} (others change the base model's weights)",
        )
    return peft_type


def whole_number(config: Mapping[str, Any], key: str, *, file: str) -> int:
    """A field that is a positive whole number.

    Raises:
        UserError: it is not, or it is absent.
    """
    value = config.get(key)
    if type(value) is not int or value < 1:
        raise _refuse(file, key, value, "a whole number from 1")
    return value


def number(config: Mapping[str, Any], key: str, default: float, *, file: str) -> float:
    """A field that is a number, `default` where it is absent.

    Raises:
        UserError: it is none.
    """
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise _refuse(file, key, value, "a number")
    return value


def _refuse(file: str, key: str, value: Any, allowed: str) -> UserError:
    return UserError(f"{file}: {key} of its config is {value!r}; allowed: {allowed}")
