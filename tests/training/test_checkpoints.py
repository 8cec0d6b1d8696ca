"""Checkpoints: exact, laid out as asked, never half a one, and untouched by what comes after."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.training.checkpoints import checkpoint_manager, newest, restore, save
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


def latest(manager, like):
    """Step, arrays and notes of the newest."""
    step, notes = newest(manager)
    return step, restore(manager, step, like), notes


def check_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_the_newest_comes_back_exactly(tmp_path, state):
    with checkpoint_manager(tmp_path) as manager:
        assert newest(manager) is None
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
