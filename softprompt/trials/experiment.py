"""Experiments: Python files with `CAPTION`, `sweep(subset)`, `table(rows)` and `figure(rows)`.

Those in `experiments/` are examples. `rows` are the result rows of finished trials.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from softprompt.config import (
    ConfigDict,
    flatten,
    has_effect,
    is_chooser,
    resolve,
    set_key,
    trial_id,
    trial_name,
    validate,
)
from softprompt.config.files import find_file, list_modules, load_module, with_location
from softprompt.errors import UserError, unknown

_FUNCTIONS = ("sweep", "table", "figure")


def load_experiment(name: str) -> ModuleType:
    """Returns an experiment's module.

    Args:
        name: a path, or NAME for experiments/NAME.py in the working directory or the repository.

    Raises:
        UserError: there is no such file (lists the existing ones), or it is not an experiment.
    """
    file = find_file(name if name.endswith(".py") else f"experiments/{name}.py")
    if file is None:
        raise unknown("experiment", name, [Path(path).stem for path in list_modules("experiments")])
    try:
        module = load_module(file)
    except Exception as error:
        raise with_location(error, file) from error
    missing = [name for name in ("CAPTION", *_FUNCTIONS) if not hasattr(module, name)]
    if missing:
        raise UserError(f"{file}: not an experiment: it lacks {', '.join(missing)}")
    if not isinstance(module.CAPTION, str):
        raise UserError(f"{file}: CAPTION is {module.CAPTION!r}; allowed: a string")
    for function in _FUNCTIONS:
        if not callable(value := getattr(module, function)):
            raise UserError(f"{file}: {function} is {value!r}; allowed: a function")
    return module


def call_experiment(
    experiment: ModuleType, function: str, argument: object, *, returns: type
) -> Any:
    """Returns what a function of an experiment returns; a tuple or generator as a list.

    Raises:
        UserError: the function raises an error (names file and line), or its result has another
            type than `returns`.
    """
    file = Path(str(experiment.__file__))
    try:
        result = getattr(experiment, function)(argument)
        result = list(result) if isinstance(result, Iterator | tuple) else result
    except Exception as error:
        raise with_location(error, file) from error
    if not isinstance(result, returns):
        raise UserError(
            f"{file}: {function}() returned {_shortened(result)}; allowed: a {returns.__name__}"
        )
    return result


def _shortened(value: object) -> str:
    """The start of a value's repr, and its type."""
    text = " ".join(repr(value).split())
    return f"{text[:60]}{'...' if len(text) > 60 else ''} ({type(value).__name__})"


def _experiment_configs(experiment: ModuleType, subset: str) -> list[ConfigDict]:
    """Calls an experiment's `sweep`, and checks that it returns configs."""
    configs: list[ConfigDict] = call_experiment(experiment, "sweep", subset, returns=list)
    wrong = [config for config in configs if not isinstance(config, ConfigDict)]
    if wrong or not configs:
        found = f"a list with {_shortened(wrong[0])}" if wrong else "no config"
        raise UserError(
            f"{experiment.__file__}: sweep({subset!r}) returned {found}; allowed: a list of configs"
        )
    return configs


def make_trials(
    experiment: ModuleType,
    subset: str = "full",
    overrides: Sequence[tuple[str, str]] = (),
    *,
    target: str | None = None,
) -> list[ConfigDict]:
    """Returns the resolved and validated configs of an experiment's trials.

    A key that only some methods, initialisers or optimizers use is overridden in the trials that
    use it. Overrides of the method, initialiser and optimizer are applied first.

    Args:
        experiment: see `load_experiment`.
        subset: a named part of it.
        overrides: pairs of keys and values.
        target: the backend to resolve for, "cpu", "gpu" or "tpu", or "" for configs that depend on
            none; None is JAX's own.

    Raises:
        UserError: a wrong subset, key or value, a key that no trial uses, two equal trials, or a
            config that depends on the backend without a target.
    """
    configs = _experiment_configs(experiment, subset)
    for key, value in sorted(overrides, key=lambda pair: not is_chooser(pair[0])):
        readers = [config for config in configs if has_effect(flatten(config), key)]
        for config in readers or configs:
            set_key(config, key, value)
    for config in configs:
        validate(config)
        if target == "" and config.model.dtype == "auto":
            raise UserError(
                f"--target is not given, and model.dtype is 'auto' in {trial_name(config)}; "
                "allowed: cpu, gpu, tpu"
            )
    trials = [resolve(config, backend=target or "") for config in configs]
    check_trials_differ(trials)
    return trials


def check_trials_differ(trials: Sequence[ConfigDict]) -> None:
    """Checks that all of a sweep's configs are different trials.

    Raises:
        UserError: two are the same trial; names their numbers.
    """
    seen: dict[str, int] = {}
    for number, config in enumerate(trials, 1):
        first = seen.setdefault(trial_id(config), number)
        if first != number:
            raise UserError(
                f"trials {first} and {number} of the sweep are the same, {trial_name(config)} "
                f"({trial_id(config)}); a sweep's trials must differ"
            )
