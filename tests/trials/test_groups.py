"""Trials of a sweep that run at a time: contract 6, and what becomes of each."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from softprompt.results import read_result
from softprompt.trials import groups as together
from softprompt.trials import session as sessions
from softprompt.trials.groups import Together
from softprompt.trials.population import Population
from softprompt.trials.run import run_trial
from softprompt.trials.sweep import run_sweep, trial_folder
from tests.contracts.examples import session
from tests.contracts.test_population import OTHER, TRIALS, alone, apart, configs
from tests.tiny import write_llama_folder

FIRST, ANY = TRIALS[0], {"mesh__population": 4}


def run(trials, workdir, shared):
    """Runs a sweep; returns the rows that failed."""
    return run_sweep(
        trials,
        workdir,
        lambda config, folder: run_trial(config, folder, session=shared),
        progress=shared.progress,
        together=Together(shared),
    )


def outcome(folder):
    """The loss of every step and the last delta of a finished trial."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    delta = load_file(folder / "delta.safetensors")
    return np.array(losses), np.concatenate([delta[name].ravel() for name in sorted(delta)])


def rows_of(trials, workdir):
    return [read_result(trial_folder(workdir, config)) for config in trials]


@pytest.fixture(autouse=True)
def apart_on(request):
    """Where trials run side by side: by default nowhere, so that they take their steps together."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(together, "APART", getattr(request, "param", ()))
        yield


CPU = pytest.mark.parametrize("apart_on", [("cpu",)], indirect=True, ids=["apart"])
BOTH = pytest.mark.parametrize("apart_on", [(), ("cpu",)], indirect=True, ids=["together", "apart"])


def test_each_is_as_it_were_alone(tiny_folder, tmp_path):
    """Contract 6, with unlike dropout too. Mutations: a member gets its neighbour's result, or the
    first one's batch, or drops as much as the first one."""
    rates = zip((*TRIALS, OTHER), (0.1, 0.3, 0.2, 0.1), strict=True)
    some = [{**one, "train__dropout": rate} for one, rate in rates]
    trials, workdir = configs(tiny_folder, tmp_path, some, **ANY), tmp_path / "sweep"
    with session() as shared:
        assert run(trials, workdir, shared) == []
        assert len(shared.compiled) == 2  # three together, and one whose optimizer is another
    assert [row["members"] for row in rows_of(trials, workdir)] == [3, 3, 3, 1]
    for n, config in enumerate(trials):
        ours = outcome(trial_folder(workdir, config))
        assert max(apart(ours, alone(config, tmp_path / f"alone{n}"))) <= 1e-5


@CPU
def test_side_by_side_to_the_bit(tiny_folder, tmp_path):
    """Mutation: threads compile a program each."""
    trials = configs(tiny_folder, tmp_path, TRIALS, **ANY)
    with session() as shared:
        assert run(trials, tmp_path / "sweep", shared) == []
        assert len(shared.compiled) == 1
    rows = rows_of(trials, tmp_path / "sweep")
    assert [row["members"] for row in rows] == [3] * 3
    assert sum(row["compile_seconds"] > 0 for row in rows) == 1
    for n, config in enumerate(trials):
        ours = outcome(trial_folder(tmp_path / "sweep", config))
        assert apart(ours, alone(config, tmp_path / f"alone{n}")) == (0, 0)


def test_in_bfloat16(tiny_folder, tmp_path):
    """Contract 6: no further from a trial alone than three times what rounding makes of that, by
    its distance from float32. (The order of rows is no measure: it changes no row's roundings.)
    Mutations: a member gets its neighbour's result, or the first one's batch."""

    def trials(dtype):
        return configs(tiny_folder, tmp_path, TRIALS, model__dtype=dtype, **ANY)

    def solo(dtype):
        return [alone(c, tmp_path / f"{dtype}{n}") for n, c in enumerate(trials(dtype))]

    with session() as shared:
        assert run(trials("bfloat16"), tmp_path / "sweep", shared) == []
    ours = [outcome(trial_folder(tmp_path / "sweep", config)) for config in trials("bfloat16")]
    rough, exact = solo("bfloat16"), solo("float32")
    noise = np.max(list(map(apart, rough, exact)), axis=0)
    assert (np.max(list(map(apart, ours, rough)), axis=0) <= 3 * noise).all()
    assert min(apart(ours[0], ours[1])) > 3 * max(noise)  # they are different trials


DROPS = (
    ("train__dropout", {}),
    ("method__dropout", {}),
    ("method__dropout", {"method__name": "lora"}),
)


@pytest.mark.parametrize(("name", "more"), DROPS, ids=["model", "prompt", "lora"])
def test_how_much_is_dropped_is_data(tiny_folder, tmp_path, name, more):
    """Whether something is, and what, is not. Mutations: a rate tells groups apart; a trial without
    one is of the group; what is dropped is not looked at."""
    other = "method__dropout" if name == "train__dropout" else "train__dropout"
    some = [{**FIRST, **one} for one in ({name: 0.1}, {name: 0.3}, {}, {other: 0.1})]
    with session() as shared:
        plan = [*Together(shared).plan(configs(tiny_folder, tmp_path, some, **ANY, **more))]
    assert plan == [([0, 1], 2), ([2], 1), ([3], 1)]


@BOTH
def test_a_free_place_is_taken_and_a_failure_is_one_trial_s(tiny_folder, tmp_path):
    """Five trials in two places, one of which diverges: one program. Mutations: the next trial
    waits for the whole group; the others of a failed step's program fail with it."""
    some = [{**FIRST, "seed": seed} for seed in range(4)]
    some.insert(1, {**FIRST, "optimizer__rate": 1e30})
    trials = configs(tiny_folder, tmp_path, some, mesh__population=2)
    workdir = tmp_path / "sweep"
    with session() as shared:
        failed = run(trials, workdir, shared)
        assert len(shared.compiled) == 1
    assert [
        ("not finite" in row["error"], row["config"]["optimizer"]["rate"]) for row in failed
    ] == [(True, 1e30)]
    rows = [row for row in rows_of(trials, workdir) if row["status"] == "done"]
    assert [row["members"] for row in rows] == [2] * 4
    ours = outcome(trial_folder(workdir, trials[4]))
    assert max(apart(ours, alone(trials[4], tmp_path / "alone"))) <= 1e-5


def test_who_stops_early_leaves(tiny_folder, tmp_path):
    """Three stop after two validations, one goes on. Mutations: those who are over are waited for,
    or keep their places, so that there is one program and not two."""
    short, long = {"train__steps": 2}, {"train__steps": 6}
    some = [{**FIRST, "seed": seed, **(long if seed == 3 else short)} for seed in range(4)]
    trials, workdir = configs(tiny_folder, tmp_path, some, **ANY), tmp_path / "sweep"
    with session() as shared:
        assert run(trials, workdir, shared) == []
        assert sorted(key[1] for key in shared.compiled) == [1, 4]
    assert [row["steps"] for row in rows_of(trials, workdir)] == [2, 2, 2, 6]


def test_an_interrupted_sweep_saves_every_member(tiny_folder, tmp_path, monkeypatch):
    """Contract 9. Mutation: members are left to their threads, or hear nothing."""
    some = [{**FIRST, "seed": seed} for seed in range(2)]
    trials = configs(tiny_folder, tmp_path, some, log__checkpoint_every=100, **ANY)
    begun = []

    def interrupt(futures):
        end = time.monotonic() + 300
        while len(begun) < 4 and time.monotonic() < end:  # some steps of both
            time.sleep(0.01)
        raise SystemExit(75)

    class Counting(together.Population):
        def join(self, *given):
            meeting = super().join(*given)

            def step(*arguments):
                begun.append(1)
                if len(begun) >= 4:
                    self.stopping.wait()
                return meeting(*arguments)

            return step

    monkeypatch.setattr(together, "as_completed", interrupt)
    monkeypatch.setattr(together, "Population", Counting)
    with session() as shared, pytest.raises(SystemExit):
        run(trials, tmp_path / "sweep", shared)
    monkeypatch.undo()
    folders = [trial_folder(tmp_path / "sweep", config) for config in trials]
    assert all(list((folder / "checkpoints").glob("[0-9]*")) for folder in folders)
    with session() as shared:
        assert run(trials, tmp_path / "sweep", shared) == []
    for n, folder in enumerate(folders):
        assert max(apart(outcome(folder), alone(trials[n], tmp_path / f"alone{n}"))) <= 1e-5


def test_what_is_never_grouped(tiny_folder, tmp_path, monkeypatch):
    """Mutations: full fine-tuning shares a program, which has a copy of the weights for each; a
    population of one is a group; trials are timed beside others; what does not fit into memory is
    grouped nevertheless."""
    source = (*({**FIRST, "seed": seed} for seed in range(2)),)
    with session() as shared:
        plan = lambda trials: [*Together(shared).plan(trials)]  # noqa: E731
        assert plan(configs(tiny_folder, tmp_path, source, **ANY)) == [([0, 1], 2)]
        for changes in (
            {"method__name": "full"},
            {"mesh__population": 1},
            {"eval__latency": True},
        ):
            trials = configs(tiny_folder, tmp_path, source, **(ANY | changes))
            assert plan(trials) == [([0], 1), ([1], 1)]
        none = {"method__name": "none", **ANY}
        assert plan(configs(tiny_folder, tmp_path, (none,))) == [([0], 1)]
        monkeypatch.setattr(together, "device_memory", lambda: 1)
        assert plan(configs(tiny_folder, tmp_path, source, **ANY)) == [([0], 1), ([1], 1)]


def test_trials_of_unlike_weights_are_apart(tiny_folder, tmp_path):
    """Two models of equal shapes, in turns; a CPU runs two trials at a time by itself. Mutations:
    one model's trial steps on the other's weights; all models are loaded before the first group
    runs.
    """
    other = write_llama_folder(tmp_path / "other", seed=1)
    trials = [
        config
        for seed in range(2)
        for model in (tiny_folder, other)
        for config in configs(model, tmp_path, ({**FIRST, "seed": seed},), mesh__population=0)
    ]
    with session() as shared:
        groups = Together(shared).plan(trials)
        assert next(groups) == ([0, 2], 2)
        assert len(shared._models) == 1
        assert [*groups] == [([1, 3], 2)]


def test_members_have_one_model():
    """Mutation: a member's weights are not looked at."""
    population, weights = Population(), ({"w": 1}, {"w": 2})
    meeting = population.join("key", lambda places: lambda members, weights: list(members), print)
    meeting({}, {}, weights[0], {}, 0)
    with pytest.raises(AssertionError, match="one model"):
        meeting({}, {}, weights[1], {}, 0)


def test_waiting_for_others_is_no_time_of_a_step():
    """Mutations: what a member waits for the last to come counts; what all wait for the program
    does; the step itself does not."""
    population, weights = Population(), {}

    def compile(places):
        time.sleep(0.4)

        def program(members, weights):
            time.sleep(0.4)
            return list(members)

        return program

    def trial(late):
        with population.trial():
            meeting = population.join("key", compile, print)
            time.sleep(late)
            began = time.monotonic()
            meeting({}, {}, weights, {}, 0)
            return time.monotonic() - began - meeting.idle()

    population.coming = population.queued = 2
    with ThreadPoolExecutor(2) as pool:
        taken = list(pool.map(trial, (0.0, 0.8), timeout=60))
    assert taken == pytest.approx([0.4, 0.4], abs=0.2)


def test_what_a_row_says_of_its_steps(tiny_folder, tmp_path, monkeypatch):
    """Mutation: a step of several together takes as long as their compilation."""
    compiled = sessions.compile_population

    def slow(*arguments):
        time.sleep(3)
        return compiled(*arguments)

    monkeypatch.setattr(sessions, "compile_population", slow)
    some = [{**FIRST, "seed": seed} for seed in range(2)]
    trials = configs(tiny_folder, tmp_path, some, **ANY, train__steps=2)
    with session() as shared:
        assert run(trials, tmp_path / "sweep", shared) == []
    for row in rows_of(trials, tmp_path / "sweep"):
        assert 0 < row["step_seconds"] < 1


def test_places_are_kept_while_trials_are_queued():
    """Mutation: what three of four leave is compiled anew, though others are about to come."""
    population, compiled = Population(), []

    def compile(places):
        compiled.append(places)
        return lambda members, weights: list(members)

    meeting, weights, population.queued = population.join("key", compile, print), {}, 1
    meeting.programs[4] = compile(4)
    meeting({}, {}, weights, {}, 0)
    assert compiled == [4]
    population.queued = 0
    meeting({}, {}, weights, {}, 0)
    assert compiled == [4, 1]


def test_as_many_steps_are_taken_at_a_time_as_memory_has_room_for():
    """Mutations: an error for want of memory is everybody's; any error is taken for one; a part's
    results go to others; one less is tried, not half; what did not fit is kept, and counted."""
    population, compiled, said = Population(), [], []

    def compile(places):
        def program(members, weights):
            if places > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            if any(member.key == "broken" for member in members):
                raise jax.errors.JaxRuntimeError("INTERNAL: broken")
            return [(member.key, member.batch) for member in members]

        compiled.append(places)
        return program

    weights, keys = {}, "abcde"
    meeting = population.join("key", compile, said.append)

    def trial(key):
        with population.trial():
            population.join("key", compile, said.append)
            first, second = (meeting({}, {}, weights, n, key) for n in range(2))
        return first, second

    population.leave()
    population.coming = population.queued = 5
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(trial, keys, timeout=60))
    assert found == [((key, 0), (key, 1)) for key in keys]
    assert (compiled, meeting.places) == ([5, 2], 2)
    assert said == ["no memory for 5 steps together: 2 at a time from now on"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        trial("broken")
    assert len(said) == 1


def test_who_has_not_come_is_not_waited_for_at_the_end():
    """Mutation: a population that stops still waits for the threads that were to start."""
    population, weights = Population(), {}
    population.coming = 1
    meeting = population.join("key", lambda places: lambda members, weights: list(members), print)
    with ThreadPoolExecutor(1) as pool:

        def step():
            population.join("key", lambda places: None, print)
            return meeting({}, {}, weights, {}, 0)

        population.leave()
        waiting = pool.submit(step)
        assert not waiting.done()
        population.stop()
        assert waiting.result(timeout=20)
    assert population.stopping.is_set()
