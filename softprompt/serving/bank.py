"""The tasks of a frozen model: deltas in memory, and a cache of their keys and values."""

import dataclasses
import functools
import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from softprompt.config import (
    ConfigDict,
    base_config,
    method_settings,
    set_key,
    task_configs,
    to_dict,
)
from softprompt.errors import UserError
from softprompt.evaluation.ranking import shared_function
from softprompt.inference.pool import padded
from softprompt.inference.pool_programs import Lane, pad_context
from softprompt.interchange.adapter_files import CONFIG as ADAPTER_CONFIG
from softprompt.interchange.adapter_files import TENSORS, check_finite, read_adapter
from softprompt.interchange.peft import from_peft
from softprompt.methods import METHODS
from softprompt.methods.base import Setup, wants_bos
from softprompt.methods.delta_file import load_delta
from softprompt.models.decoder import Context, Decoder
from softprompt.pretrained.loading import Loaded
from softprompt.pretrained.tensor_files import open_file
from softprompt.serving.placement import Kind, kind_of
from softprompt.serving.requests import TaskInfo
from softprompt.training.step import StepConfig
from softprompt.trials.convert import check_tasks, with_method
from softprompt.trials.delta_checks import check_fit, check_weights
from softprompt.trials.run import CONFIG, DELTA, check_trained, read_config

DTYPES = ("F32", "F16", "F64")  # of a trial's tensors; an adapter's may be BF16 too
MOST_BYTES = 1 << 30  # of a delta's file


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedTask:
    """A task as it was when it was loaded; loading it again makes another `LoadedTask`.

    Attributes:
        info: facts about it.
        kind: tasks of one kind share pools.
        bos: its texts begin with BOS.
        folder: of a trial; None for the base model and for an adapter.
        files: what `digest_files` gave when the trial was loaded.
        member: the name of the trial's task, if the trial has a prompt for each of several.
        make: computes the lane.
    """

    info: TaskInfo
    kind: Kind
    bos: bool
    folder: Path | None
    files: str
    member: str | None
    make: Callable[[], Lane]


@dataclasses.dataclass(frozen=True)
class Stored:
    """A delta on the host, with the config of its method, and its file's size.

    `files` is what `digest_files` gives for a trial, and "" for an adapter.
    """

    config: ConfigDict
    delta: dict[str, Any]
    size: int
    files: str


class Bank:
    """Computes lanes, and keeps the last used ones.

    Args:
        loaded: the frozen model, a decoder.
        limit: the most bytes of lanes to keep.

    Attributes:
        loaded: the frozen model.
        model: its Flax module.

    Raises:
        UserError: the model is an encoder-decoder.
    """

    def __init__(self, loaded: Loaded, *, limit: int = 1 << 30) -> None:
        if not isinstance(loaded.model, Decoder):
            raise UserError(f"model {loaded.name!r} is an encoder-decoder; allowed: a decoder")
        self.loaded, self.model, self._limit = loaded, loaded.model, limit
        self._lanes: OrderedDict[str, Lane] = OrderedDict()
        self._lock = threading.Lock()
        empty = pad_context(self.model.empty_context(), 0)
        digest = _digest(loaded, {}, "base")
        info = TaskInfo("", "none", loaded.name, 0, 0, 0, time.time(), digest)
        bos = wants_bos("after", loaded.tokenizer)
        lane = Lane(empty, {})
        self.base = LoadedTask(
            info, kind_of(lane), bos, None, "", None, lambda: jax.device_put(lane)
        )

    @property
    def bytes(self) -> int:
        """Bytes of the lanes that are kept."""
        return sum(map(lane_bytes, list(self._lanes.values())))  # the engine's thread may add one

    def lane(self, task: LoadedTask) -> Lane:
        """The lane of a task, from the cache or computed."""
        return self._lane(task.info.digest, task.make)

    def _lane(self, digest: str, make: Callable[[], Lane]) -> Lane:
        with self._lock:
            if digest in self._lanes:
                self._lanes.move_to_end(digest)
                return self._lanes[digest]
        lane = make()
        with self._lock:
            self._lanes[digest] = lane
            while self.bytes > self._limit and len(self._lanes) > 1:
                self._lanes.popitem(last=False)
        return lane

    def read(self, name: str, folder: Path) -> list[LoadedTask]:
        """Reads a task's folder: of a trial, or of a PEFT adapter in safetensors.

        A trial with a prompt for each of its tasks gives tasks NAME:TASK.

        Raises:
            UserError: the file lacks a leaf or has others than its method; it is too large, has
                other dtypes or entries that are not finite; it was trained on other weights; or its
                method trains weights.
        """
        stored = self._adapter(folder) if (folder / ADAPTER_CONFIG).exists() else self._run(folder)
        settings, names = method_settings(stored.config), task_configs(stored.config)
        setup = Setup(
            sizes=self.loaded.config,
            tasks=len(names),
            room=self.loaded.config.context_length,
            loaded=self.loaded,
        )
        cfg = METHODS[settings.name].resolve(settings, setup)
        step = StepConfig(self.loaded.model, settings.name, cfg)
        if not settings.per_task:
            return [self._task(name, folder, stored, step, None)]
        return [
            self._task(f"{name}:{one.task.name}", folder, stored, step, number)
            for number, one in enumerate(names)
        ]

    def _task(
        self, name: str, folder: Path, stored: Stored, step: StepConfig, number: int | None
    ) -> LoadedTask:
        settings = method_settings(stored.config)
        make = functools.partial(make_lane, self.loaded.weights, step, stored.delta, number)
        method = json.dumps([to_dict(stored.config)["method"], number], sort_keys=True)
        digest = _digest(self.loaded, stored.delta, method)
        lane = self._lane(digest, make)
        info = TaskInfo(
            name=name,
            method=settings.name,
            model=self.loaded.name,
            length=int(lane.context.used or 0),
            bytes_file=stored.size,
            bytes_cache=lane_bytes(lane),
            loaded_at=time.time(),
            digest=digest,
        )
        bos = wants_bos(settings.bos, self.loaded.tokenizer) and not settings.begins_with_bos
        member = None if number is None else task_configs(stored.config)[number].task.name
        trial = folder if stored.files else None
        return LoadedTask(info, kind_of(lane), bos, trial, stored.files, member, make)

    def _run(self, folder: Path) -> Stored:
        """A trial's selected delta."""
        config, file = read_config(folder), folder / DELTA
        if config.model.tokenizer:
            raise UserError(
                f"{folder}: config key 'model.tokenizer' is {config.model.tokenizer!r}; allowed: "
                f"'', the tokenizer of {self.loaded.name}"
            )
        settings = method_settings(config)
        if settings.trains_weights or not settings.trains:
            raise UserError(
                f"{folder}: method {settings.name!r} cannot be served; allowed: methods that train "
                "something beside the weights"
            )
        check_trained(folder)
        check_fit(header(file, DTYPES), config, self.loaded.config, file=str(file))
        files = digest_files(folder)  # before the delta is read: a change meanwhile is noticed
        delta, origin = load_delta(file)
        check_weights(file, origin.get("fingerprint", self.loaded.fingerprint), self.loaded)
        check_finite(file, flatten_dict(delta, sep="/"))
        return Stored(config, delta, file.stat().st_size, files)

    def _adapter(self, folder: Path) -> Stored:
        """A PEFT adapter's delta."""
        file = folder / TENSORS
        if not file.exists():
            raise UserError(f"{folder}: no {TENSORS}; adapters are read from safetensors only")
        header(file, (*DTYPES, "BF16"))
        adapter = read_adapter(folder)
        trained = adapter.provenance.get("fingerprint", self.loaded.fingerprint)
        check_weights(file, trained, self.loaded)
        delta, method = from_peft(adapter, self.loaded.config)
        config = base_config()
        set_key(config, "model.name", self.loaded.name)
        config = with_method(config, method, adapter.provenance, file=str(folder))
        check_tasks(config, delta, file=str(folder))
        check_fit(delta, config, self.loaded.config, file=str(file))
        return Stored(config, delta, file.stat().st_size, "")


def make_lane(weights: Any, step: StepConfig, delta: Any, number: int | None) -> Lane:
    """Computes a delta's context and variables; `number` selects one of several prompts."""
    variables, context = shared_function(step, None)(delta, weights)
    if number is not None:
        part = slice(number * context.slots, (number + 1) * context.slots)
        context = Context(context.k_LPGK[:, part], context.v_LPGK[:, part])
    if METHODS[step.method].Settings.is_context:
        variables = {}  # rows read the context only
    lane: Lane = jax.device_put(Lane(pad_context(context, padded(context.slots)), variables))
    return lane


def lane_bytes(lane: Lane) -> int:
    """Bytes of a lane's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(lane))


def header(file: Path, dtypes: Sequence[str]) -> dict[str, Any]:
    """The shapes of a safetensors file's tensors; only its header is read.

    Raises:
        UserError: the file is too large, or has a tensor of another dtype than `dtypes`.
    """
    if (size := file.stat().st_size) > MOST_BYTES:
        raise UserError(f"{file} has {size:,} bytes; allowed: {MOST_BYTES:,}")
    tensors = open_file(file).tensors
    for path, (dtype, _) in tensors.items():
        if dtype not in dtypes:
            raise UserError(f"{file}: {path} is {dtype}; allowed: {', '.join(dtypes)}")
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, (_, shape) in tensors.items()}
    return dict(unflatten_dict(shapes, sep="/"))


def digest_files(folder: Path) -> str:
    """Identifies the config and the delta that a trial's folder holds now."""
    files = [file for file in (folder / CONFIG, folder / DELTA) if file.exists()]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _digest(loaded: Loaded, delta: Any, method: str) -> str:
    """Identifies a delta, its method's settings, the weights and the dtype."""
    found = hashlib.sha256(f"{loaded.fingerprint} {loaded.model.dtype} {method}".encode())
    for path, leaf in sorted(flatten_dict(delta, sep="/").items()):
        found.update(f"{path} {leaf.shape} {leaf.dtype}".encode())
        found.update(np.ascontiguousarray(leaf).data)
    return found.hexdigest()
