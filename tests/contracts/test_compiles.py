"""Contract 10: one trial compiles its step once, and trials that may share it do."""

import collections
import itertools

import jax
import pytest

from softprompt.trials.run import run_trial
from tests.contracts.examples import session, trial_config, write_task
from tests.contracts.trials import alone, apart, configs, outcome, run
from tests.matrix import matrix

TRIALS = (
    {"seed": 0},
    {"seed": 1, "method__init": "uniform"},
    {"method__init": "labels", "optimizer__rate": 0.5},
    {"method__init": "text", "method__init_text": "good", "optimizer__schedule": "linear"},
    {"optimizer__rate_unit": "embedding_rms", "optimizer__warmup": 2, "train__steps": 5},
)
AVERAGED = {"train__ema": 0.9, "optimizer__name": "sgd"}
CAPPED = tuple({**AVERAGED, "optimizer__max_row_norm": cap} for cap in (0.5, 2.0))
GRID = tuple(
    {"method__length": length, "seed": seed, "method__init": init, "train__steps": 2}
    for length, seed, init in itertools.product((3, 5), (0, 1), ("vocabulary", "uniform"))
)

DROPS = ((0.1, 0.4), (0.3, 0.2))  # of the model, and of the method

STEPS, SCORING = ("train_step", "population_step"), ("score", "shared_part")
EVENTS = {  # what jax calls them
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/backend_compile_duration": "compiled",
}


@pytest.fixture
def programs():
    """Counts what jax itself says it traced and compiled, in whatever thread.

    A function of the programs asked for that returns {"traced": {program: times}, "compiled": the
    same}. All are made anew, for another test of this process may have them.
    """
    told = []  # appending is safe in threads

    def listen(event, seconds, *, fun_name="", **more):
        if event in EVENTS:
            told.append((EVENTS[event], fun_name.removeprefix("jit(").removesuffix(")")))

    def count(names=(*STEPS, *SCORING)):
        found = collections.Counter(told)
        return {
            kind: {name: found[kind, name] for name in names if found[kind, name]}
            for kind in EVENTS.values()
        }

    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield count
    jax.monitoring.unregister_event_duration_listener(listen)


def each(times, *names):
    """What `programs` says where each of these was traced and compiled so many times."""
    return {kind: dict.fromkeys(names, times) for kind in EVENTS.values()}


def test_trials_share_one_step(tiny_folder, tmp_path, programs):
    """Mutation: the initialiser is part of the method's static configuration; the key of a compiled
    step has the first prompt in it, or lacks the shapes; the step is compiled twice.
    """
    source = write_task(tmp_path)
    with session() as shared:
        for n, changes in enumerate(TRIALS):
            config = trial_config(tiny_folder, source, **changes)
            row = run_trial(config, tmp_path / str(n), session=shared)
            assert row["status"] == "done"
            assert (row["compile_seconds"] > 0) == (n == 0)
            assert len(shared.compiled) == 1
            assert programs() == each(1, "train_step", *SCORING)
        config = trial_config(tiny_folder, source, method__length=4)
        run_trial(config, tmp_path / "shorter", session=shared)
        assert len(shared.compiled) == 2
        assert programs() == each(2, "train_step", *SCORING)


@pytest.mark.matrix
def test_averaged_and_capped_trials_share_one_step(tiny_folder, tmp_path, programs):
    """Mutation: the largest norm of a row is static."""
    source = write_task(tmp_path)
    with session() as shared:
        for n, changes in enumerate((*CAPPED, {**CAPPED[0], "seed": 1, "optimizer__rate": 0.1})):
            config = trial_config(tiny_folder, source, **changes)
            run_trial(config, tmp_path / str(n), session=shared)
        assert len(shared.compiled) == 1
    assert programs(STEPS) == each(1, "train_step")


@pytest.mark.matrix
@pytest.mark.parametrize("method", ("prompt", "lora"))
def test_trials_of_unlike_dropout_share_one_step(tiny_folder, tmp_path, programs, method):
    """And the second is what it is alone, at its own rates. Mutations: what is kept is static; it
    is that of the session's first trial.
    """
    some = [{"train__dropout": model, "method__dropout": own} for model, own in DROPS]
    trials = configs(tiny_folder, tmp_path, some, method__name=method)
    with session() as shared:
        ours = [outcome(config, tmp_path / str(n), shared) for n, config in enumerate(trials)]
        assert len(shared.compiled) == 1
    assert programs() == each(1, "train_step", *SCORING)
    assert min(apart(*ours)) > 1e-3
    assert max(apart(ours[1], alone(trials[1], tmp_path / "alone"))) <= 1e-5


@pytest.mark.parametrize(
    "population", matrix([1, 4], keep=[4]), ids=["one after another", "four together"]
)
def test_a_whole_sweep_traces_a_program_a_length(tiny_folder, tmp_path, programs, population):
    """Eight trials, one after another and stacked: of each length one step is traced and compiled,
    one context and one scoring program.

    Mutations: the seed is part of the step's static configuration; a scoring function is made anew
    for a trial; a place that another trial takes is compiled anew.
    """
    source = write_task(tmp_path)
    trials = [
        trial_config(tiny_folder, source, compute__population=population, **one) for one in GRID
    ]
    with session() as shared:
        assert run(trials, tmp_path / "sweep", shared) == []
    step = "train_step" if population == 1 else "population_step"
    assert programs() == each(2, step, *SCORING)
