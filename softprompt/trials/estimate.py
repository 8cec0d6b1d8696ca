"""Estimates the cost of a trial before it runs."""

import jax

from softprompt.analysis.flops import (
    Work,
    forward_flops,
    machine_bandwidth,
    machine_flops,
    scoring_work,
)
from softprompt.config import ConfigDict, method_settings, transfers
from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_widths
from softprompt.data.tasks import SPLITS
from softprompt.evaluation.perplexity import PIECE
from softprompt.models.decoder import DecoderConfig
from softprompt.training.memory import bytes_of
from softprompt.training.optimizers import make_optimizer
from softprompt.trials.data import TrialData
from softprompt.trials.prepare import Prepared, delta_shapes, prepare, step_flops, train_source
from softprompt.trials.session import Session, optimizer_config

SHARE = 0.5  # of the machine's peak FLOPs that a step or an evaluation is expected to reach

# Bytes that a step reads and writes per trained parameter: the parameter, its gradient, two moments
# and three norms, in float32.
UPDATE = 60


def estimate(config: ConfigDict, session: Session) -> dict[str, float]:
    """Estimates parameters, FLOPs, memory and time of a trial, from its real data and shapes.

    Loads the model and the data, which the trial needs too.

    Returns:
        trainable: number of trained parameters.
        flops: useful FLOPs of training and all evaluations, except `eval.latency`.
        memory_bytes: weights, activations that a training step saves for its backward pass, and
            the delta with its best values, gradient and optimizer state.
        seconds: at half of the machine's measured FLOPs per second, plus the update at its full
            memory bandwidth; without compilation.
    """
    prepared = prepare(config, session)
    sizes, layout = prepared.loaded.config, prepared.layout
    weights = bytes_of(prepared.loaded.weights)

    def scoring(split: str, data: TrialData) -> float:
        parts = [one.split(split) for one in data.tasks]
        work = [scoring_work(part, layout, prepared.contexts) for part in parts]
        return sum(forward_flops(sizes, one) for one in work)

    once = {split: scoring(split, prepared.data) for split in SPLITS[1:]}
    others = [session.data(one, bos=prepared.bos) for one in transfers(config)]
    once["test"] += sum(scoring("test", data) for data in others)
    flops, memory, trainable, seconds = once["validation"] + once["test"], float(weights), 0, 0.0
    if config.eval.text:
        context = prepared.with_opening(()).contexts.decoder
        flops += forward_flops(sizes, text_work(config.eval.text_tokens, context))
    if (method := method_settings(config)).trains:
        every, steps = config.eval.every, config.train.steps
        source = train_source(prepared)
        validations = 1 + (steps // every if every else 0) + int(not every or steps % every > 0)
        flops += steps * step_flops(prepared) + (validations - 1) * once["validation"]
        memory += step_memory(prepared, source.template.shape)
        trainable, delta_bytes = delta_size(prepared)
        memory += delta_bytes - (weights if method.trains_weights else 0)  # the delta replaces them
        seconds += steps * trainable * UPDATE / machine_bandwidth()
    seconds += flops / machine_flops(config.model.dtype) / SHARE
    return {"trainable": trainable, "flops": flops, "memory_bytes": memory, "seconds": seconds}


def delta_size(prepared: Prepared) -> tuple[int, int]:
    """Parameters of the delta; bytes of it, its best values, gradient and optimizer state."""
    delta = delta_shapes(prepared)
    state = jax.eval_shape(make_optimizer(optimizer_config(prepared.config)).init, delta)
    return sum(leaf.size for leaf in jax.tree.leaves(delta)), 3 * bytes_of(delta) + bytes_of(state)


def text_work(tokens: int, context: int) -> Work:
    """The work of scoring so many tokens of plain text, in pieces after a context."""
    return Work(tokens + context, tokens * (PIECE / 2 + context) + context**2 / 2, tokens)


def step_memory(prepared: Prepared, shape: RowShape) -> float:
    """Bytes of activations that a step saves for its backward pass, without rematerialisation.

    For every token of a microbatch's rows and of the contexts, which are run once: per layer about
    seven arrays of the width and two of the ffn, in the compute dtype. Attention scores are
    recomputed, so those of one layer count, in float32. Target logits and their gradient are
    float32.
    """
    widths = train_widths(shape, prepared.layout)
    rows = -(-shape.rows // prepared.config.train.microbatches)
    sizes, (before, context, *_) = prepared.loaded.config, prepared.contexts
    context *= max(1, prepared.layout.prompts)
    size = {"float32": 4, "bfloat16": 2}[prepared.config.model.dtype]
    per_token = (7 * sizes.width + 2 * sizes.ffn) * size
    own, logits = widths.tokens, 8 * rows * widths.targets * sizes.vocab
    if isinstance(sizes, DecoderConfig):
        scores = rows * own * (own + context) * sizes.heads * 4
        return sizes.layers * per_token * (rows * own + context) + scores + logits
    read = widths.inputs
    keys = max(read * (read + before), own * (own + context + read + before))
    encoder = sizes.encoder_layers * (rows * read + before)
    decoder = sizes.decoder_layers * (rows * own + context)
    return per_token * (encoder + decoder) + rows * keys * sizes.heads * 4 + logits
