"""A prompt that was learnt keeps its predictions, whatever the same model learns afterwards."""

import jax

from softprompt.trials.evaluate import trained_delta
from softprompt.trials.measure import measure
from softprompt.trials.prepare import prepare_scoring
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session
from tests.own_task import Lines, make_config, write_task


def test_two_more_tasks(tiny_folder, tmp_path, monkeypatch):
    """Equal to the bit. Mutation: a step of full fine-tuning writes into the session's weights."""
    monkeypatch.setattr(Session, "release", lambda self, config: None)  # nor are they loaded again
    session, found = Session(Lines()), []
    config = make_config(write_task(tmp_path), tiny_folder, optimizer__rate=0.1)
    run_trial(config, tmp_path / "first", session=session)
    for method in ("", "full", "prompt"):
        if method:
            folder = tmp_path / f"task-{method}"
            folder.mkdir()
            endings = (f"{method} film", "old plot")
            more = {"method__name": method, "optimizer__rate": 0.1, "task__name": f"other-{method}"}
            other = make_config(write_task(folder, endings=endings), tiny_folder, **more)
            run_trial(other, folder / "run", session=session)
        prepared = prepare_scoring(config, session)
        delta = trained_delta(tmp_path / "first", prepared)
        found.append(measure(prepared, delta, "test"))
        assert jax.tree.leaves(prepared.frozen)
    assert found[0] == found[1] == found[2]
    (predictions,) = found[0][1]
    assert len({str(one["scores"]) for one in predictions}) > 1
