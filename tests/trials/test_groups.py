"""Trials of a sweep that run at a time: contract 6, and what becomes of each."""

import os
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from softprompt.results import read_result
from softprompt.training.loop import Pauses
from softprompt.training.step import StepCall
from softprompt.trials import groups, programs
from softprompt.trials.groups import trial_groups
from softprompt.trials.programs import Static, StepProgram
from softprompt.trials.sweep import trial_folder
from tests.contracts.examples import session
from tests.contracts.trials import OTHER, TRIALS, alone, apart, configs, ended, run
from tests.matrix import matrix
from tests.tiny import write_llama_folder

FIRST, ANY = TRIALS[0], {"compute__population": 4}


def rows_of(trials, workdir):
    return [read_result(trial_folder(workdir, config)) for config in trials]


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
        ours = ended(trial_folder(workdir, config))
        assert max(apart(ours, alone(config, tmp_path / f"alone{n}"))) <= 1e-5


@pytest.mark.matrix
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
    ours = [ended(trial_folder(tmp_path / "sweep", config)) for config in trials("bfloat16")]
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
        found = [*trial_groups(shared, configs(tiny_folder, tmp_path, some, **ANY, **more))]
    assert found == [([0, 1], 2), ([2], 1), ([3], 1)]


def test_a_free_place_is_taken_and_a_failure_is_one_trial_s(tiny_folder, tmp_path):
    """Five trials in two places, one of which diverges: one program. Mutations: the next trial
    waits for the whole group; the others of a failed step's program fail with it."""
    some = [{**FIRST, "seed": seed} for seed in range(4)]
    some.insert(1, {**FIRST, "optimizer__rate": 1e30})
    trials = configs(tiny_folder, tmp_path, some, compute__population=2)
    workdir = tmp_path / "sweep"
    with session() as shared:
        failed = run(trials, workdir, shared)
        assert len(shared.compiled) == 1
    assert [
        ("not finite" in row["error"], row["config"]["optimizer"]["rate"]) for row in failed
    ] == [(True, 1e30)]
    rows = [row for row in rows_of(trials, workdir) if row["status"] == "done"]
    assert [row["members"] for row in rows] == [2] * 4
    ours = ended(trial_folder(workdir, trials[4]))
    assert max(apart(ours, alone(trials[4], tmp_path / "alone"))) <= 1e-5


def test_a_step_that_fails_ends_every_trial_of_it(tiny_folder, tmp_path, monkeypatch):
    """Mutations: the trials of a failed step are stepped again; their folders stay locked."""

    def steps(program, calls, **options):
        raise RuntimeError(f"{len(calls)} trials")

    monkeypatch.setattr(StepProgram, "steps", steps)
    some = [{**FIRST, "seed": seed} for seed in range(3)]
    trials = configs(tiny_folder, tmp_path, some, compute__population=2)
    with session() as shared:
        failed = run(trials, tmp_path / "sweep", shared)
    assert [row["error"][-8:] for row in failed] == ["2 trials", "2 trials", "1 trials"]
    assert list((tmp_path / "sweep").glob("*/.lock")) == []


@pytest.mark.matrix
def test_no_place_is_taken_when_the_time_is_over(tiny_folder, tmp_path, monkeypatch):
    """Mutation: a member that is running is stopped; a free place is taken late."""
    trials = configs(tiny_folder, tmp_path, [{**FIRST, "seed": n} for n in range(3)], **ANY)
    jobs = [(config, tmp_path / "sweep" / str(n)) for n, config in enumerate(trials)]
    asked = []
    with session() as shared:
        time_over = lambda: asked.append(1) or len(asked) > 3  # noqa: E731
        ended = [index for index, _ in groups.run_group(shared, jobs, 2, None, time_over)]
    assert sorted(ended) == [0, 1]
    assert not (tmp_path / "sweep" / "2").exists()


@pytest.mark.matrix
def test_who_stops_early_leaves(tiny_folder, tmp_path):
    """Three stop after two validations, one goes on. Mutations: those that are over are waited for,
    or keep their places, so that there is one program and not two."""
    short, long = {"train__steps": 2}, {"train__steps": 6}
    some = [{**FIRST, "seed": seed, **(long if seed == 3 else short)} for seed in range(4)]
    trials, workdir = configs(tiny_folder, tmp_path, some, **ANY), tmp_path / "sweep"
    with session() as shared:
        assert run(trials, workdir, shared) == []
        assert sorted(key[1] for key in shared.compiled) == [1, 4]
    assert [row["steps"] for row in rows_of(trials, workdir)] == [2, 2, 2, 6]


@pytest.mark.parametrize("number", matrix([signal.SIGTERM, signal.SIGINT], keep=[signal.SIGTERM]))
def test_an_interrupted_sweep_saves_every_member(tiny_folder, tmp_path, monkeypatch, number):
    """Contract 9. Mutation: the members after the first that leaves are not driven to their end."""
    some = [{**FIRST, "seed": seed} for seed in range(3)]
    changes = {"log__checkpoint_every": 100, "compute__population": 2}
    trials = configs(tiny_folder, tmp_path, some, **changes)
    taken, step = [], StepProgram._stacked

    def interrupt(self, *given, **more):
        taken.append(1)
        if len(taken) == 3:
            os.kill(os.getpid(), number)
        return step(self, *given, **more)

    monkeypatch.setattr(StepProgram, "_stacked", interrupt)
    expected = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    with session() as shared, pytest.raises(expected):
        run(trials, tmp_path / "sweep", shared)
    monkeypatch.undo()
    folders = [trial_folder(tmp_path / "sweep", config) for config in trials]
    saved = [list((folder / "checkpoints").glob("[0-9]*")) for folder in folders]
    assert list(map(len, saved)) == [1, 1, 0], "the third had not begun"
    with session() as shared:
        assert run(trials, tmp_path / "sweep", shared) == []
    for n, folder in enumerate(folders):
        assert max(apart(ended(folder), alone(trials[n], tmp_path / f"alone{n}"))) <= 1e-5


def test_what_is_never_grouped(tiny_folder, tmp_path, monkeypatch):
    """Mutations: full fine-tuning shares a program, which has a copy of the weights for each; a
    population of one is a group; trials are timed beside others; what does not fit into memory is
    grouped nevertheless; a group is wider than one of its trials allows."""
    source = (*({**FIRST, "seed": seed} for seed in range(2)),)
    with session() as shared:
        assert [*trial_groups(shared, configs(tiny_folder, tmp_path, source, **ANY))] == [
            ([0, 1], 2)
        ]
        for changes in (
            {"method__name": "full"},
            {"compute__population": 1},
            {"eval__latency": True},
        ):
            trials = configs(tiny_folder, tmp_path, source, **(ANY | changes))
            assert [*trial_groups(shared, trials)] == [([0], 1), ([1], 1)]
        widths = [{**FIRST, "seed": n, "compute__population": p} for n, p in enumerate((4, 2, 4))]
        found = trial_groups(shared, configs(tiny_folder, tmp_path, widths))
        assert [*found] == [([0, 1, 2], 2)]
        none = {"method__name": "none", **ANY}
        assert [*trial_groups(shared, configs(tiny_folder, tmp_path, (none,)))] == [([0], 1)]
        monkeypatch.setattr(groups, "device_memory", lambda: 1)
        trials = configs(tiny_folder, tmp_path, source, **ANY)
        assert [*trial_groups(shared, trials)] == [([0], 1), ([1], 1)]


def test_trials_of_unlike_weights_are_apart(tiny_folder, tmp_path):
    """Two models of equal shapes in one sweep. Mutations: one model's trial steps on the other's
    weights; all models are loaded before the first group runs.
    """
    other = write_llama_folder(tmp_path / "other", seed=1)
    trials = [
        config
        for seed in range(2)
        for model in (tiny_folder, other)
        for config in configs(model, tmp_path, ({**FIRST, "seed": seed},), compute__population=2)
    ]
    with session() as shared:
        found = trial_groups(shared, trials)
        assert next(found) == ([0, 2], 2)
        assert len(shared._models) == 1
        assert [*found] == [([1, 3], 2)]


def calls(program, keys, weights):
    """Steps of trials that are told apart by their keys."""
    return [StepCall(program, {}, {}, weights, key, key) for key in keys]


def take(program, some, said, *, more_to_start=False):
    """The keys and batches that a program of `fake_compiler` gives back."""
    return program.steps(some, compiling=Pauses(), more_to_start=more_to_start, say=said.append)


@pytest.fixture
def compiled(monkeypatch):
    """Programs that give back keys and batches; the widths that were compiled, in order.

    Memory has room for two places.
    """
    widths = []

    def compile(step, optimizer, mesh, arguments, width):
        def run(members, weights):
            if width > 2:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
            if any(member.dropout == "broken" for member in members):
                raise jax.errors.JaxRuntimeError("INTERNAL: broken")
            return [(member.dropout, member.batch) for member in members]

        widths.append(width)
        return run

    monkeypatch.setattr(programs, "compile_population", compile)
    return widths


def test_members_have_one_program_and_one_model(compiled):
    """Mutation: a member's weights, or its program, are not looked at."""
    one, other = StepProgram(Static(None, None, None)), StepProgram(Static(None, None, None))
    first, second = calls(one, "a", {"w": 1}) + calls(one, "b", {"w": 2})
    with pytest.raises(AssertionError, match="and weights"):
        take(one, [first, second], [])
    with pytest.raises(AssertionError, match="share a program"):
        take(other, [first], [])


def test_as_many_steps_are_taken_at_a_time_as_memory_has_room_for(compiled):
    """Mutations: an error for want of memory is everybody's; any error is taken for one; a part's
    results go to others; one less is tried, not half; what did not fit is kept, and counted."""
    program, weights, said = StepProgram(Static(None, None, None)), {}, []
    for _ in range(2):
        found = take(program, calls(program, "abcde", weights), said)
        assert found == [(key, key) for key in "abcde"]
    assert (compiled, list(program.compiled)) == ([5, 2], [2])
    assert said == ["not enough memory to run 5 steps together; running 2 at a time"]
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        take(program, calls(program, ["broken"], weights), said)
    assert len(said) == 1


def test_places_are_kept_while_trials_are_waiting(compiled):
    """Mutation: what three of four leave is compiled anew, though others are about to come."""
    program = StepProgram(Static(None, None, None))
    program.compiled[4] = lambda members, weights: [m.dropout for m in members]
    assert take(program, calls(program, "a", {}), [], more_to_start=True) == ["a"]
    assert compiled == []
    take(program, calls(program, "a", {}), [])
    assert compiled == [1]


def test_pauses_of_one_trial_are_no_time_of_another(monkeypatch):
    """Mutations: a pause inside another counts twice; the time after one counts; one that is still
    open, in which a trial's clock starts, counts at its end alone."""
    now = [0.0]
    monkeypatch.setattr("softprompt.training.loop.time", SimpleNamespace(monotonic=lambda: now[0]))
    pauses = Pauses()
    with pauses():
        now[0] = 2.0
        with pauses():
            now[0] = 5.0
            assert pauses.seconds == 5.0
    now[0] = 9.0
    assert pauses.seconds == 5.0


@pytest.mark.matrix
def test_what_a_row_says_of_its_steps(tiny_folder, tmp_path, monkeypatch):
    """Mutation: a step of several takes as long as their compilation."""

    def slowed(compile):
        return lambda *arguments: time.sleep(3) or compile(*arguments)

    monkeypatch.setattr(programs, "compile_population", slowed(programs.compile_population))
    some = [{**FIRST, "seed": seed} for seed in range(2)]
    trials = configs(tiny_folder, tmp_path, some, **ANY, train__steps=2)
    with session() as shared:
        assert run(trials, tmp_path / "sweep", shared) == []
    for row in rows_of(trials, tmp_path / "sweep"):
        assert 0 < row["step_seconds"] < 1
