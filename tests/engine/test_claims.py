"""Claims: who holds a trial, seen by several workers, without processes."""

import json

import pytest

from softprompt.trials.engine import claims as module
from softprompt.trials.engine.claims import QUEUE, Claims, Timing, taken_over
from softprompt.trials.engine.store import FolderStore

NEW = {"chip_seconds": 3.0, "lost": 1.0}


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Two workers of different machines, whose clocks have nothing in common."""
    monkeypatch.setattr(module, "_gone", lambda process: False)
    made = []
    for host in ("one", "two"):
        monkeypatch.setattr(module.socket, "gethostname", lambda host=host: host)
        clock = Clock()
        made.append((Claims(FolderStore(str(tmp_path)), timing=Timing(), clock=clock), clock))
    made[1][1].now = 5.0
    return made


def test_one_of_two_workers_takes_a_trial_and_an_end_gives_it_back(workers):
    """Mutations: a claim that is there is taken; a released trial keeps its attempt; one that is
    done is taken again."""
    (one, _), (two, _) = workers
    view = one.beat({})
    two.beat({})
    claim = one.take("a", view)
    assert (claim.trial, claim.attempt) == ("a", 1)
    assert two.take("a", view) is None, "which has not seen the claim"
    assert two.take("a", two.look()) is None
    one.end(claim, "released", NEW)
    again = two.take("a", two.look())
    assert again.attempt == 2 and not one.holds(claim) and two.holds(again)
    assert taken_over(claim, one.look()) and not taken_over(again, one.look())
    two._store.create(f"{QUEUE}/done/a", b"")
    assert two.take("a", two.look()) is None


def test_a_worker_is_dead_after_ninety_seconds_of_the_observers_clock(workers):
    """Mutations: no beat is ever missed (the beat is not looked at); clocks of hosts are compared;
    one that beats between two looks is dead."""
    (one, _), (two, clock) = workers
    claim = one.take("a", one.beat({}))
    two.look()
    for _ in range(5):
        clock.now += 60
        one.beat({})
        assert two.take("a", two.look()) is None
    clock.now += 89
    assert two.take("a", two.look()) is None
    clock.now += 2
    after = two.take("a", two.beat({}))
    assert after.attempt == 2 and after.facts["deaths"] == 1
    assert not one.holds(claim) and one.take("a", one.look()) is None


def test_a_claim_of_a_worker_that_began_after_the_listing_is_not_free(workers):
    """Mutation: a worker without a beat in the listing is dead."""
    (one, _), (two, _) = workers
    one.beat({})
    view = one.take("a", one.look()) and two.look()
    del view.beats[one.worker]
    assert two.take("a", view) is None
    one._store.delete(f"{QUEUE}/beats/{one.worker}")
    assert two.take("a", view).attempt == 2


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path):
    """Mutation: only the beat counts, and the same command waits for 90 s after a kill -9."""
    one, two = (Claims(FolderStore(str(tmp_path))) for _ in range(2))
    claim = one.take("a", one.beat({}))
    assert two.take("a", two.look()) is None
    facts = claim.facts | {"process": claim.facts["process"] | {"started": 1.0}}
    one._store.write(f"{QUEUE}/claims/a.1", json.dumps(facts).encode())
    assert Claims(one._store).take("a", two.look()).attempt == 2


def test_a_claim_tells_what_was_before(workers):
    """Mutations: a death with a new checkpoint counts; a preemption does; a try after a failure
    begins with the old count; time that was not published is not lost."""
    (one, _), (two, clock) = workers
    steps = [
        ("died", False, {"deaths": 1, "lost": 1.0}),
        ("died", False, {"deaths": 2, "lost": 2.0}),
        ("released", False, {"deaths": 2, "lost": 3.0}),
        ("died", True, {"deaths": 0, "lost": 4.0}),
        ("error", False, {"errors": ["out of memory"], "lost": 5.0, "chip_seconds": 15.0}),
        ("failed", False, {}),
    ]
    claim = one.take("a", one.beat({}))
    for how, saved, expected in steps:
        if saved:
            one._store.write(f"{QUEUE}/saved/{claim.key}", b"")
        one.end(claim, how, NEW, "out of memory" if how == "error" else "")
        claim = one.take("a", one.look())
        assert {key: claim.facts.get(key) for key in expected} == expected
        assert claim.facts.get("machines", []) == (["one"] if expected else [])


def test_a_dead_workers_time_is_in_its_last_beat(workers):
    """Mutation: only ends that a worker wrote itself are counted."""
    (one, _), (two, clock) = workers
    one.take("a", one.beat({}))
    one.beat({"held": {"a": {"chip_seconds": 60.0, "lost": 20.0}}})
    two.look()
    clock.now += 91
    facts = two.take("a", two.look()).facts
    assert (facts["chip_seconds"], facts["lost"]) == (60.0, 20.0)


def test_an_error_is_tried_once_more_on_another_host(workers):
    """Mutation: the host that had the error tries again although another one lives."""
    (one, clock), (two, _) = workers
    one.beat({})
    one.end(one.take("a", one.look()), "error", NEW, "broken")
    assert not one.failed_here("a", one.look()), "there is no other host"
    two.beat({})
    assert one.failed_here("a", one.look()) and not two.failed_here("a", two.look())
    clock.now += 91
    assert not one.failed_here("a", one.look()), "the other host is dead"
