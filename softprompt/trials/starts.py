"""Prompts that start from another trial's: `method.init=file`, `method.init_file=trial:ID`.

The other trial is named by its id, because a path would make this trial's id depend on where
folders are. Its folder is beside this trial's, and it must be done before this one starts.

Source: Vu et al. 2022 (arXiv 2110.07904), section 2, for prompts that start from a source task's.
"""

from collections.abc import Sequence

from etils import epath

from softprompt.config import ConfigDict, flatten, initializer_settings, trial_id
from softprompt.errors import UserError
from softprompt.methods.delta_file import DELTA
from softprompt.methods.initializers import InitializerSettings
from softprompt.results import folders_by_id, is_done

PREFIX = "trial:"


def start_id(config: ConfigDict) -> str:
    """Returns the id of the trial whose prompt a trial starts from; "" if there is none."""
    settings = initializer_settings(config)
    file: str = config.method.init_file if settings is not None and settings.from_file else ""
    return file.removeprefix(PREFIX) if file.startswith(PREFIX) else ""


def located(config: ConfigDict, workdir: epath.Path | None) -> InitializerSettings | None:
    """Returns the settings of a trial's initialiser, with `trial:ID` replaced by that trial's file.

    Args:
        config: of the trial.
        workdir: has the folders of both trials. None if only shapes matter, such as in an estimate,
            which may come before the other trial is done; the settings then have no file.

    Raises:
        UserError: the folder has no finished trial with this id.
    """
    settings, identity = initializer_settings(config), start_id(config)
    if settings is None or not identity:
        return settings
    values = flatten(config)
    if workdir is None:
        return settings.of(values | {"method.init_file": ""})
    folder = folders_by_id(workdir).get(identity)
    if folder is None or not is_done(folder):
        raise UserError(
            f"config key 'method.init_file' is '{PREFIX}{identity}'; allowed: the id of a finished "
            f"trial in {workdir}"
        )
    return settings.of(values | {"method.init_file": str(folder / DELTA)})


def stages(trials: Sequence[ConfigDict]) -> list[list[int]]:
    """Returns the positions of trials in an order in which each comes after the one it starts from.

    A stage has no two trials of which one starts from the other, so its trials may run at the same
    time. Without such trials there is one stage, in the given order.
    """
    positions = {trial_id(config): n for n, config in enumerate(trials)}
    made: list[list[int]] = [[]]
    visited: set[int] = set()

    def visit(n: int) -> None:
        if n in visited:
            return
        visited.add(n)
        first = positions.get(start_id(trials[n]))
        if first is not None:
            visit(first)
            if first in made[-1]:
                made.append([])
        made[-1].append(n)

    for n in range(len(trials)):
        visit(n)
    return made
