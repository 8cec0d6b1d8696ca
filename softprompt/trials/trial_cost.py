"""The cost of a trial of a catalogued model at full size, from shapes: no weights and no data.

Every input has `task.max_input` tokens and every target `task.max_target`, so costs are bounds. The
training step is traced with the config's real shapes, its optimizer and its dropout.
"""

import functools
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import models as backends

from softprompt.config import ConfigDict, resolve, to_dict, trial_name
from softprompt.console import Progress
from softprompt.data.builtin_tasks import get_task
from softprompt.data.encode import Encoded
from softprompt.data.tasks import Task
from softprompt.errors import UserError, nearest
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.loading import Loaded, make_model
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.training.optimizers import make_optimizer
from softprompt.training.step import train_step
from softprompt.trials.data import TaskData, TrialData
from softprompt.trials.estimate import delta_size, estimate, step_memory
from softprompt.trials.prepare import delta_shapes, prepare, train_source, trial_dropout
from softprompt.trials.session import Session, optimizer_config
from softprompt.trials.shape_check import GIB, SLICES, abstract_weights, choose_placement

# A chip of Cloud TPU v5e. Source: https://cloud.google.com/tpu/docs/v5e.
PEAK = 197e12  # FLOP/s in bfloat16
SHARE = 0.4  # of the peak, assumed to be reached

DEVELOPMENT = 1000  # development examples of a task for which the paper states no number
CANDIDATES = 16  # of an example that has its own candidates, such as ReCoRD's entities


class ShapeSession(Session):
    """A session whose models are shapes, and whose examples are as long as the config allows."""

    def model(self, config: ConfigDict) -> Loaded:
        """The shapes of a catalogued model.

        Raises:
            UserError: the catalogue does not have it.
        """
        name = config.model.name
        if name not in CATALOG:
            raise UserError(
                f"config key 'model.name' is {name!r}{nearest(name, CATALOG)}; allowed for a dry "
                "run: models of the catalogue (softprompt models)"
            )
        sizes = CATALOG[name].config
        encoder_decoder = isinstance(sizes, T5Config)
        words = Backend(backends.WordLevel({str(n): n for n in range(sizes.vocab)}))
        tokenizer = Tokenizer(words, 0, 1, add_bos=False, add_eos=encoder_decoder)
        return Loaded(
            make_model(sizes, "bfloat16"), abstract_weights(sizes), tokenizer, "", name, sizes
        )

    def data(self, config: ConfigDict, *, bos: bool) -> TrialData:
        """Examples of the longest inputs and targets of a config's task."""
        del bos

        def make() -> TrialData:
            task = get_task(config.task)
            development = task.counts[1] if task.counts else DEVELOPMENT
            train = longest(config, task, 4 * config.train.batch)
            test = longest(config, task, development)
            return TrialData((TaskData(task, train, test, test),), train)

        return self._cached(["longest", to_dict(config)], make)


def longest(config: ConfigDict, task: Task, count: int) -> Encoded:
    """`count` examples of a task with the longest inputs and targets that a config allows."""
    input_T = np.zeros(config.task.max_input, np.int32)
    targets = [np.full(config.task.max_target, n, np.int32) for n in range(CANDIDATES)]
    labels, own = len(task.verbalizers), targets if task.candidates_field else []
    return Encoded(
        ids=[str(n) for n in range(count)],
        inputs=[input_T] * count,
        targets=targets[:1] * count,
        labels=np.zeros(count, np.int32),
        candidates=tuple(targets[:labels]),
        truncated=0,
        label_names=task.labels,
        eos=config.task.eos,
        choices=(tuple(str(n) for n in range(CANDIDATES)),) * count if own else (),
        choice_ids=(tuple(own),) * count if own else (),
        words=tuple(targets[: len(task.words)]),
    )


def trial_cost(config: ConfigDict) -> dict[str, Any]:
    """Traces a trial's training step at full size and states its cost.

    Args:
        config: of one task and a catalogued model.

    Returns:
        name, model, frozen and trained parameters, steps, batch, the longest input and target,
        slice and placement on it, bytes of a chip ("weight_bytes", "delta_bytes",
        "activation_bytes"), "fits", "flops" of training and all evaluations, and "chip_hours" on
        v5e at `SHARE` of its peak.

    Raises:
        UserError: the model is not in the catalogue, or see `prepare`.
    """
    config = resolve(config, backend="tpu")
    session = ShapeSession(Progress())
    prepared = prepare(config, session)
    tx, delta = make_optimizer(optimizer_config(config)), delta_shapes(prepared)
    source = train_source(prepared)
    step = functools.partial(train_step, config=prepared.step, tx=tx)
    state, frozen = jax.eval_shape(tx.init, delta), prepared.frozen
    jax.eval_shape(step, delta, state, frozen, source[0], trial_dropout(prepared))
    costs = estimate(config, session)
    slice_, parameters = SLICES[0], CATALOG[config.model.name].parameters
    placement = choose_placement(prepared.loaded.config, slice_)
    count, delta_bytes = delta_size(prepared)
    activations = step_memory(prepared, source.template.shape) / placement.data
    used = placement.weight_bytes + delta_bytes + activations
    return {
        "name": trial_name(config),
        "model": config.model.name,
        "frozen": parameters,
        "trained": count,
        "steps": config.train.steps,
        "batch": config.train.batch,
        "input": config.task.max_input,
        "target": config.task.max_target,
        "slice": slice_.name,
        "chip_bytes": slice_.memory,
        "placement": f"{placement.data} x {placement.model}, {placement.weights}",
        "weight_bytes": placement.weight_bytes,
        "delta_bytes": delta_bytes,
        "activation_bytes": activations,
        "fits": used <= slice_.memory,
        "flops": costs["flops"],
        "chip_hours": costs["flops"] / (PEAK * SHARE) / 3600,
    }


def report(config: ConfigDict) -> list[str]:
    """The lines that `train --dry-run` prints."""
    found = trial_cost(config)
    sizes = [found[f"{part}_bytes"] / GIB for part in ("weight", "delta", "activation")]
    room = "fits" if found["fits"] else "does not fit without compute.remat=layer or microbatches"
    return [
        f"trial   {found['name']}: {found['trained']:,} parameters on {found['model']}, "
        f"{found['frozen']:,}",
        f"steps   {found['steps']:,} of {found['batch']} examples, of {found['input']} tokens and "
        f"{found['target']} of the target at most (the step was traced at these sizes)",
        f"memory  {found['slice']} as {found['placement']}: {sizes[0]:.2f} GiB of weights, "
        f"{sizes[1]:.2f} of prompt and optimizer and {sizes[2]:.2f} of activations a chip of "
        f"{found['chip_bytes'] / GIB:.0f}: {room}",
        f"cost    {found['flops']:.2e} operations with evaluations at most: "
        f"{found['chip_hours']:.1f} chip-hours of v5e at {SHARE:.0%} of its peak of "
        f"{PEAK / 1e12:.0f} TFLOP/s",
    ]
