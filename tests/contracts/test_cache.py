"""Contract 7: running a token at a time with a cache equals running everything at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.inference.decode import generate
from softprompt.inference.kv_cache import empty_cache, extend, prefill
from softprompt.models.decoder import Cached
from tests.contracts.examples import equations, prompted, snippets
from tests.families import SLIDING, family_decoder
from tests.matrix import matrix
from tests.models.t5_rows import compiled_row, packed
from tests.tiny_t5 import tiny_t5

EXACT = {"atol": 1e-9, "rtol": 1e-9}
LENGTHS, STEPS = (11, 1, 4), 9  # with a prompt of 6, past the windows of 7 in every part
RANDOM = np.random.default_rng(3)
TEXT_BT = RANDOM.integers(2, 99, (len(LENGTHS), max(LENGTHS) + STEPS))


def ragged():
    """Inputs padded on the right by something, what follows each [B, STEPS], and both together."""
    inputs_BT = np.full((len(LENGTHS), 13), 5)
    rows = [TEXT_BT[n, : length + STEPS] for n, length in enumerate(LENGTHS)]
    for row_T, text, length in zip(inputs_BT, rows, LENGTHS, strict=True):
        row_T[:length] = text[:length]
    after_BN = np.stack([row[length:] for row, length in zip(rows, LENGTHS, strict=True)])
    return inputs_BT, after_BN, rows


@functools.partial(jax.jit, static_argnames="model")
def cached_logits(model, collections, inputs_BT, lengths_B, after_BN):
    """Logits [N, B, V] that predict each token of `after_BN`, a token at a time."""
    weights, variables = collections["params"], collections["delta"]
    shared = variables, model.apply(collections, method="prompt_context")
    logits_BV, input_cache = prefill(model, weights, shared, inputs_BT, lengths_B, slots=16)

    def step(carry, nth):
        logits_BV, cache = carry
        after = extend(model, weights, shared, input_cache, cache, after_BN[:, nth], nth)
        return after, logits_BV

    first = logits_BV, empty_cache(input_cache, STEPS + 3)
    return jax.lax.scan(step, first, jnp.arange(STEPS))[1]


@functools.partial(jax.jit, static_argnames="model")
def whole_logits(model, variables, *tokens):
    return model.apply(variables, *tokens)


def check(model, weights, variables, whole):
    """The cache's logits are those of `whole`, a function of inputs and continuations."""
    collections = {"params": weights, "delta": variables}
    inputs_BT, after_BN, rows = ragged()
    logits_NBV = cached_logits(model, collections, inputs_BT, np.array(LENGTHS), after_BN)
    inputs = [row[:length] for row, length in zip(rows, LENGTHS, strict=True)]
    for n, wanted_NV in enumerate(whole(collections, inputs, after_BN)):
        assert np.std(wanted_NV) > 0.3
        np.testing.assert_allclose(logits_NBV[:, n], wanted_NV, **EXACT)


def decoder_whole(model):
    """Each row in one piece, padded to one length for all: it is compiled once."""

    def whole(collections, inputs, after_BN):
        for input_T, after_N in zip(inputs, after_BN, strict=True):
            row_T = np.zeros(TEXT_BT.shape[1], int)
            row_T[: len(input_T) + STEPS] = [*input_T, *after_N]
            yield whole_logits(model, collections, row_T)[len(input_T) - 1 :][:STEPS]

    return whole


@pytest.mark.parametrize(
    "name", matrix(("gpt2", "neox", "opt", "mistral", "gemma2", "gemma3"), keep=("gemma3",))
)
def test_decoders(x64, name):
    """Mutation: positions by slot, not by row; what is cached is seen beyond the row's length, or
    counts from before the context; windows cut only what can leave them within T tokens; a new
    column in another slot.
    """
    model, weights = family_decoder(name)
    _, delta = prompted(model, weights, 6)
    check(model, weights, delta, decoder_whole(model))


BOTH = ("encoder", "decoder")


def t5_prompts(stacks):
    random = np.random.default_rng(7)
    drawn = {
        stack: random.standard_normal((n, 20)) for stack, n in (("encoder", 5), ("decoder", 4))
    }
    return {stack: {"prompt": jnp.asarray(drawn[stack])} for stack in stacks}


def t5_whole(model):
    """All in one packed row, behind slots for their prompts where those are inline."""

    def whole(collections, inputs, after_BN):
        delta, segments = collections["delta"], range(1, 1 + len(inputs))
        slots = [model.prompt_to_input * len(delta[s]["prompt"]) if s in delta else 0 for s in BOTH]
        targets = [[model.config.start, *after_N[:-1]] for after_N in after_BN]
        encoder, decoder = (
            packed(rows, segments, slots=count, length=80)
            for rows, count in zip((inputs, targets), slots, strict=True)
        )
        logits_TV = np.asarray(compiled_row(model)(collections, encoder, decoder))
        for segment in segments:
            yield logits_TV[np.asarray(decoder.segments) == segment][-STEPS:]

    return whole


@pytest.mark.parametrize(
    ("inline", "stacks", "sizes"),
    [
        pytest.param(True, [], {"start": 5}, marks=pytest.mark.matrix),
        pytest.param(True, BOTH, {}, marks=pytest.mark.matrix),
        (False, BOTH, {"bias_per_layer": True}),
    ],
)
def test_t5(x64, inline, stacks, sizes):
    """Mutation: biases by slot; a bias of the row's own kind for what is cached; padding of the
    input is seen; the encoder's prompt is missing from what cross-attention keeps; the decoder
    begins with token 0 whatever the config says.
    """
    model, weights = tiny_t5(prompt_to_input=inline, buckets=8, max_distance=6, **sizes)
    check(model, weights, t5_prompts(stacks), t5_whole(model))


@functools.partial(jax.jit, static_argnames="model")
def extended(model, variables, input_T, pieces):
    """Logits of pieces of several tokens each, after an input."""
    context = model.apply(variables, method="prompt_context")
    length = jnp.array(len(input_T))
    run = functools.partial(model.apply, variables)
    _, input_cache = run(context, input_T, length, slots=16, method="prefill")
    cache, outputs, first = None, [], 0
    for tokens_T in pieces:
        places_T = input_cache.length + first + jnp.arange(len(tokens_T))
        if cache is None:
            like = input_cache.cached.k_LSGK[:, :0]
            cache = Cached(like, like, jnp.zeros(0, int), jnp.zeros(0, bool))
        x_TD, kv = run(context, input_cache, cache, tokens_T, places_T, method="extend")
        outputs.append(run(x_TD, method="logits"))
        kv = jax.tree.map(lambda *pair: jnp.concatenate(pair, 1), (cache.k_LSGK, cache.v_LSGK), kv)
        places_S = jnp.concatenate([cache.positions_S, places_T])
        cache = Cached(*kv, places_S, jnp.ones(len(places_S), bool))
        first += len(tokens_T)
    return jnp.concatenate(outputs)


@pytest.mark.parametrize("name", matrix(("gemma3", "t5"), keep=("gemma3",)))
def test_several_tokens_at_once(x64, name):
    """Mutation: new tokens see those after them; positions of all of them are the first's."""
    pieces = [TEXT_BT[0, 11:14], TEXT_BT[0, 14:20]]
    if name == "t5":
        model, weights = tiny_t5(prompt_to_input=False, buckets=8, max_distance=6)
        variables = {"params": weights, "delta": t5_prompts(BOTH)}
        row = TEXT_BT[0, :11], np.array([0, *TEXT_BT[0, 11:20]])
        wanted_NV = whole_logits(model, variables, *row)[1:]
    else:
        model, weights = family_decoder(name)
        variables = {"params": weights, "delta": prompted(model, weights, 6)[1]}
        wanted_NV = whole_logits(model, variables, TEXT_BT[0, :20])[11:]
    logits_NV = extended(model, variables, TEXT_BT[0, :11], pieces)
    np.testing.assert_allclose(logits_NV, wanted_NV, **EXACT)


@pytest.mark.parametrize("name", ["gemma3", "t5"])
def test_layers_read_the_cache_and_never_copy_it(x64, name):
    """Mutation: keys and values of the parts are concatenated in a layer; the scan of the layers
    returns the cache with the new column in it.
    """
    model, weights = tiny_t5() if name == "t5" else family_decoder(name)
    tokens_BT, slots, new = jnp.zeros((2, 40), int), 41, 43

    def run(tokens_BT):
        shared = {}, model.apply({"params": weights}, method="prompt_context")
        lengths_B = jnp.array([40, 3])
        _, input_cache = prefill(model, weights, shared, tokens_BT, lengths_B, slots=slots)
        return shared, input_cache, empty_cache(input_cache, new)

    def step(shared, input_cache, cache):
        return extend(model, weights, shared, input_cache, cache, tokens_BT[:, 0], jnp.array(1))

    jaxpr = jax.make_jaxpr(step)(*jax.eval_shape(run, tokens_BT))
    (layers,) = (e for e in equations(jaxpr) if e.primitive.name == "scan")
    size = model.config.head_size
    inputs = [v.aval.shape for v in layers.invars]
    assert sum(shape[-1:] == (size,) and new in shape for shape in inputs) == 2
    assert not any(new in v.aval.shape or slots in v.aval.shape for v in layers.outvars)
    made = [(e.primitive.name, v.aval.shape) for e in equations(layers.params) for v in e.outvars]
    assert any(name == "dot_general" and new in shape for name, shape in made)
    joined = [shape for name, shape in made if name == "concatenate"]
    assert not any(shape[-1] == size and max(shape) > new for shape in joined)


@pytest.mark.matrix
@pytest.mark.real
@pytest.mark.usefixtures("quick")
def test_greedy_on_the_real_model_is_full_recomputation(smollm2, shared_data):
    """Mutation: positions by slot, not by row; a soft prompt that decoding forgets.

    By induction: each token is the likeliest after the input and the tokens before it.
    """
    model, weights = smollm2.model, smollm2.weights
    _, delta = prompted(model, weights, 20)
    inputs = snippets(shared_data, smollm2.tokenizer, 3).inputs
    variables = {"params": weights, "delta": delta}
    shared = delta, model.apply(variables, method="prompt_context")
    answers = generate(model, weights, shared, inputs, max_new=12, eos_id=None)
    assert len(np.unique(answers)) > 8
    longest = max(map(len, inputs)) + 12
    run = jax.jit(jax.vmap(model.apply, in_axes=(None, 0)))
    whole = [[*tokens, *said] for tokens, said in zip(inputs, answers, strict=True)]
    rows_BT = np.array([row + [0] * (longest - len(row)) for row in whole])
    best_BT = np.asarray(jnp.argmax(run(variables, rows_BT), axis=-1))
    for best_T, tokens, said in zip(best_BT, inputs, answers, strict=True):
        assert best_T[len(tokens) - 1 :][:12].tolist() == said


def test_windows_are_passed():
    """The lengths above reach past every window: of the context, the input and what is new."""
    for name in SLIDING:
        windows = [w for w in family_decoder(name, dtype="float32")[0].config.windows if w]
        assert max(windows) < min(max(LENGTHS), STEPS)
