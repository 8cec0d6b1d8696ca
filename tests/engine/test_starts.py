"""Workers and trials that start from another trial's prompt."""

import dataclasses

import pytest

from softprompt.config import base_config, set_key, trial_id
from softprompt.errors import UserError
from softprompt.trials.engine.claimed import ClaimedTrials
from softprompt.trials.engine.claims import QUEUE, Claims, View
from softprompt.trials.engine.plan import make_plan
from softprompt.trials.engine.schedule import take_next
from softprompt.trials.engine.store import open_store
from tests.engine.plans import job, write_plan


def test_a_trial_waits_for_its_start_and_gets_its_prompt(tmp_path):
    """Mutations: a trial is claimed before its start is over; the prompt stays in the store."""
    store, scratch = open_store(tmp_path / "store"), tmp_path / "scratch"
    first = job(1)
    second = dataclasses.replace(job(2), start=first.folder)
    plan, claims = write_plan(str(tmp_path / "store"), [second, first]), Claims(store)

    def taken():
        view = View(store.list(QUEUE))
        found = take_next(plan, claims, view, widths={"": 2}, model="")
        return view, [(one.name, claim) for one, claim in found]

    assert [name for name, _ in taken()[1]] == ["t1"]
    assert taken()[1] == []
    for name in ("delta.safetensors", "result.json"):
        store.write(f"{first.folder}/{name}", b"{}")
    store.create(f"{QUEUE}/done/{first.trial}", b"")
    view, [(name, claim)] = taken()
    holdings = ClaimedTrials(store, claims, workdir=scratch, local=True, say=lambda line: None)
    assert name == "t2" and not scratch.exists()
    holdings.begin(second, claim, view)
    there = sorted(path.name for path in (scratch / first.folder).iterdir())
    assert there == ["delta.safetensors", "result.json"]


def test_a_start_that_is_not_in_the_plan_is_refused():
    """Mutation: it is planned, and no worker finds the prompt."""
    first, second = base_config(), base_config()
    for key, value in {"init": "file", "init_file": f"trial:{trial_id(first)}"}.items():
        set_key(second, f"method.{key}", value)
    plan = make_plan("mine", "full", [first, second], ["first", "second"], target="")
    assert [one.start for one in plan.jobs] == ["", "first"]
    with pytest.raises(UserError, match=f"trial {trial_id(first)}"):
        make_plan("mine", "full", [second], ["second"], target="")
