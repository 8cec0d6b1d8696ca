"""One adapter in PEFT and here, with the same examples: what training makes of both."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict

from softprompt.data.encode import Encoded
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch, train_lengths
from softprompt.data.rows import DECODER_LAYOUT, RowLayout, TrainBatch
from softprompt.interchange.adapter_files import Adapter, read_adapter
from softprompt.interchange.peft import from_peft
from softprompt.interchange.prompts import ROWS
from softprompt.models.t5 import T5
from softprompt.training import optimizers
from softprompt.training.optimizers import OptimizerConfig, make_optimizer, set_rate
from softprompt.training.step import StepConfig, loss_fn, train_step
from tests.interchange.cases import Case
from tests.interchange.methods import CONFIGS

DECAY = 0.1
OPTIMIZERS = {
    "sgd": lambda parameters, rate: torch.optim.SGD(parameters, rate, weight_decay=DECAY),
    "adamw": lambda parameters, rate: torch.optim.AdamW(parameters, rate, weight_decay=DECAY),
}


@dataclasses.dataclass(frozen=True)
class Pair:
    """An adapter on both sides.

    Attributes:
        theirs: PEFT's model, which its optimizer updates in place.
        saved: the adapter that PEFT wrote before any training.
        step: our step.
        weights: our frozen weights.
        batches: per step, our packed rows and the arguments of PEFT's model, taken in turns.
    """

    theirs: Any
    saved: Adapter
    step: StepConfig
    weights: Any
    batches: list[tuple[TrainBatch, dict[str, torch.Tensor]]]

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What PEFT trains, by the names that its files have."""
        found = {n: p for n, p in self.theirs.named_parameters() if p.requires_grad}
        return {
            ROWS if n.startswith("prompt_encoder.") else _file_name(n): p for n, p in found.items()
        }

    def delta(self, tensors: dict[str, torch.Tensor] | None = None) -> Any:
        """Our delta of these tensors (of a file, or of gradients); by default, of the first."""
        arrays = {n: t.detach().numpy().copy() for n, t in (tensors or {}).items()}
        adapter = dataclasses.replace(self.saved, tensors=arrays or self.saved.tensors)
        return from_peft(adapter, self.step.model.config)[0]


def _file_name(parameter: str) -> str:
    """What PEFT calls a parameter in its files: DoRA's vector is no weight there."""
    name = parameter.replace(".default", "")
    return name.removesuffix(".weight") if "lora_magnitude_vector" in name else name


def pair(
    theirs: Any, case: Case, folder: Path, ours: tuple[Any, Any], batches: list[Encoded]
) -> Pair:
    """Both sides of a model of PEFT, which is saved in `folder` and read from there.

    Args:
        theirs: the model.
        case: what it was made with.
        folder: a new one.
        ours: our model and its weights.
        batches: the examples of each step, all of as many.
    """
    theirs.save_pretrained(folder)
    model, weights = ours
    slots = case.method["length"] if case.method["name"] == "prompt" else 0
    layout = DECODER_LAYOUT
    if isinstance(model, T5):
        layout = RowLayout(model.config.start, input_slots=slots)
    step = StepConfig(model, case.method["name"], CONFIGS[case.method["name"]](case))
    side = [padded(encoded, seq2seq=layout.encoder) for encoded in batches]
    both = list(zip(rows(batches, layout), side, strict=True))
    return Pair(theirs, read_adapter(folder), step, weights, both)


def rows(batches: Sequence[Encoded], layout: RowLayout) -> Iterator[TrainBatch]:
    """Two rows a batch, of one shape: the first half of the examples and the rest."""
    examples_B = np.arange(len(batches[0].ids))
    rows_B = examples_B * 2 // len(examples_B)
    sums = [[np.bincount(rows_B, n) for n in train_lengths(one, layout)] for one in batches]
    tokens, targets = np.max(sums, axis=(0, 2)).astype(int).tolist()
    shape = RowShape(2, tokens, targets, int(np.bincount(rows_B).max()))
    for encoded in batches:
        yield train_batch(encoded, examples_B, rows_B, shape, layout)


def padded(encoded: Encoded, *, seq2seq: bool) -> dict[str, torch.Tensor]:
    """An example a row, padding on the right, as Hugging Face's collators make them."""
    examples = list(zip(encoded.inputs, encoded.targets, strict=True))
    tokens = [x for x, _ in examples] if seq2seq else [np.concatenate(one) for one in examples]
    labels = [y if seq2seq else np.concatenate([np.full(len(x), -100), y]) for x, y in examples]
    return {
        "input_ids": _square(tokens, 0),
        "attention_mask": _square([np.ones(len(x)) for x in tokens], 0),
        "labels": _square(labels, -100),
    }


def _square(values: Sequence[np.ndarray], fill: int) -> torch.Tensor:
    longest = max(map(len, values))
    made = [np.pad(x, (0, longest - len(x)), constant_values=fill) for x in values]
    return torch.tensor(np.stack(made), dtype=torch.long)


def gradients(both: Pair) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Ours and PEFT's at the first step, by the paths of our delta's leaves."""
    batch, arguments = both.batches[0]
    loss = jax.jit(jax.grad(functools.partial(loss_fn, config=both.step), has_aux=True))
    ours, _ = loss(both.delta(), both.weights, batch, None)
    both.theirs.zero_grad()
    both.theirs(**arguments).loss.backward()
    found = {n: p.grad for n, p in both.parameters.items() if p.grad is not None}
    return _flat(ours), _flat(both.delta(found))


def train_ours(
    both: Pair, *, optimizer: str, rate: float, steps: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The loss of every step, and the leaves that remain."""
    tx = make_optimizer(OptimizerConfig(optimizers.OPTIMIZERS[optimizer](), DECAY))
    delta = jax.tree.map(jax.numpy.asarray, both.delta())
    state = set_rate(tx.init(delta), np.float32(rate))
    step = jax.jit(functools.partial(train_step, config=both.step, tx=tx))
    losses = []
    for n in range(steps):
        batch, _ = both.batches[n % len(both.batches)]
        delta, state, metrics = step(delta, state, both.weights, batch, None)
        losses.append(float(metrics["loss"]))
    return losses, _flat(delta)


def train_theirs(
    both: Pair, *, optimizer: str, rate: float, steps: int
) -> tuple[list[float], dict[str, np.ndarray]]:
    """The same of PEFT's."""
    parameters = both.parameters
    update = OPTIMIZERS[optimizer](parameters.values(), rate)
    losses = []
    for n in range(steps):
        _, arguments = both.batches[n % len(both.batches)]
        update.zero_grad()
        loss = both.theirs(**arguments).loss
        loss.backward()
        update.step()
        losses.append(float(loss.detach()))
    return losses, _flat(both.delta(parameters))


def _flat(tree: Any) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_dict(tree, sep="/").items()}


def apart(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    """Leaf by leaf, the norm of the difference by the norm of theirs."""
    assert ours.keys() == theirs.keys()
    norm = np.linalg.norm
    return {n: float(norm(ours[n] - theirs[n]) / norm(theirs[n])) for n in theirs}


def moved_apart(
    first: Any, ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]
) -> dict[str, float]:
    """Leaf by leaf, the norm of the difference by how far theirs moved from the first delta."""
    start = _flat(first)
    return apart({n: ours[n] - start[n] for n in start}, {n: theirs[n] - start[n] for n in start})
