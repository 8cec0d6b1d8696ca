"""Caches that all trials of a process share: models, encoded data, compiled programs."""

import dataclasses
import functools
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from etils import epath
from jax.sharding import Mesh

from softprompt.config import (
    ConfigDict,
    optimizer_settings,
    task_configs,
    to_dict,
    trial_id,
    weights_key,
)
from softprompt.console import Progress
from softprompt.data.encode import Encoded
from softprompt.errors import UserError
from softprompt.evaluation.perplexity import read_text, text_pieces
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.training.loop import Pauses
from softprompt.training.memory import CACHE_SHARE, bytes_here, device_memory
from softprompt.training.optimizers import OptimizerConfig
from softprompt.training.sharding import Gather, make_mesh, put_weight
from softprompt.training.step import StepCall, StepConfig, StepResult
from softprompt.trials.data import TaskData, TrialData, mixture, read_task
from softprompt.trials.programs import Static, StepProgram, shapes_key

if TYPE_CHECKING:
    from softprompt.trials.engine.sharing import SweepClaims

CACHED_DATA = 8  # encoded tasks and mixtures in the cache


@dataclasses.dataclass
class Session:
    """Caches for the trials of a process.

    Attributes:
        progress: the display.
        programs: the training steps, by their static configuration and shapes.
        compile_seconds: time spent on compiling them for the trial of this session.
        members: the most trials, this one included, that ran at a time.
        pauses: see `softprompt.training.loop.Pauses`.
        claims: the sweep's claims on its trials; None if no other process can run them.
    """

    progress: Progress
    programs: dict[Any, StepProgram] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    members: int = 1
    pauses: Pauses = dataclasses.field(default_factory=Pauses)
    claims: "SweepClaims | None" = None
    _models: "OrderedDict[str, Loaded]" = dataclasses.field(default_factory=OrderedDict)
    _data: "OrderedDict[str, Any]" = dataclasses.field(default_factory=OrderedDict)

    def beside_others(self, progress: Progress) -> "Session":
        """A session with the same caches and another display, for one of several trials."""
        return dataclasses.replace(self, progress=progress, compile_seconds=0.0, members=1)

    def program(
        self, step: StepConfig, optimizer: OptimizerConfig, mesh: Mesh, arguments: tuple[Any, ...]
    ) -> StepProgram:
        """The training step for arguments of these shapes; trials with equal keys share it."""
        static = Static(step, optimizer, mesh)
        return self.programs.setdefault((static, shapes_key(arguments)), StepProgram(static))

    @property
    def compiled(self) -> list[tuple[Any, int]]:
        """The key of each compiled training step, and its number of trials (contract 10)."""
        return [(key, n) for key, program in self.programs.items() for n in program.compiled]

    def step(self, call: StepCall) -> StepResult:
        """Runs the training step of one trial."""
        result: StepResult = call.program.step(call, self.compiling)
        return result

    def run(self, steps: Generator[StepCall, StepResult, Any]) -> Any:
        """Runs each step that a generator asks for; returns what the generator returns."""
        try:
            call = next(steps)
            while True:
                call = steps.send(self.step(call))
        except StopIteration as end:
            return end.value
        finally:
            steps.close()

    def claimed(self, config: ConfigDict, folder: epath.PathLike) -> AbstractContextManager[None]:
        """Claims a trial for the duration of a block.

        Raises:
            Locked: another process holds it.
        """
        return self.claims.claimed(trial_id(config), folder) if self.claims else nullcontext()

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Times a compilation for this trial."""
        self.progress.stage("compile the training step")
        began = time.monotonic()
        with self.pauses():
            yield
        self.compile_seconds += time.monotonic() - began

    def mesh(self, config: ConfigDict) -> Mesh:
        """The device mesh of a config."""
        return make_mesh(config.mesh.data, config.mesh.model)

    def model(self, config: ConfigDict) -> Loaded:
        """The frozen model of a resolved config, on its mesh.

        Before another is loaded, the least recently used models are dropped until the rest take
        at most `CACHE_SHARE` of a device's memory. A model stays in memory as long as a trial
        refers to it.
        """
        key = weights_key(config)
        if key not in self._models:
            self._make_room()
            self._models[key] = self._load(config)
        self._models.move_to_end(key)
        return self._models[key]

    def add_model(self, config: ConfigDict, loaded: Loaded) -> None:
        """Takes a model that is loaded already, for this config and those with equal weights."""
        self._models[weights_key(config)] = loaded

    def _make_room(self) -> None:
        """Drops the least recently used models until the rest take at most `CACHE_SHARE`."""
        sizes = {name: bytes_here(one.weights) for name, one in self._models.items()}
        for name in list(sizes):
            if sum(sizes.values()) > CACHE_SHARE * device_memory():
                del self._models[name], sizes[name]

    def _load(self, config: ConfigDict) -> Loaded:
        """Loads a model onto the config's mesh."""
        mesh, model = self.mesh(config), config.model
        self.progress.stage(f"load {model.name}")
        loaded = load_model(
            model.name,
            dtype=model.dtype,
            quantize=model.quantize,
            put=functools.partial(put_weight, mesh, weights=config.mesh.weights),
            revision=model.revision,
            tokenizer_name=model.tokenizer,
        )
        if config.mesh.weights == "replicated":
            return loaded
        return dataclasses.replace(loaded, model=loaded.model.clone(gather=Gather(mesh)))

    def release(self, config: ConfigDict) -> None:
        """Frees the memory of a model's weights; the next trial loads them again."""
        loaded = self._models.pop(weights_key(config), None)
        if loaded is not None:
            loaded.weights.clear()

    def data(self, config: ConfigDict, *, bos: bool) -> TrialData:
        """The encoded data of a config's task or mixture; with `bos` each text begins with BOS."""
        key = ["data", *_tokenizer(config), to_dict(config.task), to_dict(config.data), bos]
        return self._cached(
            key, lambda: mixture([self._task(one, bos=bos) for one in task_configs(config)])
        )

    def _task(self, config: ConfigDict, *, bos: bool) -> TaskData:
        """The encoded splits of one task, which several mixtures may share."""

        def read() -> TaskData:
            loaded = self.model(config)
            self.progress.stage(f"read {config.task.name}")
            return read_task(config, loaded, bos=bos, say=self.progress.say)

        key = ["task", *_tokenizer(config), to_dict(config.task), to_dict(config.data), bos]
        return self._cached(key, read)

    def text(self, config: ConfigDict, *, bos: bool) -> Encoded:
        """The pieces of `eval.text`.

        Raises:
            UserError: see `read_text` and `text_pieces`; or the model is an encoder-decoder.
        """
        loaded, name, tokens = self.model(config), config.eval.text, config.eval.text_tokens
        if loaded.encoder_decoder:
            raise UserError(
                f"config key 'eval.text' is {name!r}; allowed: '' for an encoder-decoder, which "
                "predicts no plain text"
            )

        def read() -> Encoded:
            return text_pieces(loaded.tokenizer, read_text(name), tokens=tokens, bos=bos)

        return self._cached(["text", *_tokenizer(config), name, tokens, bos], read)

    def _cached(self, key: list[Any], make: Callable[[], Any]) -> Any:
        """Caches results of `make` for the `CACHED_DATA` most recently used keys (JSON)."""
        name = json.dumps(key, sort_keys=True)
        if name not in self._data:
            self._data[name] = make()
        self._data.move_to_end(name)
        while len(self._data) > CACHED_DATA:
            self._data.popitem(last=False)
        return self._data[name]


def _tokenizer(config: ConfigDict) -> list[str]:
    """A key that identifies a config's tokenizer."""
    return [config.model.name, config.model.revision, config.model.tokenizer]


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """The static part of a config's optimizer."""
    o, rule = config.optimizer, optimizer_settings(config)
    return OptimizerConfig(rule, o.weight_decay, o.clip, o.max_row_norm > 0, config.train.ema)
