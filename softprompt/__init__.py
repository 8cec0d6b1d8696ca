"""Prompt tuning as a scaling study: a frozen language model, a few trained vectors, and sweeps.

`import softprompt as sp` gives the names of `softprompt.api`, each imported when it is first used.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from softprompt.api import (
        Loaded,
        Trial,
        load_model,
        load_trial,
        make_config,
        plot_learning,
        plot_lengths,
        rows,
        sweep,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "Loaded",
    "Trial",
    "load_model",
    "load_trial",
    "make_config",
    "plot_learning",
    "plot_lengths",
    "rows",
    "sweep",
    "train",
]


def __getattr__(name: str) -> Any:
    """Imports the API, which brings JAX, when one of its names is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from softprompt import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
