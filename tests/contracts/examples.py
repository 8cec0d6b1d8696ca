"""What the contracts are tested on: random and real examples, and small trials."""

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from softprompt.config import ConfigDict, base_config, set_key
from softprompt.console import Progress
from softprompt.data.encode import Encoded, encode
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch
from softprompt.data.rows import TrainBatch
from softprompt.data.sources import Record
from softprompt.data.tasks import Task
from softprompt.methods.initializers import vocabulary
from softprompt.methods.prompt import PromptConfig, init
from softprompt.models.decoder import Decoder
from softprompt.models.quantize import embedding
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.training.step import StepConfig, loss_fn, row_logits, shared_part
from softprompt.trials.session import Session

SNIPPETS = Task(
    name="snippets",
    source="",
    template="Review: {text}\nSentiment:",
    verbalizers={"negative": " negative", "positive": " positive", "neither": " not so sure"},
)
LENGTHS, TARGETS = (7, 13, 2, 21, 5, 9), (1, 3, 2, 1, 4, 2)


def random_examples(
    lengths: Sequence[int] = LENGTHS, targets: Sequence[int] = TARGETS, *, vocab: int = 320
) -> Encoded:
    """Examples of random tokens, with three candidates of 1, 3 and 2 tokens."""
    random = np.random.default_rng(5)

    def tokens(length: int) -> np.ndarray:
        return random.integers(0, vocab, length, np.int32)

    return Encoded(
        ids=[f"id{n}" for n in range(len(lengths))],
        inputs=[tokens(n) for n in lengths],
        targets=[tokens(n) for n in targets],
        labels=np.arange(len(lengths), dtype=np.int32) % 3,
        candidates=(tokens(1), tokens(3), tokens(2)),
        truncated=0,
    )


def snippets(shared_data: Path, tokenizer: Tokenizer, count: int) -> Encoded:
    """Real movie snippets, their labels taking turns."""
    lines = (shared_data / "sst2" / "stsa.binary.test").read_text().splitlines()[:count]
    labels = SNIPPETS.labels
    records: list[Record] = [
        {"id": str(n), "text": line[2:], "label": labels[n % len(labels)]}
        for n, line in enumerate(lines)
    ]
    sizes = {"max_input": 64, "max_target": 8}
    return encode(records, SNIPPETS, tokenizer, **sizes, bos=False, eos=False)


def packed(
    encoded: Encoded, rows: Sequence[Sequence[int]], shape: RowShape | None = None
) -> TrainBatch:
    """A training batch with these examples in these rows; by default as short as can be."""
    examples_B = np.array([n for row in rows for n in row])
    rows_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    if shape is None:
        sizes = [len(encoded.inputs[n]) + len(encoded.targets[n]) - 1 for n in examples_B]
        targets = [len(encoded.targets[n]) for n in examples_B]
        shape = RowShape(len(rows), *(int(np.bincount(rows_B, p).max()) for p in (sizes, targets)))
    return train_batch(encoded, examples_B, rows_B, shape)


def double(batch: TrainBatch) -> TrainBatch:
    """The batch with weights exact in float64: the pipeline's are float32."""
    used_RM = (batch.loss_weights > 0).astype(np.float64)
    return dataclasses.replace(batch, loss_weights=used_RM / used_RM.sum())


def prompted(
    model: Decoder, weights: Any, length: int, *, seed: int = 0, **step: Any
) -> tuple[StepConfig, dict[str, jax.Array]]:
    """A step with a prompt of sampled rows, moved a little off the vocabulary; and the delta."""
    bos_before = step.pop("bos_before", None)
    ids = range(model.config.vocab)
    cfg = PromptConfig(length, bos_before, vocabulary(ids), model.config.embed_scale)
    key = jax.random.key(seed)
    delta = init(key, model, weights, cfg)
    prompt_PD = delta["prompt"]
    scale = 0.3 * jnp.std(embedding(weights["embed"]))
    noise_PD = scale * jax.random.normal(key, prompt_PD.shape, prompt_PD.dtype)
    return StepConfig(model, "prompt", cfg, **step), {"prompt": prompt_PD + noise_PD}


@functools.partial(jax.jit, static_argnames="config")
def logits(config: StepConfig, delta: Any, weights: Any, batch: TrainBatch) -> jax.Array:
    """Logits [R, M, V] of a batch."""
    return row_logits(config.model, weights, shared_part(config, delta, weights), batch.rows)


@functools.partial(jax.jit, static_argnames="config")
def logits_and_loss(
    config: StepConfig, delta: Any, weights: Any, batch: TrainBatch
) -> tuple[jax.Array, jax.Array]:
    """Logits [R, M, V] of a batch, and its loss."""
    logits_RMV = row_logits(config.model, weights, shared_part(config, delta, weights), batch.rows)
    return logits_RMV, loss_fn(delta, weights, batch, None, config=config)[0]


def by_example(
    encoded: Encoded, rows: Sequence[Sequence[int]], logits_RMV: jax.Array
) -> Iterator[tuple[int, np.ndarray]]:
    """Each example of some rows with the logits [targets, V] of its target tokens."""
    for row, logits_MV in zip(rows, np.asarray(logits_RMV), strict=False):
        first = 0
        for n in row:
            yield n, logits_MV[first : first + len(encoded.targets[n])]
            first += len(encoded.targets[n])


def one_device() -> Mesh:
    """A mesh of one device, whatever the test run has."""
    axes = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=axes, devices=jax.devices()[:1])


def write_task(folder: Path) -> str:
    """Writes small labelled splits as JSONL; returns their source."""
    random = np.random.default_rng(0)
    words = {
        "pos": ["funny", "warm", "moving", "good"],
        "neg": ["thin", "old", "mess", "dull"],
        "": ["a film", "the plot", "this movie", "and", "the ending is", "very"],
    }
    for split, count in {"train": 40, "validation": 12, "test": 12}.items():
        lines = []
        for n in range(count):
            label = ("neg", "pos")[n % 2]
            some = random.choice(words[label] + words[""], random.integers(2, 9))
            lines.append(json.dumps({"id": f"{split}{n}", "text": " ".join(some), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return f"jsonl:{folder}/{{split}}.jsonl"


def trial_config(model: Path, source: str, **changes: Any) -> ConfigDict:
    """A trial of a few steps on a tiny model; `changes` are dotted keys with "__" for "."."""
    config = base_config()
    settings = {
        "model.name": str(model),
        "model.dtype": "float32",
        "task.name": "own",
        "task.source": source,
        "task.template": "Review: {text}\nSentiment:",
        "task.verbalizers": {"neg": " negative", "pos": " positive"},
        "task.id_field": "id",
        "task.max_input": 64,
        "task.max_target": 8,
        "method.length": 5,
        "train.steps": 4,
        "train.batch": 8,
        "log.every": 1,
        "log.checkpoint_every": 2,
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in settings.items():
        set_key(config, key, value)
    return config


def two_tasks(source: str) -> str:
    """A mixture of `trial_config`'s task and another, of the same texts with other answers."""
    other = {
        "name": "other",
        "source": source,
        "template": "{text}\nGood:",
        "verbalizers": {"neg": " not at all", "pos": " yes"},
        "id_field": "id",
    }
    return json.dumps(["own", other])


class OneDevice(Session):
    """A session on one device, whatever the test run has."""

    def mesh(self, config: ConfigDict) -> Mesh:
        """The same mesh for every config."""
        return one_device()


@contextmanager
def session() -> Iterator[Session]:
    """A fresh session that reports to standard error; its programs are not optimised either."""
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        with Progress() as progress:
            yield OneDevice(progress)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


def cut(encoded: Encoded, order: Sequence[int]) -> Encoded:
    """These examples, in this order."""
    return dataclasses.replace(
        encoded,
        ids=[encoded.ids[n] for n in order],
        inputs=[encoded.inputs[n] for n in order],
        targets=[encoded.targets[n] for n in order],
        labels=encoded.labels[list(order)],
    )


def equations(tree: Any) -> Iterator[Any]:
    """The equations of all programs (jaxprs) in a tree, whatever they are nested in."""
    for leaf in jax.tree.leaves(tree):
        for equation in getattr(getattr(leaf, "jaxpr", leaf), "eqns", ()):
            yield equation
            yield from equations(equation.params)
