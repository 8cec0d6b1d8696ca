"""What the trials of one process share: loaded models, encoded data, compiled programs."""

import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from softprompt.config import ConfigDict, members, to_dict, weights_key
from softprompt.console import Progress
from softprompt.data.encode import Encoded, encode, mix, summary
from softprompt.data.eval_batches import EvalBatch, EvalShape, eval_batches, eval_shape
from softprompt.data.packing import Template
from softprompt.data.pipeline import TrainSource, train_template
from softprompt.data.rows import Layout
from softprompt.data.sources import Record
from softprompt.data.subsets import balanced_subset, seeded_sample
from softprompt.data.tasks import Task, get_task, read_split
from softprompt.evaluation.perplexity import config_text
from softprompt.evaluation.ranking import scoring_budget
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.training.memory import KEPT_SHARE, bytes_here, device_memory
from softprompt.training.optimizers import OptimizerConfig, make_optimizer
from softprompt.training.sharding import (
    Gather,
    by_device,
    by_row,
    lies_over_data,
    make_mesh,
    put_weight,
    replicated,
)
from softprompt.training.step import StepConfig, TrainStep, train_step
from softprompt.trials.population import Member, Population, population_step

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class TaskData:
    """A task's splits as token ids, and the shapes that they are packed into."""

    task: Task
    train: Encoded
    validation: Encoded
    test: Encoded

    def split(self, name: str) -> Encoded:
        """The split of this name: train, validation or test."""
        return {"train": self.train, "validation": self.validation, "test": self.test}[name]

    def numbered(self, number: int) -> "TaskData":
        """The same as task `number` of a mixture."""
        splits = [self.split(name) for name in SPLITS]
        tasks = [np.full(len(one.ids), number, np.int32) for one in splits]
        pairs = zip(splits, tasks, strict=True)
        return TaskData(self.task, *(dataclasses.replace(s, tasks=t) for s, t in pairs))


@dataclasses.dataclass
class Session:
    """Caches for trials that run one after another; each thing is made once.

    Attributes:
        progress: where waiting is reported.
        compiled: compiled training steps by all that is static in them; its length is the number of
            compilations (contract 10).
        compile_seconds: spent on them.
        population: of the trials that run at a time; None for a trial alone.
    """

    progress: Progress
    compiled: dict[Any, Any] = dataclasses.field(default_factory=dict)
    compile_seconds: float = 0.0
    population: Population | None = None
    _made: dict[str, Any] = dataclasses.field(default_factory=dict)
    _models: dict[str, Loaded] = dataclasses.field(default_factory=dict)  # used last, stands last
    _lock: Any = dataclasses.field(default_factory=threading.RLock)

    def member(self, progress: Progress, population: Population) -> "Session":
        """The same caches for a trial that runs in a thread of its own, beside others."""
        return dataclasses.replace(self, progress=progress, population=population)

    @contextmanager
    def alone(self, mesh: Mesh) -> Iterator[None]:
        """Within the block no other trial starts a program on several devices.

        Programs that communicate must start in one order on all of them.
        """
        with self.population.door if self.population and mesh.size > 1 else nullcontext():
            yield

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for this key (JSON) the first time."""
        name = json.dumps(key, sort_keys=True)
        with self._lock:
            if name not in self._made:
                self._made[name] = make()
            return self._made[name]

    def mesh(self, config: ConfigDict) -> Mesh:
        """The device mesh of a config."""
        return make_mesh(config.mesh.data, config.mesh.model)

    def model(self, config: ConfigDict) -> Loaded:
        """The frozen model of a resolved config, on its mesh.

        Before another is loaded, those that were used longest ago are forgotten until the rest take
        no more than `KEPT_SHARE` of a device's memory; a trial that still holds one keeps it there.
        """
        key = weights_key(config)
        with self._lock:
            sizes = {name: bytes_here(one.weights) for name, one in self._models.items()}
            for name in list(sizes) if key not in sizes else ():
                if sum(sizes.values()) > KEPT_SHARE * device_memory():
                    del self._models[name], sizes[name]
            loaded = self._models.pop(key, None) or self._load(config)
            self._models[key] = loaded
        return loaded

    def _load(self, config: ConfigDict) -> Loaded:
        """Reads a model from where it lies."""
        mesh, model = self.mesh(config), config.model
        self.progress.stage(f"load {model.name}")
        loaded = load_model(
            model.name,
            dtype=model.dtype,
            quantize=model.quantize,
            put=functools.partial(put_weight, mesh, weights=config.mesh.weights),
            revision=model.revision or None,
            tokenizer_name=model.tokenizer,
        )
        if config.mesh.weights == "replicated":
            return loaded
        return dataclasses.replace(loaded, model=loaded.model.clone(gather=Gather(mesh)))

    def release(self, config: ConfigDict) -> None:
        """Drops a model's weights from memory; the next trial loads them anew."""
        loaded = self._models.pop(weights_key(config), None)
        if loaded is not None:
            loaded.weights.clear()

    def data(self, config: ConfigDict, *, bos: bool) -> TaskData:
        """The task's splits, cut to the config's sizes and tokenised for its model.

        Args:
            config: a resolved config.
            bos: whether each text begins with the tokenizer's BOS.

        An encoder-decoder's inputs end with EOS where its tokenizer says that they do.
        """
        key = ["data", *_tokenizer(config), to_dict(config.task), to_dict(config.data), bos]
        return self.once(key, lambda: self._encode(config, bos))

    def text(self, config: ConfigDict, *, bos: bool) -> Encoded:
        """The pieces of the config's text: see `config_text`."""
        key = ["text", *_tokenizer(config), config.eval.text, config.eval.text_tokens, bos]
        return self.once(key, lambda: config_text(config, self.model(config), bos=bos))

    def mixture(self, config: ConfigDict, *, bos: bool) -> tuple[tuple[TaskData, ...], Encoded]:
        """The data of each of a config's tasks, numbered, and the examples that are trained on."""
        configs = members(config)
        tasks = [self.data(one, bos=bos) for one in configs]
        if not config.data.mixture:
            return tuple(tasks), tasks[0].train
        names = [one.task.name for one in configs]

        def make() -> tuple[tuple[TaskData, ...], Encoded]:
            mixed = mix(dict(zip(names, (one.train for one in tasks), strict=True)))
            return tuple(one.numbered(n) for n, one in enumerate(tasks)), mixed

        return self.once(["mixture", names, *map(id, tasks)], make)

    def _encode(self, config: ConfigDict, bos: bool) -> TaskData:
        """Reads, cuts and tokenises the splits."""
        task, sizes, loaded = get_task(config.task), config.data, self.model(config)
        self.progress.stage(f"read {task.name}")
        splits = {}
        for name in SPLITS:
            records = read_split(task, name)
            if name == "train" and sizes.train_examples:
                records = balanced_subset(records, sizes.train_examples, sizes.subset_seed)
            if name == "train" and 0 < sizes.cap < len(records):
                records = balanced_subset(records, sizes.cap, sizes.subset_seed)
            limit = {"validation": sizes.validation_examples, "test": sizes.test_examples}
            records = seeded_sample(records, limit.get(name, 0))
            splits[name] = encode_records(config, loaded, task, records, bos=bos)
            self.progress.say(f"{task.name} {name}: {describe(splits[name])}")
        return TaskData(task, **splits)

    def template(self, config: ConfigDict, train: Encoded, layout: Layout) -> Template:
        """The packing of the training split: shapes depend on the data alone, not on a seed."""
        examples = config.train.batch

        def make() -> Template:
            made = train_template(train, examples=examples, layout=layout)
            shape, fill = made.shape, TrainSource(train, made, 0, layout).epoch_fill()
            self.progress.say(
                f"{examples} examples a step in {shape.rows} rows of {shape.tokens} tokens, "
                f"{fill:.1%} full"
            )
            return made

        return self.once(["template", id(train), examples, *dataclasses.astuple(layout)], make)

    def eval_batches(
        self,
        tasks: Sequence[TaskData],
        split: str,
        *,
        mesh: Mesh,
        layout: Layout,
        deltas: int = 1,
    ) -> list[list[EvalBatch]]:
        """A split of each task packed for rank scoring; all validations and tests share a shape.

        With several `deltas` side by side a batch has so much fewer rows.
        """
        shape = self.eval_shape(tasks, split, mesh=mesh, layout=layout, deltas=deltas)
        key = [*map(id, tasks), *dataclasses.astuple(layout), *dataclasses.astuple(shape)]
        return self.once(
            ["eval", split, *key],
            lambda: [eval_batches(one.split(split), shape, layout=layout) for one in tasks],
        )

    def eval_shape(
        self,
        tasks: Sequence[TaskData],
        split: str,
        *,
        mesh: Mesh,
        layout: Layout,
        deltas: int = 1,
    ) -> EvalShape:
        """The shape of `eval_batches`: of validation, test and the split that is scored."""
        rows, splits = mesh.shape["data"], sorted({"validation", "test", split})
        key = ["shape", *map(id, tasks), splits, rows, deltas, *dataclasses.astuple(layout)]
        return self.once(
            key,
            lambda: eval_shape(
                *(one.split(name) for one in tasks for name in splits),
                budget=scoring_budget() // deltas,
                row_multiple=rows,
                layout=layout,
            ),
        )

    def train_step(
        self, step: StepConfig, optimizer: OptimizerConfig, mesh: Mesh, arguments: tuple[Any, ...]
    ) -> TrainStep:
        """The compiled training step for arguments of these shapes, compiled at its first use."""
        key = (step, optimizer, mesh, *_shapes(arguments))
        if self.population is None or self.population.apart:
            return self._compiled(key, lambda: compile_step(step, optimizer, mesh, arguments))

        def compile_for(members: int) -> Any:
            return self._compiled(
                (key, members),
                lambda: compile_population(step, optimizer, mesh, arguments, members),
            )

        return self.population.join(key, compile_for, self.progress.say)

    def _compiled(self, key: Any, compile: Callable[[], Any]) -> Any:
        """A program, compiled where there is none yet; by one of several threads that want it."""
        with self._lock:
            if key not in self.compiled:
                self.progress.stage("compile the training step")
                began = time.monotonic()
                self.compiled[key] = compile()
                self.compile_seconds += time.monotonic() - began
            return self.compiled[key]


def _tokenizer(config: ConfigDict) -> list[str]:
    """What tells one tokenizer from another."""
    return [config.model.name, config.model.revision, config.model.tokenizer]


def _shapes(arguments: Any) -> tuple[Any, ...]:
    """Of all arrays, and how they are put together: a key's structure says what is dropped."""
    leaves, structure = jax.tree.flatten(arguments)
    return (structure, *((a.shape, str(a.dtype)) for a in leaves))


def encode_records(
    config: ConfigDict, loaded: Loaded, task: Task, records: Sequence[Record], *, bos: bool
) -> Encoded:
    """Records as a model's token ids, by the config's `task` section."""
    return encode(
        records,
        task,
        loaded.tokenizer,
        max_input=config.task.max_input,
        max_target=config.task.max_target,
        bos=bos,
        eos=config.task.eos,
        input_eos=loaded.encoder_decoder and loaded.tokenizer.add_eos,
    )


def describe(encoded: Encoded) -> str:
    """One line on a split: examples, labels, lengths, and what had to be cut."""
    facts = summary(encoded)
    labels = [f"{count:,} {label}" for label, count in facts["labels"].items()]
    if facts["unlabelled"]:
        labels.append(f"{facts['unlabelled']:,} unlabelled")
    return (
        f"{facts['examples']:,} examples ({', '.join(labels)}), {facts['input_tokens_mean']:.0f} "
        f"tokens on average and {facts['input_tokens_max']} at most, {facts['truncated']} truncated"
    )


def compile_step(
    step: StepConfig, optimizer: OptimizerConfig, mesh: Mesh, arguments: tuple[Any, ...]
) -> TrainStep:
    """Compiles the training step: everything keeps its shards, rows lie over "data".

    Delta and optimizer state are donated. `arguments` are (delta, opt_state, weights, batch, key),
    arrays or shapes with shardings.
    """
    whole = replicated(mesh)
    function = _step(step, optimizer, mesh, arguments)
    kept = [jax.tree.map(functools.partial(_where, whole), tree) for tree in arguments[:2]]
    jitted = jax.jit(
        function,
        donate_argnums=(0, 1),
        in_shardings=(*kept, None, by_row(mesh), whole),
        out_shardings=(*kept, whole),
    )
    return jitted.lower(*arguments).compile()


def compile_population(
    step: StepConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    members: int,
) -> Any:
    """Compiles `population_step` for so many members, each with arguments like these.

    Where the members divide by the mesh's data axis, each device along it takes whole trials, which
    need nothing of one another; else each takes some rows of every trial. Nothing is donated: a
    member's arguments stand in for those of a trial that is over.
    """
    whole, rows = replicated(mesh), by_row(mesh)
    delta, opt_state, weights, batch, key = arguments
    over = members % mesh.shape["data"] == 0 and not lies_over_data((delta, weights))
    function = _step(step, optimizer, mesh, arguments, spread=not over)
    where: Any = Member(whole, whole, rows, whole)  # type: ignore[arg-type]
    jitted = jax.jit(
        functools.partial(population_step, step=function, along=rows if over else None),
        in_shardings=([where] * members, None),
        out_shardings=whole,
    )
    return jitted.lower([Member(delta, opt_state, batch, key)] * members, weights).compile()


def _step(
    step: StepConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh,
    arguments: tuple[Any, ...],
    *,
    spread: bool = True,
) -> TrainStep:
    """The function of a step on a mesh; `spread`: each device sums over its own rows."""
    function = functools.partial(train_step, config=step, tx=make_optimizer(optimizer))
    whole = mesh.shape["data"] == 1 or lies_over_data((arguments[0], arguments[2]))
    return functools.partial(function, spread=by_device(mesh)) if spread and not whole else function


def _where(whole: Any, leaf: Any) -> Any:
    """An array's sharding; `whole` for what has none, as a number of the host."""
    return getattr(leaf, "sharding", None) or whole


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """The static half of a config's optimizer."""
    o = config.optimizer
    return OptimizerConfig(
        name=o.name,
        weight_decay=o.weight_decay,
        clip=o.clip,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        momentum=o.momentum,
        decay_rate=o.decay_rate,
        factored=o.factored,
        factored_min=o.factored_min,
        start_step=o.start_step,
        cap_rows=o.max_row_norm > 0,
        ema=config.train.ema,
    )
