"""Contract 10: one trial compiles its step once, and trials that may share it do."""

import jax
import pytest

from softprompt.training.trial import run_trial
from tests.contracts.examples import session, trial_config, write_task

TRIALS = (
    {"seed": 0},
    {"seed": 1, "method__init": "uniform"},
    {"method__init": "labels", "optimizer__rate": 0.5},
    {"method__init": "text", "method__init_text": "good", "optimizer__schedule": "linear"},
    {"optimizer__rate_unit": "embedding_rms", "optimizer__warmup": 2, "train__steps": 5},
)
AVERAGED = {"train__ema": 0.9, "optimizer__name": "sgd"}
CAPPED = tuple({**AVERAGED, "optimizer__max_row_norm": cap} for cap in (0.5, 2.0))
PROGRAMS = ("train_step", "score", "shared_part")


@pytest.fixture
def compilations(caplog):
    """Counts what jax itself says it compiled: {program: times}."""

    def count():
        messages = [record.getMessage() for record in caplog.records]
        return {
            name: sum(m.startswith(f"Compiling jit({name})") for m in messages) for name in PROGRAMS
        }

    with jax.log_compiles():
        yield count


def test_trials_share_one_step(tiny_folder, tmp_path, compilations):
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
            if n == 0:  # the scoring functions may be there from another session of this process
                first = compilations()
        assert first["train_step"] == 1
        assert compilations() == first
        config = trial_config(tiny_folder, source, method__length=4)
        run_trial(config, tmp_path / "shorter", session=shared)
        assert len(shared.compiled) == compilations()["train_step"] == 2


def test_averaged_and_capped_trials_share_one_step(tiny_folder, tmp_path, compilations):
    """Mutation: the largest norm of a row is static."""
    source = write_task(tmp_path)
    with session() as shared:
        for n, changes in enumerate((*CAPPED, {**CAPPED[0], "seed": 1, "optimizer__rate": 0.1})):
            config = trial_config(tiny_folder, source, **changes)
            run_trial(config, tmp_path / str(n), session=shared)
        assert len(shared.compiled) == compilations()["train_step"] == 1
