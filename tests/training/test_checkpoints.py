"""Checkpoints: exact, laid out as asked, never half a one, and untouched by what comes after."""

import os
import shutil
import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.training import checkpoints
from softprompt.training.checkpoints import checkpoint_manager, restore_newest, save
from softprompt.training.optimizers import OptimizerConfig, make_optimizer, set_rate
from softprompt.training.sharding import make_mesh, replicated

NOTES = {"best_step": 3, "best_scores": {"accuracy": 0.5}, "config": {"seed": 0, "name": ""}}


@pytest.fixture
def state():
    """A state like a trial's, with numbers that a cast would change."""
    random = np.random.default_rng(0)
    delta = {"prompt": jnp.asarray(random.standard_normal((4, 6)), jnp.float32)}
    return {
        "delta": delta,
        "opt_state": make_optimizer(OptimizerConfig()).init(delta),
        "best": {"prompt": delta["prompt"] + 1e-7},
    }


def zeros(state):
    return jax.tree.map(jnp.zeros_like, state)


def latest(manager, like, *, check=lambda step, notes: None, said=None):
    """Step, arrays and notes of the newest; `said` gets what is said of others."""
    said = [] if said is None else said
    step, notes, arrays = restore_newest(manager, like, check=check, say=said.append)
    return step, arrays, notes


def check_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_the_newest_comes_back_exactly(tmp_path, state):
    with checkpoint_manager(tmp_path) as manager:
        assert restore_newest(manager, state, check=None, say=None) is None
        save(manager, 3, zeros(state), {})
        save(manager, 7, state, NOTES)
    with checkpoint_manager(tmp_path) as manager:
        step, found, notes = latest(manager, zeros(state))
    assert (step, notes) == (7, NOTES)
    check_equal(found, state)


def test_arrays_get_the_layout_of_the_state_they_replace(tmp_path, state):
    """A trial may go on with another mesh."""
    with checkpoint_manager(tmp_path) as manager:
        save(manager, 1, state, NOTES)
        manager.wait_until_finished()
        whole = replicated(make_mesh(2, 4))
        _, found, _ = latest(manager, jax.device_put(zeros(state), whole))
    for leaf in jax.tree.leaves(found):
        assert leaf.sharding.is_equivalent_to(whole, leaf.ndim)
    check_equal(found, state)


def test_arrays_without_entries_come_back(tmp_path):
    """Mutation: they are handed to orbax, which refuses them; they come back as None."""
    state = {"delta": {"prompt": jnp.zeros((0, 6))}, "best": {"prompt": jnp.zeros((0, 6))}}
    state["opt_state"] = make_optimizer(OptimizerConfig()).init(state["delta"])
    with checkpoint_manager(tmp_path) as manager:
        save(manager, 1, state, NOTES)
        manager.wait_until_finished()
        step, found, notes = latest(manager, zeros(state))
    assert (step, notes) == (1, NOTES)
    check_equal(found, state)


def test_the_last_two_are_kept(tmp_path, state):
    with checkpoint_manager(tmp_path) as manager:
        for step in (1, 2, 3):
            save(manager, step, state, NOTES)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["2", "3"]


def test_what_is_saved_may_be_donated(tmp_path, state):
    """The loop goes on at once, in the same memory. Mutation: save views instead of copies.

    A large array, so that writing takes a while.
    """
    step = jax.jit(lambda delta: jax.tree.map(lambda x: x * 1.5 + 1, delta), donate_argnums=0)
    delta = {"prompt": jnp.full((2048, 1024), 0.125, jnp.float32)}
    for first in range(3):
        wanted = jax.tree.map(np.array, delta)  # copies
        with checkpoint_manager(tmp_path / str(first)) as manager:
            save(manager, 1, {"delta": delta}, {})
            for _ in range(20):
                delta = step(delta)
            delta["prompt"].block_until_ready()
            manager.wait_until_finished()
            _, found, _ = latest(manager, {"delta": zeros(delta)})
        check_equal(found["delta"], wanted)


@pytest.mark.parametrize("name", ["9.orbax-checkpoint-tmp", "9.orbax-checkpoint-tmp-17"])
def test_a_half_written_one_is_passed_over(tmp_path, state, name):
    with checkpoint_manager(tmp_path) as manager:
        save(manager, 5, state, NOTES)
    (tmp_path / name / "state").mkdir(parents=True)
    (tmp_path / name / "state" / "manifest.ocdbt").write_bytes(b"\0" * 7)
    with checkpoint_manager(tmp_path) as manager:
        assert latest(manager, zeros(state))[0] == 5
        save(manager, 9, state, NOTES)  # the step that was being written can be written again
    with checkpoint_manager(tmp_path) as manager:
        assert latest(manager, zeros(state))[0] == 9


def spoil(folder, name):
    """Cuts a file of a checkpoint in half; a `name` that ends in / is a folder that is removed."""
    if name.endswith("/"):
        shutil.rmtree(folder / name)
        return
    (file,) = folder.glob(name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# Where one array cannot be read, orbax closes its event loop while TensorStore still reads others;
# Python then reports how these end as exceptions that nobody can catch.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "name", ["notes/metadata", "notes/", "state/manifest.ocdbt", "state/_METADATA", "state/"]
)
def test_of_one_that_cannot_be_read_the_older_is_taken(tmp_path, state, name):
    """Breaks when only the newest is tried, when it is passed over without a word, or when it stays
    where its step is to be written again."""
    with checkpoint_manager(tmp_path) as manager:
        save(manager, 5, state, NOTES)
        save(manager, 9, zeros(state), {})
    spoil(tmp_path / "9", name)
    said = []
    with checkpoint_manager(tmp_path) as manager:
        step, found, notes = latest(manager, zeros(state), said=said)
        assert (step, notes) == (5, NOTES)
        check_equal(found, state)
        save(manager, 9, state, NOTES)
    (line,) = said
    assert line.startswith(f"{tmp_path / '9'}: this checkpoint cannot be read (")
    assert "\n" not in line and "step 5" in line
    with checkpoint_manager(tmp_path) as manager:
        assert latest(manager, zeros(state))[0] == 9


def test_where_none_can_be_read_nothing_is_lost(tmp_path, state):
    """Breaks when training starts anew, or when a checkpoint is deleted that a later version, or a
    model with these shapes, could read."""
    with checkpoint_manager(tmp_path) as manager:
        save(manager, 5, state, NOTES)
        save(manager, 9, state, NOTES)
    spoil(tmp_path / "5", "notes/metadata")
    other = {"delta": {"prompt": jnp.zeros((2, 2))}}
    with checkpoint_manager(tmp_path) as manager:
        with pytest.raises(UserError, match=rf"^{tmp_path / '9'}: .*no older one can") as caught:
            latest(manager, other)
        assert "\n" not in str(caught.value)
        refusal = UserError("other weights")
        with pytest.raises(UserError, match="other weights"):
            latest(manager, other, check=lambda step, notes: (_ for _ in ()).throw(refusal))
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["5", "9"]


def test_trials_in_turns_write_one_after_the_other(tmp_path, state, monkeypatch):
    """Orbax takes the writes of two managers for one another's. Breaks when a write begins before
    that of another manager has ended."""
    with checkpoint_manager(tmp_path / "a") as first, checkpoint_manager(tmp_path / "b") as second:
        save(first, 1, state, NOTES)
        begin = second.save

        def alone(*arguments, **more):
            assert not first.is_saving_in_progress()
            return begin(*arguments, **more)

        monkeypatch.setattr(second, "save", alone)
        save(second, 1, state, NOTES)


@pytest.mark.parametrize("stuck", [False, True])
def test_an_interrupt_does_not_reach_a_write(tmp_path, state, monkeypatch, stuck):
    """Ctrl-C while a write begins: it is finished, or left where it does not end. Breaks when orbax
    runs in the main thread, when nothing waits for it, or waits forever."""
    monkeypatch.setattr(checkpoints, "LEAVING_SECONDS", 0.2 if stuck else 60)
    release, before = threading.Event(), set(threading.enumerate())

    def slow(begin):
        def save(*arguments, **more):
            os.kill(os.getpid(), signal.SIGINT)
            if stuck:
                release.wait()
            time.sleep(0.2)
            return begin(*arguments, **more)

        return save

    with pytest.raises(KeyboardInterrupt), checkpoint_manager(tmp_path) as manager:
        save(manager, 1, state, NOTES)
        monkeypatch.setattr(manager, "save", slow(manager.save))
        save(manager, 2, state, NOTES)
    own = [thread for thread in threading.enumerate() if thread not in before]
    assert all(thread.daemon for thread in own if thread.name == "checkpoints")
    release.set()
    if not stuck:
        with checkpoint_manager(tmp_path) as manager:
            assert latest(manager, zeros(state))[0] == 2


def test_writes_are_finished_when_a_block_ends_in_an_error(tmp_path, state):
    """Mutation: leave without waiting and closing (either alone waits)."""
    with pytest.raises(KeyboardInterrupt), checkpoint_manager(tmp_path) as manager:
        save(manager, 2, state, NOTES)
        raise KeyboardInterrupt
    with checkpoint_manager(tmp_path) as manager:
        assert latest(manager, zeros(state))[0] == 2


def test_the_learning_rate_of_the_host_is_saved_as_an_array(tmp_path, state):
    """`set_rate` puts a numpy scalar into the state between steps."""
    state["opt_state"] = set_rate(state["opt_state"], np.float32(0.3))
    with checkpoint_manager(tmp_path) as manager:
        save(manager, 1, state, NOTES)
        manager.wait_until_finished()
        _, found, _ = latest(manager, zeros(state))
    check_equal(found, jax.tree.map(jnp.asarray, state))
