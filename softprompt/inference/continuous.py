"""Greedy generation with continuous batching: an ended row makes room for the next input."""

from collections import deque
from typing import Any

from softprompt.inference.batches import MULTIPLE
from softprompt.inference.decode import Inputs, Report, check_inputs
from softprompt.inference.pool import Joining, Pool, RowIndex, Tree
from softprompt.inference.pool_programs import Grid, Lane, pad_context
from softprompt.models.decoder import Decoder


def generate_in_pool(
    model: Decoder,
    weights: Tree,
    shared: tuple[Tree, Any],
    inputs: Inputs,
    *,
    max_new: int,
    eos_id: int | None,
    batch: int = 32,
    progress: Report = lambda done, total: None,
) -> list[list[int]]:
    """Generates what `generate` generates greedily, in a pool of one lane on one device.

    A batch of `generate` runs until its longest output ends. Here short inputs come first, and as
    soon as a quarter of the rows is free, the next inputs join.

    Args:
        model: a decoder.
        weights: its frozen weights.
        shared: the method's variables and a single context.
        inputs: token ids of each example.
        max_new: the most tokens to generate.
        eos_id: the token that ends an output, and is removed; None: `max_new` tokens.
        batch: rows of the pool, at most.
        progress: called with the number of finished examples and of all examples.

    Returns:
        Generated ids of each example.

    Raises:
        UserError: an empty input, or one that overruns the model's context.
    """
    check_inputs(model, shared[1], inputs, max_new)
    if not len(inputs):
        return []
    pool = _pool(model, weights, shared, inputs, max_new=max_new, batch=batch)
    return _run(pool, inputs, max_new=max_new, eos_id=eos_id, progress=progress)


def _pool(
    model: Decoder,
    weights: Tree,
    shared: tuple[Tree, Any],
    inputs: Inputs,
    *,
    max_new: int,
    batch: int,
) -> Pool:
    """A pool of one lane, for all inputs."""
    variables, context = dict(shared[0]), shared[1]
    weights = {**weights, **variables.pop("params", {})}  # not to be copied into the lane
    lane = Lane(pad_context(context, context.slots), variables)
    sizes = sorted({-(-len(tokens) // MULTIPLE) * MULTIPLE for tokens in inputs})
    rows = min(batch, 1 << (len(inputs) - 1).bit_length())
    columns = max(max_new - 1, 1)  # the last token is not run
    grid = Grid(1, rows, sizes[-1], columns, together=max(1, rows // 4))
    pool = Pool(model, weights, lane, grid, sizes)
    pool.set_lane(0, lane)
    return pool


def _run(
    pool: Pool, inputs: Inputs, *, max_new: int, eos_id: int | None, progress: Report
) -> list[list[int]]:
    """The outputs of inputs, short inputs first."""
    together = pool.grid.together
    waiting = deque(sorted(range(len(inputs)), key=lambda example: len(inputs[example])))
    outputs: list[list[int]] = [[] for _ in inputs]
    running: dict[RowIndex, int] = {}

    def take(slot: RowIndex, token: int) -> None:
        """Adds a row's next token to its output; the row leaves where it ends."""
        output = outputs[running[slot]]
        if token != eos_id:
            output.append(token)
        if token == eos_id or len(output) == max_new:
            pool.leave(slot)
            del running[slot]

    while waiting or running:
        if waiting and len(pool.free) >= min(together, len(waiting)):
            slots = sorted(pool.free)[: min(together, len(waiting))]
            running |= {slot: waiting.popleft() for slot in slots}
            joining = [Joining(slot, inputs[running[slot]]) for slot in slots]
            for slot, choice in zip(slots, pool.join(joining), strict=True):
                take(slot, int(choice.ids))
        else:
            ids_AB = pool.step().ids
            for slot in list(running):
                take(slot, int(ids_AB[slot]))
        progress(len(inputs) - len(waiting) - len(running), len(inputs))
    return outputs
