"""The configuration of a trial: its keys, their values, config files, and the trial's id."""

from softprompt.config.schema import base_config
from softprompt.config.values import (
    ConfigDict,
    coerce,
    differences,
    flatten,
    from_dict,
    members,
    of_task,
    resolve,
    scientific,
    set_key,
    task_names,
    to_dict,
    trial_id,
    trial_name,
    unknown_key,
    validate,
    weights_key,
)

__all__ = [
    "ConfigDict",
    "base_config",
    "coerce",
    "differences",
    "flatten",
    "from_dict",
    "members",
    "of_task",
    "resolve",
    "scientific",
    "set_key",
    "task_names",
    "to_dict",
    "trial_id",
    "trial_name",
    "unknown_key",
    "validate",
    "weights_key",
]
