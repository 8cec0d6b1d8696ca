"""A trial's configuration: its keys and their values, config files, and the trial's id."""

from softprompt.config.checks import chooses, reads
from softprompt.config.schema import KEYS, base_config
from softprompt.config.values import (
    RENAMED,
    ConfigDict,
    differences,
    flatten,
    from_dict,
    method_settings,
    of_task,
    optimizer_settings,
    resolve,
    runs_alone,
    scientific,
    set_key,
    start_settings,
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
