"""A trial's configuration: its keys and their values, config files, and the trial's id."""

from softprompt.config.checks import has_effect, is_chooser
from softprompt.config.schema import KEYS, base_config
from softprompt.config.values import (
    RENAMED,
    ConfigDict,
    differences,
    flatten,
    from_dict,
    initializer_settings,
    method_settings,
    optimizer_settings,
    resolve,
    runs_alone,
    scientific,
    set_key,
    task_config,
    task_configs,
    task_names,
    to_dict,
    transfers,
    trial_id,
    trial_name,
    unknown_key,
    validate,
    weights_key,
    with_new_names,
)
from softprompt.settings import coerce
