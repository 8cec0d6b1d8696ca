"""Contract 6: a trial among others equals the same trial alone (one after another, one program)."""

import jax
import pytest

from softprompt.trials import prepare
from tests.contracts.examples import session
from tests.contracts.trials import OTHER, TRIALS, alone, apart, configs, outcome
from tests.families import write_family_folder
from tests.tiny_t5 import write_complete_t5


def check_trials(model, tmp_path, numbers, **changes):
    """Trials through one session, and each of `numbers` again alone."""
    some = configs(model, tmp_path, (*TRIALS, OTHER), **changes)
    with session() as shared:
        together = [outcome(c, tmp_path / str(n), shared) for n, c in enumerate(some)]
        assert len(shared.compiled) == 2  # the last one's optimizer is another
    for n in numbers:
        assert max(apart(together[n], alone(some[n], tmp_path / f"alone{n}"))) <= 1e-5
    for n in (1, 2, 3):
        assert min(apart(together[0], together[n])) > 1e-4  # they are different trials


@pytest.mark.matrix
def test_float32_trials(tiny_folder, tmp_path):
    """Mutation: a trial begins with the optimizer's state of the one before, or with its prompt; a
    trial's batches are those of the first seed; the optimizer is not in the compiled step's key.
    """
    check_trials(tiny_folder, tmp_path, (1, 2, 3))  # the first one was alone when it ran


@pytest.mark.matrix
@pytest.mark.parametrize("family", ("t5", "gemma3"))
def test_other_families(tmp_path, family):
    """Mutation: as above."""
    folder = tmp_path / "model"
    if family == "t5":
        write_complete_t5(folder)
    else:
        write_family_folder(folder, family)
    check_trials(folder, tmp_path, (2,), **({"method__place": "both"} if family == "t5" else {}))


class Backwards(prepare.TrainSource):
    """The same steps with their rows in the opposite order."""

    def __getitem__(self, step):
        return jax.tree.map(lambda array: array[::-1], super().__getitem__(step))


@pytest.mark.matrix
def test_bfloat16_trials(tiny_folder, tmp_path, monkeypatch):
    """Mutation: as in float32. The noise is what the order of rows does to the same trial."""
    some = configs(tiny_folder, tmp_path, TRIALS[:2], model__dtype="bfloat16")
    with session() as shared:
        _, together = (outcome(c, tmp_path / str(n), shared) for n, c in enumerate(some))
        solo = alone(some[1], tmp_path / "alone")
        monkeypatch.setattr(prepare, "TrainSource", Backwards)
        permuted = outcome(some[1], tmp_path / "permuted", shared)
    noise = apart(permuted, together)
    for difference, limit in zip(apart(together, solo), noise, strict=True):
        assert difference <= 3 * limit
    assert 0 < max(noise) < 0.2
