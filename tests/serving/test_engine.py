"""The engine: rows of all kinds equal rows alone; tasks come and go while rows run."""

import functools
import threading
from types import SimpleNamespace
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from experiments.serving_tasks import alone, make_task, reference_logprobs
from softprompt.errors import UserError
from softprompt.inference.decode import generate
from softprompt.inference.pool import Pool
from softprompt.inference.pool_programs import Grid
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.serving import batching, placement
from softprompt.serving import engine as engine_module
from softprompt.serving.bank import Bank
from softprompt.serving.batching import Batcher, Ticket
from softprompt.serving.engine import Engine
from softprompt.serving.folders import NoTask
from softprompt.serving.http.errors import status_of
from softprompt.serving.placement import KindPools, Sizes
from softprompt.serving.requests import Busy, Request, Stopped
from softprompt.serving.text import TextStream
from tests.matrix import matrix
from tests.serving.conftest import METHODS, Asked

RANDOM = np.random.default_rng(4)


def inputs(count, most=20):
    sizes = RANDOM.integers(1, most + 1, count)
    return [tuple(RANDOM.integers(5, 300, size).tolist()) for size in sizes]


def wanted(loaded, folder, request, which=None):
    """The tokens of `generate` alone, up to EOS."""
    options = {"max_new": request.max_new, "eos_id": loaded.tokenizer.eos_id, "which": which}
    shared = alone(loaded, folder)
    return generate(loaded.model, loaded.weights, shared, [request.tokens], **options)[0]


@pytest.mark.parametrize(
    "names", matrix(("lora prefix", "ia3", "adapter", "bitfit"), keep=("lora prefix",))
)
def test_every_kind_equals_generate_alone(tiny_loaded, task_root, names):
    """Mutation: a lane of another task; variables of a context's method; the wrong prompt of two;
    a row's columns beyond its own.
    """
    engine = Engine(tiny_loaded, sizes=Sizes(2, 20, 9, lanes=2, together=2, scores=False))
    for name in (*names.split(), "short", "long", "two"):
        engine.load(name, task_root / name)
    names = ["", *names.split(), "short", "long", "two:own", "two:other"]
    requests = [
        Request(names[n % len(names)], tokens, 1 + n % 9) for n, tokens in enumerate(inputs(30))
    ]
    made = [Asked(engine, request) for request in requests]
    for request, one in zip(requests, made, strict=True):
        folder = task_root / request.task.partition(":")[0] if request.task else None
        which = int(request.task == "two:other") if ":" in request.task else None
        several = None if which is None else [which]
        assert one.wait().ids == wanted(tiny_loaded, folder, request, several), request
        shared, ids = alone(tiny_loaded, folder), (request.tokens, one.ids)
        found = reference_logprobs(tiny_loaded, shared, *ids, room=32, which=which)
        np.testing.assert_allclose([token.logprob for token in one.tokens], found, atol=1e-4)
    engine.close()
    assert {info.method for info in engine.tasks()} >= {"prompt", "multitask"}


def test_one_task_moves_to_a_pool_of_its_own(engine, tiny_loaded, task_root):
    """Mutation: the pool of one lane is never used, or takes a single request."""
    request = Request("short", inputs(1)[0], 6)
    pools = engine._batcher.pools(engine._tasks["short"]).pools
    assert [pool.grid.lanes for pool in pools] == [1, 2]
    many = [Asked(engine, request) for _ in range(5)]
    ids = [one.wait().ids for one in many]
    assert ids == [wanted(tiny_loaded, task_root / "short", request)] * 5
    assert pools[0]._lanes is not None  # allocated when it was first used


def test_one_row_is_one_pool_and_no_size_is_beyond_the_context(tiny_loaded, monkeypatch):
    """Mutations: two equal pools with `rows=1`; inputs, outputs, or both together longer than the
    model's context.
    """
    made, context = [], tiny_loaded.config.context_length
    monkeypatch.setattr(placement, "Pool", lambda *a: made.append(a[-1]) or SimpleNamespace())
    monkeypatch.setattr(placement, "TextScores", lambda *a: made.append(a[-1]))
    like = SimpleNamespace(context=SimpleNamespace(slots=3), variables={})
    sizes = Sizes(rows=1, input=200_000, new=200_000).within(context)
    KindPools(tiny_loaded.model, tiny_loaded.weights, like, sizes)
    assert made == [Grid(1, 1, context, context - 1), context]
    batcher = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(engine_module, "Batcher", batcher)
    with pytest.raises(InterruptedError):
        Engine(tiny_loaded, sizes=Sizes(rows=1, input=200_000, new=200_000))
    assert batcher.call_args.args[1] == sizes


def test_echo_and_scores(engine, tiny_loaded, task_root):
    """Mutation: an echoed token has the log-probability of the next one."""
    tokens = inputs(1)[0] + (7, 8, 9)
    asked = Asked(engine, Request("long", tokens, 0, logprobs=2, echo=True)).wait()
    shared = alone(tiny_loaded, task_root / "long")
    found = reference_logprobs(tiny_loaded, shared, tokens[:1], tokens[1:], room=32)
    assert asked.ids == list(tokens)
    assert np.isnan(asked.tokens[0].logprob)
    np.testing.assert_allclose([t.logprob for t in asked.tokens[1:]], found, atol=1e-4)
    assert all(len(token.top) == 2 for token in asked.tokens[1:])
    text = "".join(token.text for token in asked.tokens)
    assert text == tiny_loaded.tokenizer.decode(tokens)
    assert asked.ticket.stream._ids[-3:] == [7, 8, 9]  # an output's text continues the input's


def test_a_waiting_request_computes_no_lane(engine, monkeypatch):
    """Mutation: the pools are looked up by the lane, which is computed again when it was evicted,
    at every step and for every request that waits.
    """
    asked, lane = [], engine._bank.lane
    monkeypatch.setattr(engine._bank, "lane", lambda task: (asked.append(task), lane(task))[1])
    many = [Asked(engine, Request(name, (5, 6), 9)) for name in ("short", "long") * 6]
    assert [one.wait().end.reason for one in many] == ["length"] * 12
    assert len(asked) <= 12


def test_inputs_that_are_only_scored_keep_to_the_budget(tiny_loaded, monkeypatch):
    """Mutation: such an input costs nothing, or is run before the budget is looked at."""
    monkeypatch.setattr(batching, "PREFILL", 64)
    bank = Bank(tiny_loaded)
    request, stream = Request("", (5, 6), 0, echo=True), TextStream(tiny_loaded.tokenizer)
    tickets = [Ticket(request, print, bank.base, stream) for _ in range(5)]
    assert Batcher(bank, Sizes()).join(tickets) == tickets[2:]


def test_draws_depend_on_the_seed_alone(engine):
    """Mutation: the key from the slot or from the number of requests so far."""
    draw = functools.partial(Request, "lora", inputs(1)[0], 9, temperature=1.5, logprobs=1)
    first = Asked(engine, draw(seed=5)).wait()
    beside = [Asked(engine, draw(seed=seed)) for seed in (1, 5, 5, 2)]
    ids = [one.wait().ids for one in beside]
    assert ids[1] == ids[2] == first.ids
    assert ids[0] != ids[1] != ids[3]
    assert any(token.id != token.top[0][0] for token in first.tokens)


def test_rows_finish_on_the_old_version(engine, tiny_loaded, task_root, tmp_path):
    """Mutation: a name is looked up when a row joins; a failed load drops the old version."""
    old, new = task_root / "short", tmp_path / "new"
    make_task(new, tiny_loaded, seed=77, **METHODS["short"])

    def versions(request):
        return [wanted(tiny_loaded, folder, request) for folder in (old, new)]

    several = (Request("changing", tokens, 9) for tokens in inputs(50))
    request = next(one for one in several if len({*map(tuple, versions(one))}) == 2)
    engine.load("changing", old)
    before = [Asked(engine, request) for _ in range(6)]
    engine.load("changing", new)
    after = Asked(engine, request)
    ids = [[*one.wait().ids] for one in (*before, after)]
    assert ids == [versions(request)[0]] * 6 + [versions(request)[1]]
    with pytest.raises(UserError, match="not a trial's folder"):
        engine.load("changing", tmp_path / "none")
    assert Asked(engine, request).wait().ids == after.ids
    engine.unload("changing")
    for late in (lambda: engine.submit(request, print), lambda: engine.unload("changing")):
        with pytest.raises(NoTask, match="unknown task 'changing'") as raised:
            late()  # also of a task that is unloaded while its request is read
        assert status_of(raised.value) == 404


def test_a_cancelled_request_frees_its_row(engine):
    """Mutation: a cancelled row runs on, or one that waits is never told."""
    request = Request("long", inputs(1)[0], 9)
    many = [Asked(engine, request) for _ in range(8)]
    for one in many[1:]:
        engine.cancel(one.ticket)
    assert many[0].wait().end.reason == "length"
    reasons = [one.wait().end.reason for one in many[1:]]
    assert "cancelled" in reasons
    assert engine.stats()["running"] == 0
    assert Asked(engine, request).wait().ids == many[0].ids


def test_known_kinds_do_not_wait_for_the_compiler(engine):
    """Mutation: a request for a loaded kind waits while another thread compiles a new kind."""
    with engine._batcher._lock:  # as a thread that compiles has it
        assert Asked(engine, Request("short", inputs(1)[0], 2)).wait().end.reason == "length"


def test_a_task_that_overflows_ends_with_an_error(engine, tiny_loaded, task_root, tmp_path):
    """Mutation: NaN is a log-probability like any other."""
    folder = make_task(tmp_path / "large", tiny_loaded, seed=1, **METHODS["lora"])
    delta, origin = load_delta(folder / "delta.safetensors")
    large = jax.tree.map(lambda leaf: leaf * 1e30, delta)
    save_delta(folder / "delta.safetensors", large, origin)
    engine.load("large", folder)
    request = Request("large", inputs(1, most=4)[0], 9)
    for one in [Asked(engine, request) for _ in range(4)]:
        assert one.wait().end.reason == "error"
        assert "'large' gives probabilities that are not finite" in one.end.error
    request = Request("lora", inputs(1)[0], 9)
    ids = [one.wait().ids for one in [Asked(engine, request) for _ in range(4)]]
    assert ids == [wanted(tiny_loaded, task_root / "lora", request)] * 4


def test_a_caller_that_fails_loses_its_own_row_only(engine):
    """Mutation: the error of a callback ends the engine's thread."""

    def fail(event):
        raise ValueError("a caller's mistake")

    engine.submit(Request("", (5, 6), 9), fail)
    assert Asked(engine, Request("", (5, 6), 3)).wait().end.reason == "length"
    assert engine.ready()


def test_bad_requests_and_a_full_queue(engine, tiny_loaded):
    """Mutation: drop a check."""
    tokens = (5, 6)
    for request, field in [
        (Request("none", tokens, 3), "unknown task 'none'"),
        (Request("", (), 3), "the input has 0 tokens"),
        (Request("", (5,) * 21, 3), "21 tokens; allowed: 1 to 20"),
        (Request("", (5,) * 30, 0, echo=True), "30 tokens; allowed: 1 to 29"),
        (Request("", (5, 400), 3), "token id 400; allowed: 0 to 319"),
        (Request("", tokens, 0), "max_new is 0; allowed: 1 to 9"),
        (Request("", tokens, 3, temperature=float("nan")), "temperature is nan"),
        (Request("", tokens, 3, top_k=-1), "top_k is -1"),
        (Request("", tokens, 3, top_p=0), "top_p is 0"),
        (Request("", tokens, 3, seed=-1), "seed is -1"),
        (Request("", tokens, 3, logprobs=6), "logprobs is 6; allowed: 0 to 5"),
        (Request("", tokens, 3, stop=("",)), "stop is "),
    ]:
        with pytest.raises(UserError, match=field.replace("(", r"\(")):
            engine.submit(request, print)
    entered, go = threading.Event(), threading.Event()
    engine.submit(Request("", tokens, 1), lambda event: (entered.set(), go.wait(60)))
    assert entered.wait(60)
    engine._most, most = 3, engine._most  # one joins
    waiting = [Asked(engine, Request("", tokens, 1)) for _ in range(2)]
    with pytest.raises(Busy, match="3 requests wait"):
        engine.submit(Request("", tokens, 1), print)
    engine._most = most
    go.set()
    assert [one.wait().end.reason for one in waiting] == ["length"] * 2


def test_stop_texts_and_eos_end_a_row(engine, tiny_loaded):
    """Mutation: EOS is a token of the output; the stop text is."""
    for tokens in inputs(50):
        whole = Asked(engine, Request("", tokens, 9)).wait()
        text = "".join(token.text for token in whole.tokens)
        if letters := [letter for letter in text[1:] if letter.isascii()]:
            break
    stop = letters[0]
    cut = Asked(engine, Request("", tokens, 9, stop=(stop,))).wait()
    assert "".join(token.text for token in cut.tokens) == text[: text.index(stop)]
    assert cut.end.reason == "stop"
    eos = engine._batcher._eos
    engine._batcher._eos = whole.ids[4]
    ended = Asked(engine, Request("", tokens, 9)).wait()
    engine._batcher._eos = eos
    assert ended.ids == whole.ids[: whole.ids.index(whole.ids[4])]
    assert (ended.end.reason, ended.end.completion_tokens) == ("stop", len(ended.ids))


def test_a_thread_that_dies_ends_every_request_once(tiny_loaded, monkeypatch, caplog):
    """Mutations: a request that has finished, or that runs, is finished again; the error's text
    reaches clients, or the log has no traceback; a stopped engine blames the request.
    """
    engine = Engine(tiny_loaded, sizes=Sizes(rows=2, input=20, new=9, scores=False))

    def fail(pool, rows):
        raise RuntimeError("an internal text")

    monkeypatch.setattr(Pool, "join", fail)
    with engine._wake:  # so that both are joined at once
        echoed = Asked(engine, Request("", (5, 6), 0, echo=True))
        joined = Asked(engine, Request("", (5, 6), 3))
    engine._thread.join(60)
    assert (echoed.wait().end.reason, joined.wait().end.reason) == ("length", "error")
    assert engine.stats()["requests"] == 2
    assert "an internal text" not in joined.end.error
    assert "Traceback" in caplog.text and "an internal text" in caplog.text
    with pytest.raises(Stopped) as raised:
        engine.submit(Request("", (5, 6), 3), print)
    assert status_of(raised.value) == 503


def test_closing_cancels_what_is_left(tiny_loaded):
    """Mutation: `close` waits for all rows, or leaves their callers without an event."""
    engine = Engine(tiny_loaded, sizes=Sizes(rows=2, input=20, new=9, scores=False))
    made = [Asked(engine, Request("", (5, 6), 9)) for _ in range(30)]
    engine.close()
    assert made[-1].wait().end.reason == "cancelled"
    assert not engine.ready()
    with pytest.raises(Stopped):
        engine.submit(Request("", (5, 6), 9), print)
