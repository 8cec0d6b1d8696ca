"""Generation against a plain loop; where it ends; what it depends on; what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.inference import pool
from softprompt.inference.continuous import generate_in_pool
from softprompt.inference.decode import check_inputs, generate
from softprompt.inference.pool import compiled
from softprompt.inference.sampling import sampling
from softprompt.training.sharding import make_mesh
from softprompt.training.step import shared_part
from tests.contracts import concatenated
from tests.contracts.examples import prompted, random_examples
from tests.tiny import tiny_decoder
from tests.tiny_t5 import tiny_t5

NEW = 5


@pytest.fixture
def given(tiny):
    """What `generate` takes, and the continuations of a loop over the reference form."""
    model, weights = tiny
    config, delta = prompted(model, weights, 4)
    encoded, embedding_VD = random_examples(), np.asarray(weights["embed"]["embedding"])
    logits_fn = jax.jit(concatenated.logits, static_argnames="config")
    room = 4 + max(map(len, encoded.inputs)) + NEW
    wanted = []
    for tokens in encoded.inputs:
        said = tokens.tolist()
        for _ in range(NEW):
            rows_SD = np.concatenate([delta["prompt"], embedding_VD[said]])
            padded_SD = np.pad(rows_SD, ((0, room - len(rows_SD)), (0, 0)))
            logits_SV = logits_fn(weights, model.config, padded_SD)
            said.append(int(logits_SV[len(rows_SD) - 1].argmax()))
        wanted.append(said[len(tokens) :])
    return (model, weights, shared_part(config, delta, weights), encoded.inputs), wanted


def test_generation_is_the_plain_loop(given):
    """Mutation: the logits of the padded row's end; a new token in the wrong place; padded examples
    among the answers; answers in the order of lengths.
    """
    arguments, wanted = given
    assert len(set(map(tuple, wanted))) > 1
    assert generate(*arguments, max_new=NEW, eos_id=None, batch=4) == wanted
    assert generate(*arguments, max_new=NEW, eos_id=99999, batch=4) == wanted
    assert generate(*arguments, max_new=1, eos_id=None, batch=4) == [ids[:1] for ids in wanted]


def test_generation_ends_at_eos(given):
    """Mutation: keep EOS; keep what follows it; one row's end ends its batch."""
    arguments, wanted = given
    eos = wanted[0][2]
    cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in wanted]
    assert len(cut[0]) <= 2 and max(map(len, cut)) == NEW
    assert generate(*arguments, max_new=NEW, eos_id=eos, batch=4) == cut


def test_a_pool_gives_the_same(given, monkeypatch):
    """Mutation: keep EOS; a row that has ended stays; outputs in the order of lengths; a pool like
    an earlier one is compiled again; trained weights are forgotten.
    """
    made = []
    monkeypatch.setattr(
        pool, "compiled", lambda lowered: made.append(compiled(lowered)) or made[-1]
    )
    arguments, wanted = given
    eos = wanted[0][2]
    cut = [ids[: ids.index(eos)] if eos in ids else ids for ids in wanted]
    reports = []
    options = {"batch": 4, "progress": lambda done, total: reports.append((done, total))}
    assert generate_in_pool(*arguments, max_new=NEW, eos_id=eos, **options) == cut
    assert reports[-1] == (len(wanted), len(wanted)) and reports == sorted(reports)
    assert generate_in_pool(*arguments, max_new=NEW, eos_id=None, **options) == wanted
    assert made[0].keys() == made[1].keys() == {"lane", "step", 64}
    first, again = ([one.runtime_executable() for one in each.values()] for each in made)
    assert all(a is b for a, b in zip(first, again, strict=True))
    model, weights, (variables, context), inputs = arguments
    full = model, {}, ({**variables, "params": weights}, context), inputs
    assert generate_in_pool(*full, max_new=1, eos_id=None) == [ids[:1] for ids in wanted]
    assert generate_in_pool(*arguments[:3], [], max_new=1, eos_id=None) == []


def test_rows_are_split_over_a_mesh(given):
    """Mutation: a batch that the mesh's data axis does not divide."""
    arguments, wanted = given
    mesh = make_mesh(4, 2)
    assert generate(*arguments, max_new=NEW, eos_id=None, batch=3, mesh=mesh) == wanted


def test_draws_do_not_depend_on_the_batch(given):
    """Mutation: keys by the row's place in its batch; the seed is left out."""
    (*model, inputs), _ = given
    how = {"max_new": NEW, "eos_id": None, "sampling": sampling(1.5), "batch": 4}
    ids = [30, 10, 50, 20, 60, 40]
    together = generate(*model, inputs, ids=ids, **how)
    assert len(set(map(tuple, together))) == len(inputs)
    assert generate(*model, inputs[::-2], ids=ids[::-2], **how) == together[::-2]
    assert generate(*model, inputs, ids=ids, seed=1, **how) != together
    assert generate(*model, inputs, **how) != together


def test_a_text_or_an_empty_context(tiny):
    """Mutation: generation reads the delta's prompt instead of the context."""
    model, weights = tiny
    inputs = random_examples().inputs
    text_P = np.array([17, 300, 5, 5, 88])
    text = model.apply({"params": weights}, text_P, method="text_context")
    how = {"max_new": NEW, "eos_id": None, "batch": 4}
    after = generate(model, weights, ({}, text), inputs, **how)
    empty = model.apply({"params": weights}, method="empty_context")
    spelled = [[*text_P, *tokens] for tokens in inputs]
    assert after == generate(model, weights, ({}, empty), spelled, **how)
    assert after != generate(model, weights, ({}, empty), inputs, **how)


@pytest.mark.parametrize("kind", ["decoder", "t5"])
def test_decoding_compiles_once_for_changing_lengths(kind, caplog):
    """Mutation: the limit, EOS or the temperature is static; the cache has the inputs' length."""
    model, weights = (tiny_decoder if kind == "decoder" else tiny_t5)(dtype="float32")
    shared = {}, model.apply({"params": weights}, method="prompt_context")
    random = np.random.default_rng(0)
    with jax.log_compiles():
        for lengths, max_new, eos, heat in (
            ((3, 9, 20), 5, 1, 1.0),
            ((150, 100, 1, 1), 64, 2, 2.0),
        ):
            inputs = [random.integers(2, 90, n) for n in lengths]
            options = {"max_new": max_new, "eos_id": eos, "sampling": sampling(heat)}
            generate(model, weights, shared, inputs, batch=4, room=200, **options)
    said = [record.getMessage() for record in caplog.records]
    assert sum(line.startswith("Compiling jit(decode)") for line in said) == 1
    assert sum(line.startswith("Compiling jit(prefill)") for line in said) == 2


def test_it_stops_when_all_rows_have_ended():
    """Mutation: the loop runs to its limit; rows without an example keep it going."""
    from softprompt.inference import decode as module

    model, weights = tiny_decoder(dtype="float32")
    shared = {}, model.apply({"params": weights}, method="empty_context")
    rows = module.RowIds(jnp.zeros(2, jnp.uint32), jnp.array([True, False]))
    logits_BV, input_cache = module.prefill_function(model)(
        weights, shared, jnp.array([[5, 6, 7]] * 2), jnp.array([3, 1]), slots=8
    )
    eos = int(jnp.argmax(logits_BV[0]))
    rules = module.Rules(64, eos, sampling(), jax.random.key(0))
    ends = []
    loop = jax.lax.while_loop

    def counted(more, step, state):
        state = loop(more, step, state)
        ends.append(int(state.made))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "while_loop", counted)
        out_BN = module.decode(model, weights, shared, input_cache, logits_BV, rows, rules, new=64)
    assert ends == [1]
    assert (np.asarray(out_BN) == eos).all()


def test_what_is_refused():
    """Mutation: drop any of the checks; allow one token more than the context holds."""
    model, weights = tiny_decoder(dtype="float32", context=32)
    empty = model.apply({"params": weights}, method="empty_context")
    context = jax.tree.map(lambda kv: jnp.pad(kv, ((0, 0), (0, 4), (0, 0), (0, 0))), empty)
    cases = {
        "input 1 has no tokens; allowed: 1 or more": ([[5], []], 3),
        "max_new is 0; allowed: 1 or more": ([[5]], 0),
        "input 1 has 27 tokens; allowed: 26 (the model's context of 32 less 4 of the prompt and "
        "2 of 3 new ones)": ([[5], [5] * 27], 3),
    }
    for message, (inputs, max_new) in cases.items():
        with pytest.raises(UserError) as error:
            generate(model, weights, ({}, context), inputs, max_new=max_new, eos_id=None)
        assert str(error.value) == message
    check_inputs(model, context, [[5] * 26], 3)
