"""Contracts 2, 3 and 4 for every method on both kinds of model, in float64.

The other form is the model's own call on one plain text or pair, which knows no rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.data.packing import RowShape
from softprompt.data.pipeline import train_batch
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
from softprompt.training.step import StepConfig, loss_fn, row_logits, shared_part
from tests.contracts.examples import by_example, double, random_examples
from tests.families import family_decoder
from tests.tiny import tiny_decoder
from tests.tiny_t5 import tiny_t5

P, KEY = 4, jax.random.key(3)
EXACT = {"atol": 1e-9, "rtol": 1e-9}
EVERY = ("q", "k", "v", "o", "up", "gate", "down")
STACKS = ("encoder", "decoder")
SOURCE = vocabulary(range(90))
CASES = {  # name -> the method and its configuration, for a decoder and for T5
    "prompt": ("prompt", lambda where: PromptConfig(P, None, SOURCE, places=where)),
    **{
        f"prompt, {kind}": (
            "prompt",
            lambda where, kind=kind: PromptConfig(P, None, SOURCE, 1.0, where, kind, 6),
        )
        for kind in ("residual", "residual_rows", "mlp")
    },
    "multitask": (
        "multitask",
        lambda where: MultitaskConfig(P, None, SOURCE, places=where[:1], tasks=2, rank=3),
    ),
    "prefix": (
        "prefix",
        lambda where: PrefixConfig(P, where and (*where, "cross")),
    ),
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
FRESH_IS_BASE = [name for name in CASES if not name.startswith(("pr", "multitask"))]
KINDS = ("decoder", "t5", "t5, contexts")
DECODERS = ("decoder", "gpt2")

pytestmark = [pytest.mark.newest, pytest.mark.usefixtures("x64")]


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
    delta = METHODS[config.method].init(KEY, model, weights, config.method_config)
    return config, delta, {} if config.method == "full" else weights, layout


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


@functools.partial(jax.jit, static_argnames="config")
def logits_and_gradient(config, delta, weights, batch):
    logits_RMV = row_logits(config.model, weights, shared_part(config, delta, weights), batch.rows)
    loss = functools.partial(loss_fn, config=config)
    return logits_RMV, jax.grad(loss, has_aux=True)(delta, weights, batch, None)[0]


BOTH_FORMS = [name for name in CASES if name.startswith("pr")]


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in CASES for kind in KINDS[: 3 if name in BOTH_FORMS else 2]],
)
def test_packed_rows_and_gradients(name, kind):
    """Contracts 3 and 4. Mutations: cross-attention's prefix is masked like the row's own states; a
    prefix's keys lie in the order [P, L]; LoRA's B is scaled twice; the method's variables never
    reach the layers, so that a leaf has no gradient.
    """
    if name == "prefix of words" and kind == "t5":
        pytest.skip("keys and values of words exist where the prompt does not see the input")
    config, fresh, weights, layout = make(name, kind)
    delta, (_, _, encoded) = moved(fresh), base(kind)
    wanted = alone(config, delta, weights, encoded)
    for rows in ([[0, 1, 2, 3]], [[3], [], [2, 0, 1]]):
        order = np.array([n for row in rows for n in row])
        rows_B = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        batch = train_batch(encoded, order, rows_B, RowShape(3, 70, 12, 8), layout)
        logits_RMV, grads = logits_and_gradient(config, delta, weights, double(batch))
        for n, logits_MV in by_example(encoded, rows, logits_RMV):
            np.testing.assert_allclose(logits_MV, wanted[n], **EXACT)
    like = jax.tree.map(lambda x: (x.shape, x.dtype), delta)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), grads) == like
    paths, _ = jax.tree_util.tree_flatten_with_path(grads)
    unmoved = [jax.tree_util.keystr(path) for path, grad in paths if not np.abs(grad).max() > 0]
    assert not unmoved


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", FRESH_IS_BASE)
def test_a_fresh_delta_changes_nothing(name, kind):
    """Contract 2. Mutations: LoRA's B begins as noise; an adapter's "up" does; IA3 begins at zero;
    a new bias begins at one; `full` begins with fresh weights.
    """
    config, delta, weights, _ = make(name, kind)
    model, whole, encoded = base(kind)
    ours = alone(config, delta, weights, encoded)
    theirs = alone(StepConfig(model, "none", None), {}, whole, encoded)
    for some_MV, others_MV in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(some_MV, others_MV, **EXACT)


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("name", [name for name in CASES if "," in name and name[:2] == "pr"])
def test_a_folded_delta_is_the_trained_one(name, kind):
    """Mutation: `fold` leaves the network out, or its last layer."""
    config, fresh, weights, _ = make(name, kind)
    delta, encoded = moved(fresh), base(kind)[2]
    folded = METHODS[config.method].fold(delta, config.method_config)
    names = {path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(folded)[0]}
    assert names <= {"prompt", "k", "v"}
    ours, theirs = (alone(config, one, weights, encoded) for one in (folded, delta))
    for some_MV, others_MV in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(some_MV, others_MV, **EXACT)
