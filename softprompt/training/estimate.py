"""What a trial will cost, before it runs."""

from typing import Any

import jax
import numpy as np

from softprompt.analysis.flops import forward_flops, machine_flops
from softprompt.config import ConfigDict
from softprompt.data.encode import Encoded
from softprompt.models.decoder import DecoderConfig
from softprompt.training.session import Session
from softprompt.training.trial import prepare, step_flops, train_source

SHARE = 0.5  # of the machine's own rate that a step or an evaluation is expected to reach


def estimate(config: ConfigDict, session: Session) -> dict[str, float]:
    """Parameters, operations, memory and time of a trial, from its real data and shapes.

    Loads the model and the data, which the trial needs too.

    Returns:
        trainable: trained parameters.
        flops: useful operations of training and all evaluations.
        memory_bytes: weights, and what a training step keeps for its backward pass.
        seconds: at half of the machine's measured rate, compilation left out.
    """
    prepared = prepare(config, session)
    sizes, data = prepared.loaded.config, prepared.data
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(prepared.loaded.weights))
    context, trains = prepared.context_length, config.method.name == "prompt"
    once = {s: scoring_flops(sizes, data.split(s), context) for s in ("validation", "test")}
    flops, memory, trainable = once["validation"] + once["test"], float(weights), 0
    if trains:
        every, steps = config.eval.every, config.train.steps
        source = train_source(prepared)
        looks = 1 + (steps // every if every else 0) + int(not every or steps % every > 0)
        flops += steps * step_flops(prepared, source) + (looks - 1) * once["validation"]
        shape = source.template.shape
        rows = shape.rows / config.train.microbatches
        memory += step_memory(sizes, rows * shape.tokens, shape.tokens + context, config)
        trainable = config.method.length * sizes.prompt_width
    seconds = flops / machine_flops(config.model.dtype) / SHARE
    return {
        "trainable": trainable,
        "flops": flops,
        "memory_bytes": memory,
        "seconds": seconds,
    }


def scoring_flops(sizes: DecoderConfig, encoded: Encoded, context: int) -> float:
    """Useful operations of scoring every candidate of a split once."""
    own = [len(ids) - 1 for ids in encoded.candidates]
    lengths_N = np.array([len(ids) for ids in encoded.inputs], np.float64)
    tokens = float(lengths_N.sum() + sum(own) * len(lengths_N))
    keys = float((lengths_N * (lengths_N + 1) / 2).sum() + tokens * context)
    heads = len(lengths_N) * (1 + sum(own))
    return forward_flops(sizes, tokens=tokens, keys=keys, targets=heads, context=context)


def step_memory(sizes: DecoderConfig, tokens: float, keys: int, config: Any) -> float:
    """Bytes that a step keeps for its backward pass, all layers, nothing rematerialised.

    About ten arrays of the width and three of the ffn in the compute dtype, and the attention's
    scores in float32, for every token of a step.
    """
    width = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    token = (10 * sizes.width + 3 * sizes.ffn) * width + sizes.heads * keys * 4
    return sizes.layers * tokens * token
