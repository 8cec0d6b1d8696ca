"""Answers by a trial's own template, as `softprompt predict` gives them."""

import threading
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import jax

from softprompt.config import to_dict
from softprompt.console import Progress
from softprompt.errors import UserError
from softprompt.pretrained.loading import Loaded
from softprompt.serving.bank import LoadedTask, digest_files
from softprompt.trials.evaluate import Predictor, on_this_machine
from softprompt.trials.run import read_config
from softprompt.trials.session import Session


class Predictions:
    """Answers texts of tasks; a trial is prepared when its first texts come.

    Args:
        loaded: the engine's model. Trials that name it with its dtype use the same weights; others
            load their own.
        progress: the display.
    """

    def __init__(self, loaded: Loaded, progress: Progress) -> None:
        self._loaded, self._session = loaded, Session(progress)
        self._predictors: WeakKeyDictionary[LoadedTask, Predictor] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def __call__(self, task: LoadedTask, texts: Sequence[str]) -> list[dict[str, Any]]:
        """See `Predictor.predict`.

        Raises:
            UserError: the task is not a trial, or its folder has changed since it was loaded.
        """
        if task.folder is None:
            raise UserError(f"task {task.info.name!r} has no template; allowed: a trial")
        with self._lock:
            if task not in self._predictors:
                if digest_files(task.folder) != task.files:
                    raise UserError(
                        f"task {task.info.name!r}: its folder has changed since it was loaded; "
                        "load it again"
                    )
                config = on_this_machine(read_config(task.folder))
                if self._same_weights(config):
                    self._session.add_model(config, self._loaded)
                self._predictors[task] = Predictor(
                    task.folder, self._session.progress, task=task.member, session=self._session
                )
            return list(self._predictors[task].predict(texts))

    def _same_weights(self, config: Any) -> bool:
        """Whether a trial's config names the engine's model as it is loaded."""
        name, dtype = self._loaded.name, self._loaded.model.dtype.name
        ours = {"name": name, "dtype": dtype, "revision": "", "quantize": "none", "tokenizer": ""}
        return to_dict(config.model) == ours and jax.device_count() == 1
