"""Checks the catalogue's models at full size without weights: shapes, shardings and memory.

A prompt-tuning step is traced by `jax.eval_shape` with a model's real shapes. A scanned stack of
layers is traced once, whatever its depth, so XXL takes no longer than small. Every leaf must have a
sharding rule. Meshes are abstract, so no accelerator is needed.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from softprompt.console import print_columns
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import empty_batch
from softprompt.data.rows import DECODER_LAYOUT, RowLayout, TrainBatch
from softprompt.methods import METHODS, initializers
from softprompt.methods.prompt import PromptConfig
from softprompt.models import T5, Decoder, Model, ModelConfig
from softprompt.models.shapes import leaf_dtype, leaf_shapes
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.catalog import Entry, select
from softprompt.training.optimizers import Adafactor, OptimizerConfig, make_optimizer
from softprompt.training.sharding import Gather, make_mesh, weight_shardings, weight_spec
from softprompt.training.step import StepConfig, train_step
from softprompt.trials.programs import compile_step

Tree = Any
# P, R, T and M of the step that is checked; a T5's encoder reads P + T.
PROMPT, ROWS, TOKENS, TARGETS = 100, 32, 512, 8
DTYPE = jnp.dtype("bfloat16")
OPTIMIZER = OptimizerConfig(Adafactor())
ALLOWANCE = 0.25  # of a chip's memory, for activations, gathered weights, the program and XLA
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class ReferenceSlice:
    """A Cloud TPU slice: its number of chips, and the bytes of memory of each."""

    name: str
    chips: int
    memory: int


# Source: https://cloud.google.com/tpu/docs/v5e and /v4.
SLICES = (ReferenceSlice("v5e-16", 16, 16 * GIB), ReferenceSlice("v4-128", 64, 32 * GIB))


@dataclasses.dataclass(frozen=True)
class Placement:
    """The mesh and the sharding of a model's weights on a slice.

    Attributes:
        data: devices along "data".
        model: devices along "model".
        weights: as in `config.mesh.weights`.
        weight_bytes: bytes of the weights on a device.
        fits: whether weights, delta and optimizer state leave the allowance free.
    """

    data: int
    model: int
    weights: str
    weight_bytes: int
    fits: bool


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step's static configuration and the shapes of its arguments."""

    static: StepConfig
    arguments: tuple[Tree, ...]

    @property
    def trained(self) -> int:
        """Parameters of the delta."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.arguments[0]))

    @property
    def trained_bytes(self) -> int:
        """Bytes of delta and optimizer state, which are replicated."""
        leaves = jax.tree.leaves(self.arguments[:2])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def abstract_step(config: ModelConfig) -> Step:
    """A prompt-tuning step of a model of these sizes, with weights in bfloat16, as shapes only.

    T5's prompt is prepended to the encoder's input, as in the paper.
    """
    model: Model
    stacks: tuple[str, ...] = ()
    if isinstance(config, T5Config):
        model, stacks, layout = T5(config, DTYPE), ("encoder",), RowLayout(0, input_slots=PROMPT)
    else:
        model, layout = Decoder(config, DTYPE), DECODER_LAYOUT
    prompt = PromptConfig(PROMPT, initializer=initializers.uniform(), stacks=stacks)
    init = functools.partial(METHODS["prompt"].init, model=model, cfg=prompt)
    weights, key = abstract_weights(config), jax.eval_shape(lambda: jax.random.key(0))
    delta = jax.eval_shape(lambda key, weights: init(key, weights=weights), key, weights)
    state = jax.eval_shape(make_optimizer(OPTIMIZER).init, delta)
    step = StepConfig(model, "prompt", prompt)
    return Step(step, (delta, state, weights, abstract_batch(layout), None))


def abstract_weights(config: ModelConfig) -> Tree:
    """The tree of the frozen weights' shapes and dtypes."""
    leaves = {
        path: jax.ShapeDtypeStruct(shape, leaf_dtype(path, DTYPE))
        for path, shape in leaf_shapes(config).items()
    }
    return unflatten_dict(leaves, sep="/")


def abstract_batch(layout: RowLayout) -> TrainBatch:
    """The shapes of a step's batch, one example in each row."""
    batch = empty_batch(RowShape(ROWS, TOKENS + layout.input_slots, TARGETS, examples=1), layout)
    shapes: TrainBatch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    return shapes


@functools.cache
def check_shapes(config: ModelConfig) -> Step:
    """Traces the step of a model of these sizes with its real shapes.

    Raises:
        UserError: a leaf of the weights has no sharding rule.
        Exception: an error of Flax or JAX about incompatible shapes.
    """
    for path, shape in leaf_shapes(config).items():
        weight_spec(path, shape, AbstractMesh((1, 1), ("data", "model")))
    step = abstract_step(config)
    function = functools.partial(train_step, config=step.static, tx=make_optimizer(OPTIMIZER))
    delta, state, metrics = jax.eval_shape(function, *step.arguments)
    assert jax.tree.all(jax.tree.map(_alike, (delta, state), step.arguments[:2]))
    assert all(value.shape == () for value in metrics.values())
    return step


def _alike(a: Any, b: Any) -> bool:
    return (a.shape, a.dtype) == (b.shape, b.dtype)


def choose_placement(config: ModelConfig, slice_: ReferenceSlice) -> Placement:
    """The first placement that fits: 1, 2, 4, ... chips along "model", else sharded weights.

    "model" is at most the side of a square mesh, since each doubling sends the activations of every
    layer to more chips. After that, the weights are sharded over both axes of the square. There are
    at most as many chips along "data" as rows.
    """
    trained = check_shapes(config).trained_bytes
    side = math.isqrt(slice_.chips)
    ways = [(slice_.chips // 2**n, 2**n, "replicated") for n in range(side.bit_length())]
    for data, model, weights in [*ways, (side, side, "sharded")]:
        size = device_bytes(config, data=data, model=model, weights=weights)
        fits = data <= ROWS and size + trained <= (1 - ALLOWANCE) * slice_.memory
        if fits:
            break
    return Placement(data, model, weights, size, fits)


def device_bytes(config: ModelConfig, *, data: int, model: int, weights: str) -> int:
    """Bytes of the weights that one device of a mesh holds."""
    mesh = AbstractMesh((data, model), ("data", "model"))
    total = 0
    for path, shape in leaf_shapes(config).items():
        spec = weight_spec(path, shape, mesh, weights=weights)
        part = NamedSharding(mesh, spec).shard_shape(shape)
        total += math.prod(part) * leaf_dtype(path, DTYPE).itemsize
    return total


def compiled(config: ModelConfig, mesh: Mesh, weights: str, *, remat: str = "layer") -> Any:
    """Compiles the step from shapes for a mesh of this machine; devices run a row at a time."""
    delta, state, frozen, batch, dropout = abstract_step(config).arguments
    shardings = weight_shardings(frozen, mesh, weights=weights)
    frozen = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        frozen,
        shardings,
    )
    static = abstract_step(config).static
    static = static._replace(
        model=static.model.clone(
            remat=remat, gather=Gather(mesh) if weights == "sharded" else None
        ),
        microbatches=ROWS // mesh.shape["data"],
    )
    return compile_step(static, OPTIMIZER, mesh, (delta, state, frozen, batch, dropout))


def report(entries: Sequence[Entry]) -> list[str]:
    """Checks the entries and prints a line for each; returns a line for each failure."""
    lines, failed = [], []
    for entry in entries:
        try:
            step = check_shapes(entry.config)
        except Exception as error:  # any error; the other models are still checked
            failed.append(f"{entry.name}: {' '.join(str(error).split())[:300]}")
            continue
        placements = [choose_placement(entry.config, slice_) for slice_ in SLICES]
        counts = (f"{entry.parameters:,}", f"{step.trained:,}")
        lines.append((entry.name, *counts, *map(_describe, placements)))
    slices = [f"{s.name} ({s.chips} x {s.memory // GIB} GiB)" for s in SLICES]
    print_columns(("NAME", "PARAMETERS", "TRAINED", *slices), lines)
    return failed


def _describe(placement: Placement) -> str:
    size = f"{placement.weight_bytes / GIB:6.2f} GiB"
    fits = "" if placement.fits else "  DOES NOT FIT"
    return f"{size} a chip, {placement.data}x{placement.model} {placement.weights}{fits}"


def report_memory(entries: Sequence[Entry]) -> None:
    """Compiles the largest model of each kind that fits the first slice; prints its memory."""
    slice_ = SLICES[0]
    mesh_of = functools.partial(make_mesh, devices=jax.devices()[: slice_.chips])
    for kind in dict.fromkeys(entry.kind for entry in entries):
        fitting = [e for e in entries if e.kind == kind and choose_placement(e.config, slice_).fits]
        if not fitting:
            continue
        entry = max(fitting, key=lambda entry: entry.parameters)
        chosen = choose_placement(entry.config, slice_)
        step = compiled(entry.config, mesh_of(chosen.data, chosen.model), chosen.weights)
        sizes = step.memory_analysis()
        print(
            f"{entry.name} compiled for {chosen.data}x{chosen.model} {chosen.weights}, a row a "
            "device at a time, remat=layer: "
            f"{sizes.argument_size_in_bytes / GIB:.2f} GiB of arguments and "
            f"{sizes.temp_size_in_bytes / GIB:.2f} GiB of temporaries a device, of "
            f"{slice_.memory // GIB} (XLA for CPU devices)"
        )


def virtual_devices() -> None:
    """Makes JAX use as many CPU devices as the first slice has chips; call before other use."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", SLICES[0].chips)


def run(names: Sequence[str]) -> int:
    """Checks the models with these names (see `select`), prints the report, returns the exit code.

    It uses no accelerator: XLA compiles for virtual CPU devices.

    Raises:
        UserError: an unknown name.
    """
    entries = select(names)
    virtual_devices()
    failed = report(entries)
    print(
        f"A training step of {ROWS} rows of {TOKENS} tokens, {PROMPT} prompt vectors, Adafactor, "
        f"weights in {DTYPE.name}. A chip's weights are those of a (data x model) mesh; they fit "
        f"where prompt and optimizer state leave {ALLOWANCE:.0%} of its memory to the program, "
        "gathered layers, and the activations of a row at a time (train.microbatches) with "
        "compute.remat=layer."
    )
    report_memory([e for e in entries if not any(f.startswith(f"{e.name}: ") for f in failed)])
    for line in failed:
        print(f"softprompt: {line}", file=sys.stderr)
    return 1 if failed else 0
