"""Latency in pairs. Each test names the mutation that breaks it."""

import numpy as np
import pytest
from scipy import stats

from softprompt.config import trial_id
from softprompt.evaluation import latency
from softprompt.evaluation.latency import Served, compare, functions, in_turns, median_interval
from softprompt.inference.decode import generate
from softprompt.methods.delta_file import load_delta
from softprompt.pretrained.loading import load_model
from softprompt.trials.measure import latency_metrics
from softprompt.trials.prepare import prepare
from softprompt.trials.run import run_trial
from tests.contracts.examples import session, trial_config, two_tasks, write_task
from tests.tiny_t5 import write_complete_t5

INPUTS = [np.arange(2, 2 + n, dtype=np.int32) for n in (5, 9, 3)]


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="module")
def base(loaded):
    context = loaded.model.apply({"params": loaded.weights, "delta": {}}, method="prompt_context")
    return Served(loaded.weights, ({}, context), INPUTS)


def test_what_is_timed_is_what_generates(loaded, base):
    """Mutation: the rows end early; the inputs that come again are others."""
    _, decode = functions(loaded.model, base, mesh=None, rows=4, new=6)
    wanted = generate(
        loaded.model, loaded.weights, base.shared, [*INPUTS, INPUTS[0]], max_new=6, eos_id=None
    )
    rows = sorted(np.asarray(decode()).tolist())  # a batch is in the order of its lengths
    assert rows == sorted(wanted)


def test_turns():
    """Mutation: one goes first every time; the pairs' order is not that of the arguments."""
    calls = []
    times = in_turns(lambda: calls.append("a"), lambda: calls.append("b"), 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert np.array(times).shape == (3, 2, 2)


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a call is said to take: what it returns."""
    monkeypatch.setattr(latency, "seconds", lambda run: (run(), 0.0))


def test_overheads(monkeypatch, clock):
    """Mutation: ratios the wrong way round; a mean, not a median; prefill's per token."""
    prefills = iter([9.0, 2.0, 2.0, 2.2, 8.0, 2.0, 2.0, 2.2])  # the first two compile
    decodes = iter([9.0, 9.0, 6.2, 9.3, 12.4, 6.2, 6.2, 62.0])
    served = [lambda: next(prefills), lambda: next(decodes)]
    monkeypatch.setattr(latency, "functions", lambda *_, **__: served)
    found = compare(None, None, None, new=32, pairs=3)
    assert found["prefill_ratios"] == pytest.approx([1.1, 4.0, 1.1])
    assert found["prefill_overhead"] == pytest.approx(0.1)
    assert (found["prefill_low"], found["prefill_high"]) == pytest.approx((0.1, 3.0))
    assert found["token_ratios"] == pytest.approx([1.5, 2.0, 10.0])
    assert found["token_overhead"] == pytest.approx(1.0)
    assert found["token_base_seconds"] == pytest.approx(0.2)
    assert found["token_seconds"] == pytest.approx(0.4)


@pytest.mark.parametrize("count", [6, 9, 15, 40])
def test_the_interval_holds_the_median_often_enough(count):
    """Mutation: a place further in, or out. The ends are the narrowest pair of ranks that does."""
    values = np.arange(1.0, count + 1)
    low, high = median_interval(values[::-1].tolist())
    assert (low, high) == (low, count + 1 - low)

    def covered(rank: float) -> float:
        return 1 - 2 * float(stats.binom.cdf(rank - 1, count, 0.5))

    assert covered(low) >= 0.95 > covered(low + 1)


@pytest.mark.matrix
@pytest.mark.parametrize("method", ("prompt", "multitask", "full"))
def test_a_trial_measures_it(tiny_folder, tmp_path, method, monkeypatch):
    """What is timed answers as the trained model and the base do. Mutation: both are timed with the
    delta; with all weights trained, the base's are timed twice; of tasks none is named."""
    seen = {}

    def compare(model, base, other, *, mesh, rows):
        for name, served in (("base", base), ("other", other)):
            new = functions(model, served, mesh=mesh, rows=rows, new=2)
            seen[name] = np.asarray(new[0]()[0])
        return {"rows": rows, "token_overhead": 0.1}

    monkeypatch.setattr(latency, "compare", compare)
    changes = {"method__name": method, "optimizer__rate": 0.3}
    more, source = {"eval__latency": True, "eval__select": "last"}, write_task(tmp_path)
    more |= {"data__mixture": two_tasks(source)} if method == "multitask" else {}
    config = trial_config(tiny_folder, source, **changes, **more)
    with session() as shared:
        row = run_trial(config, tmp_path / "w", session=shared)
        loaded = shared.model(config)
        test = shared.data(config, bos=False).tasks[0].test
    assert row["metrics"]["latency"] == {"rows": 8, "token_overhead": 0.1}
    inputs = sorted(test.inputs[:8], key=len)  # a stable sort, as that of batches
    plain = [loaded.model.apply({"params": loaded.weights}, tokens)[-1] for tokens in inputs]
    np.testing.assert_allclose(seen["base"], plain, atol=1e-4)
    assert np.abs(seen["other"] - seen["base"]).max() > 1e-3
    if method == "full":
        weights, _ = load_delta(tmp_path / "w" / "delta.safetensors")
        trained = [loaded.model.apply({"params": weights}, tokens)[-1] for tokens in inputs]
        np.testing.assert_allclose(seen["other"], trained, atol=1e-4)


def test_the_base_reads_no_shots(tmp_path, monkeypatch):
    """They are a prompt of the method alone. Breaks when the base reads them too."""
    seen = []
    monkeypatch.setattr(latency, "compare", lambda model, *served, **_: seen.extend(served) or {})
    write_complete_t5(tmp_path / "t5")
    source, method = write_task(tmp_path), {"method__name": "fewshot", "method__shots": 2}
    with session() as shared:
        prepared = prepare(trial_config(tmp_path / "t5", source, **method), shared)
        plain = prepare(trial_config(tmp_path / "t5", source, method__name="none"), shared)
        latency_metrics(prepared, {})
    base, ours = seen
    for served in (base, ours):
        wanted = plain.tasks[0].test.inputs
        assert [x.tolist() for x in served.inputs] == [x.tolist() for x in wanted]
    shots = len(prepared.step.method_config.tokens)
    assert base.shared[0] == {} and len(ours.shared[0]["encoder"]["prompt"]) == shots > 10


def test_numbers_of_a_real_pair(loaded, base):
    """Mutation: what is not JSON is in the row."""
    found = compare(loaded.model, base, base, rows=2, new=2, pairs=2)
    assert {type(value) for value in found.values()} == {int, float, list}
    assert 0 < found["prefill_low"] + 1 <= found["prefill_overhead"] + 1
    assert len(found["token_ratios"]) == 2


def test_it_is_off_by_default(tiny_folder, tmp_path):
    """And an older trial's id stays. Mutation: it is on."""
    source = write_task(tmp_path)
    config = trial_config(tiny_folder, source)
    assert not config.eval.latency
    assert trial_id(config) != trial_id(trial_config(tiny_folder, source, eval__latency=True))
