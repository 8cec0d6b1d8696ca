"""Every method on tiny models in float64, and the model's own call on plain texts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.data.rows import DECODER_LAYOUT, RowLayout
from softprompt.methods import METHODS
from softprompt.methods.adapter import AdapterConfig
from softprompt.methods.ia3 import Ia3Config
from softprompt.methods.initializers import vocabulary
from softprompt.methods.lora import LoraConfig
from softprompt.methods.multitask import MultitaskConfig
from softprompt.methods.prefix import PrefixConfig
from softprompt.methods.prompt import PromptConfig
from softprompt.models.layers import collections
from softprompt.training.step import StepConfig
from tests.contracts.examples import random_examples
from tests.families import family_decoder
from tests.tiny import tiny_decoder
from tests.tiny_t5 import tiny_t5

P, KEY = 4, jax.random.key(3)
EVERY = ("q", "k", "v", "o", "up", "gate", "down")
STACKS = ("encoder", "decoder")
SOURCE = vocabulary(range(90))
CASES = {  # name -> the method and its configuration, for a decoder and for T5
    "prompt": ("prompt", lambda where: PromptConfig(P, None, SOURCE, stacks=where)),
    **{
        f"prompt, {kind}": (
            "prompt",
            lambda where, kind=kind: PromptConfig(P, None, SOURCE, 1.0, where, kind, 6),
        )
        for kind in ("residual", "residual_rows", "mlp")
    },
    "multitask": (
        "multitask",
        lambda where: MultitaskConfig(P, None, SOURCE, stacks=where[:1], tasks=2, rank=3),
    ),
    "prefix": ("prefix", lambda where: PrefixConfig(P, where and (*where, "cross"))),
    "prefix, mlp": (
        "prefix",
        lambda where: PrefixConfig(P, where and (*where, "cross"), bottleneck=6),
    ),
    "prefix of words": ("prefix", lambda where: PrefixConfig(P, where, "rows", SOURCE)),
    "lora": ("lora", lambda where: LoraConfig(3, 5.0)),
    "lora, everywhere": ("lora", lambda where: LoraConfig(3, 5.0, True, EVERY)),
    "lora, one A for three": ("lora", lambda where: LoraConfig(3, 5.0, False, ("qkv", "o"))),
    "dora": ("dora", lambda where: LoraConfig(3, 5.0)),
    "dora, one A for three": ("dora", lambda where: LoraConfig(3, 5.0, True, ("qkv", "o", "up"))),
    "houlsby": ("adapter", lambda where: AdapterConfig(6)),
    "pfeiffer": ("adapter", lambda where: AdapterConfig(6, "pfeiffer")),
    "bitfit": ("bitfit", lambda where: None),
    "ia3": ("ia3", lambda where: Ia3Config()),
    "ia3, everywhere": ("ia3", lambda where: Ia3Config(EVERY)),
    "full": ("full", lambda where: None),
}
DECODERS = ("decoder", "gpt2")


@functools.cache
def base(kind, dtype="float64"):
    """A tiny model, its weights, and random examples of its vocabulary, few lengths of each.

    They are of two tasks, for methods that tell tasks apart.
    """
    if kind == "gpt2":
        model, weights = family_decoder(kind, dtype=dtype)
    elif kind == "decoder":
        model, weights = tiny_decoder(dtype=dtype)
    else:
        model, weights = tiny_t5(prompt_to_input=kind == "t5", dtype=dtype)
    encoded = random_examples((7, 13, 7, 13), (1, 3, 1, 3), vocab=90)
    return model, weights, dataclasses.replace(encoded, tasks=np.array([0, 1, 1, 0], np.int32))


def step_of(name, kind, dtype="float64"):
    """What is static in a step, and the layout of its rows."""
    model, decoder = base(kind, dtype)[0], kind in DECODERS
    method, config_of = CASES[name]
    cfg = config_of(() if decoder else STACKS)
    slots = P if method == "prompt" and kind == "t5" else 0
    layout = DECODER_LAYOUT if decoder else RowLayout(0, slots, slots)
    if method == "multitask":
        layout = RowLayout(prompts=2) if decoder else RowLayout(0, P, prompts=2)
    return StepConfig(model, method, cfg), layout


def make(name, kind):
    """Step, fresh delta, frozen weights and layout."""
    config, layout = step_of(name, kind)
    model, weights, _ = base(kind)
    init = functools.partial(METHODS[config.method].init, model=model, cfg=config.method_config)
    delta = jax.jit(lambda weights: init(KEY, weights=weights))(weights)
    return config, delta, {} if config.method == "full" else weights, layout


@jax.jit
def moved(delta, *, seed=4, by=0.2):
    """The delta after a step in a random direction, `by` the size of the noise."""
    leaves, tree = jax.tree.flatten(delta)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + by * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, noisy)


@functools.partial(jax.jit, static_argnames="config")
def plain(config, delta, weights, task, *tokens):
    tasks = jnp.array([task])
    variables = METHODS[config.method].variables(delta, weights, config.method_config, tasks)
    return config.model.apply(collections(weights, variables), *tokens)


def alone(config, delta, weights, encoded):
    """Logits [targets, V] of every example by itself; what a causal stack reads ends in zeros."""
    made = []
    for n, (tokens, target) in enumerate(zip(encoded.inputs, encoded.targets, strict=True)):
        first, read = 0, [jnp.array(tokens), np.array([0, *target[:-1]])]
        if not hasattr(config.model.config, "start"):
            first, read = len(tokens) - 1, [np.array([*tokens, *target[:-1]])]
        read[-1] = jnp.array(np.pad(read[-1], (0, 16 - len(read[-1]))))  # few shapes to compile
        logits_TV = plain(config, delta, weights, encoded.task(n), *read)
        made.append(np.asarray(logits_TV)[first : first + len(target)])
    return made
