"""What computing the context once saves: operations of a step; and how full its rows are."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest

from softprompt.analysis.flops import (
    ContextLengths,
    forward_flops,
    scoring_work,
    train_flops,
    train_work,
)
from softprompt.config import base_config
from softprompt.data.builtin_tasks import get_task
from softprompt.data.encode import Encoded, common_opening, encode
from softprompt.data.pipeline import TrainSource, train_template
from softprompt.data.rows import DECODER_LAYOUT
from softprompt.data.splits import read_split
from softprompt.methods.prompt import PromptConfig
from softprompt.models.decoder import Decoder, DecoderConfig
from softprompt.pretrained import gguf
from softprompt.pretrained.loading import find
from softprompt.pretrained.tokenizer import Tokenizer
from softprompt.training.optimizers import OptimizerConfig, make_optimizer
from softprompt.training.step import StepConfig, train_step
from tests.contracts import concatenated

pytestmark = pytest.mark.real  # its tokenizer and its task's data; sizes instead of weights

LENGTH, EXAMPLES = 100, 16


@pytest.fixture(scope="module")
def sizes() -> DecoderConfig:
    return gguf.open_model(gguf.File(find("smollm2-135m-instruct-q4")))[0]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return gguf.read_tokenizer(gguf.File(find("smollm2-135m-instruct-q4")))


def encoded(tokenizer, instruction=""):
    """Movie snippets behind an instruction."""
    task = get_task(base_config().task)
    task = dataclasses.replace(task, template=instruction + task.template)
    sizes = {"max_input": 512, "max_target": 32, "bos": tokenizer.add_bos, "eos": False}
    return encode(read_split(task, "train"), task, tokenizer, **sizes)


@pytest.fixture(scope="module")
def movies(tokenizer) -> Encoded:
    return encoded(tokenizer)


def shapes_of(model):
    """The frozen weights as shapes, without a model behind them."""
    tokens_T = jax.ShapeDtypeStruct((1,), np.int32)
    return jax.eval_shape(model.init, jax.random.key(0), tokens_T)["params"]


def flops(step, *arguments):
    """Operations of a compiled function by XLA's cost analysis."""
    return jax.jit(step).lower(*arguments).compile().cost_analysis()["flops"]


def all_layers(count, config, monkeypatch):
    """Operations with all layers of `config`, from `count(config)` for two and for three of them.

    Cost analysis counts the body of a loop once, whatever its length. So that it sees every layer,
    scans are unrolled here; and as all layers cost the same, but for what falls away at the first
    and the last, the others are multiples of what the third one adds to two.
    """
    scan = jax.lax.scan

    def unrolled(*arguments, **options):
        return scan(*arguments, **{**options, "unroll": True})

    monkeypatch.setattr(jax.lax, "scan", unrolled)
    two, three = (count(dataclasses.replace(config, layers=n)) for n in (2, 3))
    assert 1.05 * two < three < 1.5 * two
    return two + (config.layers - 2) * (three - two)


def once(config, batch, *, length=LENGTH, opening=()):
    """Operations of the training step."""
    model = Decoder(config)
    step = StepConfig(model, "prompt", PromptConfig(length), opening=opening)
    tx = make_optimizer(OptimizerConfig())
    delta = {"prompt": jax.ShapeDtypeStruct((length, config.width), np.float32)}
    function = functools.partial(train_step, config=step, tx=tx)
    state = jax.eval_shape(tx.init, delta)
    return flops(function, delta, state, shapes_of(model), batch, None)


def repeated(config, batch):
    """Operations of the same update in the reference form."""
    tx = make_optimizer(OptimizerConfig())
    prompt = jax.ShapeDtypeStruct((LENGTH, config.width), np.float32)

    def step(prompt_PD, state, weights, batch):
        loss, grads = jax.value_and_grad(concatenated.loss)(prompt_PD, weights, config, batch)
        updates, state = tx.update(grads, state, prompt_PD)
        return optax.apply_updates(prompt_PD, updates), state, loss

    state = jax.eval_shape(tx.init, prompt)
    return flops(step, prompt, state, shapes_of(Decoder(config)), batch)


def test_a_step_costs_less_than_a_third(sizes, movies, monkeypatch):
    """Mutation: the context is computed once a row instead of once a step."""
    source = TrainSource(movies, train_template(movies, examples=EXAMPLES), seed=0)
    longest = [source.lengths_N[source.places(n)[0]].max() for n in range(source.template.steps)]
    step = int(np.argsort(longest)[len(longest) // 2])  # a median batch
    padded = concatenated.pad_right(movies, source.places(step)[0])
    padded["weight_BT"] = padded["weight_BT"].astype(np.float32)
    ours = all_layers(lambda config: once(config, source[step]), sizes, monkeypatch)
    theirs = all_layers(lambda config: repeated(config, padded), sizes, monkeypatch)
    shape = source.template.shape
    print(
        f"operations of a step: {ours:.3e} ({shape.rows} rows of {shape.tokens} tokens, "
        f"{shape.targets} targets), concatenated: {theirs:.3e} ({EXAMPLES} x (100 + "
        f"{padded['tokens_BT'].shape[1]})), ratio {ours / theirs:.3f}; longest of a batch: "
        f"{min(longest)} to {max(longest)}"
    )
    assert ours / theirs <= 0.3


INSTRUCTION = "Read this short review of a movie, and decide if its author liked it or not. " * 20


@pytest.mark.matrix
def test_an_instruction_costs_less_than_a_third(sizes, movies, tokenizer):
    """200 tokens before every snippet, at the default batch and prompt length. Breaks when they are
    computed with every example, or the formula counts them so.

    The formula is checked with one layer: cost analysis counts the body of a loop once.
    """
    config = base_config()
    length, examples = config.method.length, config.train.batch
    words = tokenizer.backend.decode(tokenizer.encode(INSTRUCTION)[:200])
    instructed = encoded(tokenizer, f"{words}\n")
    opening = tuple(common_opening(instructed.inputs).tolist())
    assert 200 <= len(opening) <= 205
    rest = instructed.without_opening(len(opening))
    one, counts = dataclasses.replace(sizes, layers=1), []
    for part, start in ((movies, ()), (rest, opening)):
        batch = TrainSource(part, train_template(part, examples=examples), seed=0)[0]
        contexts = ContextLengths(decoder=length + len(start), opening=len(start))
        work = train_work(part, DECODER_LAYOUT, contexts, examples)
        scored = forward_flops(sizes, scoring_work(part, DECODER_LAYOUT, contexts))
        compiled = once(sizes, batch, length=length, opening=start)
        counts.append((train_flops(sizes, work), scored, train_flops(one, work), compiled))
    step, scoring, predicted, compiled = (new / old for old, new in zip(*counts, strict=True))
    print(f"an instruction: {step:.3f} of a step's operations, {scoring:.3f} of scoring's; ")
    print(f"of a step with one layer {predicted:.3f}, and by XLA {compiled:.3f}")
    assert step <= 1.3 and scoring <= 1.3
    assert compiled == pytest.approx(predicted, rel=0.05)


@pytest.mark.parametrize("examples", [16, 32])
def test_rows_are_full_over_an_epoch(movies, examples):
    """Mutation: one example a row."""
    source = TrainSource(movies, train_template(movies, examples=examples), seed=0)
    fills = [source.epoch_fill(epoch) for epoch in range(2)]
    print(f"fill with {examples} examples a step: {fills}, {source.template.shape}")
    assert min(fills) >= 0.9
