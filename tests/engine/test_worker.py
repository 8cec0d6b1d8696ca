"""Workers as processes, on trials that only sleep: deaths, errors, signals, and many at once."""

import json
import random
import resource
import signal
import threading
import time
from collections import Counter

import psutil
import pytest

from softprompt.trials.engine import worker as module
from softprompt.trials.engine.claimed import ClaimedTrials
from softprompt.trials.engine.claims import QUEUE, STOP, Claims, View
from softprompt.trials.engine.restarts import CRASHED, FINAL
from softprompt.trials.engine.status import read_status
from softprompt.trials.engine.store import open_store
from tests.engine.plans import job, start, write_plan


def finish(worker, seconds=60):
    """The exit code and the output of a worker."""
    output, _ = worker.communicate(timeout=seconds)
    return worker.returncode, output


def view(workdir):
    return View(open_store(workdir).list(QUEUE))


def test_an_error_of_the_worker_itself_is_no_final_exit_code(tmp_path, monkeypatch, capsys):
    """Mutation: it leaves with 1, after which nothing starts it again."""

    def broken(self, seconds):
        raise ZeroDivisionError("broken")

    write_plan(tmp_path, [job(1)])
    monkeypatch.setattr(module.Worker, "run", broken)
    assert module.work(tmp_path) == CRASHED and CRASHED not in FINAL
    assert "ZeroDivisionError: broken" in capsys.readouterr().err


def test_what_a_child_gives_back_is_nothing_to_a_worker_that_follows(tmp_path):
    """Mutation: it looks for trials that only the first worker holds. A group that ran as a whole
    says nothing of how many more would fit."""
    store, jobs = open_store(tmp_path), [job(1), job(2)]
    plan, claims = write_plan(tmp_path, jobs), Claims(store)
    for follows in (True, False):
        holdings = ClaimedTrials(
            store, claims, workdir=tmp_path, local=False, say=lambda line: None
        )
        stubs = {"child": None, "programs": None, "say": print}
        worker = module.Worker(plan, claims, holdings, follows=follows, **stubs)
        if not follows:
            for claim, one in [(claims.take(one.trial, claims.beat({})), one) for one in jobs]:
                holdings.begin(one, claim, claims.look())
        for width, one in zip((1, 0), jobs, strict=True):
            message = {"kind": "returned", "trials": [one.trial], "width": width}
            worker._handle(message)
        assert not holdings.held
        assert worker._widths == ({"": 1} if follows else {"": 1, jobs[1].group: 1})


def test_a_failed_trial_is_over_before_its_claim_ends(tmp_path, monkeypatch):
    """Mutation: the other way round, so that another worker may claim it in between."""
    store, one, over = open_store(tmp_path), job(1), []
    write_plan(tmp_path, [one])
    claims = Claims(store)
    claim, end = claims.take(one.trial, claims.beat({})), claims.end
    holdings = ClaimedTrials(store, claims, workdir=tmp_path, local=False, say=lambda line: None)
    holdings.begin(one, claim, claims.look())
    store.write(f"{one.folder}/result.json", b'{"status": "failed"}')

    def end_claim(*given):
        over.append(view(tmp_path).over(one.trial))
        end(*given)

    monkeypatch.setattr(claims, "end", end_claim)
    assert holdings.end(one.trial, done=False, error="x", final=True)
    assert over == [True]


def child_of(worker):
    """The child of a worker, once it has one."""
    for _ in range(200):
        if found := psutil.Process(worker.pid).children():
            return found[0]
        time.sleep(0.05)
    raise TimeoutError


def wait_until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_each_trial_ends_as_it_should_and_the_exit_code_says_so(tmp_path):
    """A mistake fails once, another error twice, and a trial whose process dies three times without
    a new checkpoint fails with that reason; progress before a death does not count. Mutations:
    errors are not told apart; deaths are not counted, or those with a checkpoint are."""
    ends = tmp_path / "ends"
    thens = ("done", "mistake", "error", "kill", "die", "done")
    jobs = [job(n, then=then, steps=4 if then == "kill" else 1) for n, then in enumerate(thens)]
    write_plan(tmp_path, jobs)
    code, output = finish(start(tmp_path, ends, beat=0.2))
    assert code == 1, output
    rows = [json.loads((tmp_path / one.folder / "result.json").read_text()) for one in jobs]
    reason = "3 holders died one after another without a new checkpoint"
    assert [row["error"] for row in rows] == ["", "mistake", "error", "", reason, ""]
    tries = Counter(line.split()[0] for line in ends.read_text().splitlines())
    assert [tries[one.trial] for one in jobs] == [1, 1, 2, 1, 1, 1]
    seen = view(tmp_path)
    assert seen.failed == {jobs[n].trial for n in (1, 2, 4)} and len(seen.done) == 3
    # Four deaths with a new checkpoint each, and one more if it waited behind the one that dies.
    assert seen.attempts[jobs[3].trial] in (5, 6)


def test_sigterm_publishes_and_gives_back_and_the_next_worker_goes_on(tmp_path):
    """Mutations: the checkpoint is not published on stopping; the claim is not given back; the
    next worker begins at step 0."""
    one = job(1, steps=60, seconds=0.1)
    plan = write_plan(tmp_path, [one])
    worker = start(tmp_path, tmp_path / "ends", publish=999.0, beat=30.0)
    wait_until(lambda: one.trial in view(tmp_path).attempts)
    time.sleep(1)
    worker.send_signal(signal.SIGTERM)
    code, output = finish(worker, 10)
    seen = view(tmp_path)
    assert code == 75 and seen.ended == seen.saved == {f"{one.trial}.1"}, output
    scratch(plan, one).rename(tmp_path / "moved")  # another host
    code, output = finish(start(tmp_path, tmp_path / "ends"))
    assert code == 0 and "holder 2" in output
    log = (tmp_path / one.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 61))
    assert view(tmp_path).saved == set(), "what is done needs no checkpoint"


def scratch(plan, one):
    from softprompt.trials.engine.worker import scratch_folder

    return scratch_folder(plan) / one.folder


def test_a_child_that_does_not_stop_is_killed_and_its_claims_are_free(tmp_path):
    """As during a compilation. Mutation: the worker waits for its child."""
    one = job(1, steps=1, seconds=120.0)
    write_plan(tmp_path, [one])
    worker = start(tmp_path, tmp_path / "ends")
    wait_until(lambda: one.trial in view(tmp_path).attempts)
    began = time.monotonic()
    worker.send_signal(signal.SIGTERM)
    code, output = finish(worker, 20)
    assert code == 75 and time.monotonic() - began < 8, output
    assert view(tmp_path).free(one.trial)


def test_a_child_dies_with_its_worker(tmp_path):
    """Mutation: no parent-death signal: the child of a killed worker trains on."""
    write_plan(tmp_path, [job(1, steps=1, seconds=120.0)])
    worker = start(tmp_path, tmp_path / "ends")
    wait_until(lambda: view(tmp_path).attempts)
    child = child_of(worker)
    worker.kill()
    worker.wait()
    worker.stdout.close()
    _, alive = psutil.wait_procs([child], timeout=5)
    for process in alive:
        process.kill()
    assert not alive


def test_a_host_without_devices_gives_up_and_one_that_waits_for_others_does_not(tmp_path):
    """Mutations: a slice whose other host comes late counts as a mistake, which nothing starts
    again; a host without a device tries for ever, and holds what others could do."""
    write_plan(tmp_path, [job(1)])
    for later, expected in [(False, 2), (True, 0)]:
        reason = {"error": "not there", "later": later}
        (tmp_path / "unable").write_text(json.dumps({"times": 4, "reason": reason}))
        code, output = finish(start(tmp_path, tmp_path / "ends", beat=0.1))
        assert code == expected, output
        assert ("waits for its other hosts: not there" in output) == later
        assert ("opens no device: not there" in output) != later


def test_a_beat_says_what_a_trial_does(tmp_path):
    """Mutation: the stage of a trial that runs alone, which its child does not name, is lost."""
    write_plan(tmp_path, [job(1, steps=600, seconds=0.1)])
    worker = start(tmp_path, tmp_path / "ends")

    def stages():
        _, _, beats = read_status(open_store(tmp_path))
        return {name: text for beat in beats for name, text in beat["stages"].items() if text}

    wait_until(stages)
    assert stages().keys() == {"t1"} and stages()["t1"].startswith("step ")
    worker.kill()
    worker.communicate()


def test_stop_lets_workers_leave_and_a_lost_claim_ends_the_work(tmp_path):
    """Mutations: `stop` is not looked at, or ends workers as a signal does, after which they are
    started again; a trial that another worker has taken over goes on, and
    its end is published."""
    one = job(1, steps=50, seconds=0.1)
    write_plan(tmp_path, [one])
    store = open_store(tmp_path)
    worker = start(tmp_path, tmp_path / "ends")
    wait_until(lambda: one.trial in view(tmp_path).attempts)
    taken = {"worker": "other-1-a", "host": "other", "process": {"machine": ""}, "machine": "x"}
    store.write(f"{QUEUE}/beats/other-1-a", b"{}")
    store.write(f"{QUEUE}/claims/{one.trial}.2", json.dumps(taken).encode())
    time.sleep(1.5)
    store.write(STOP, b"")
    code, output = finish(worker, 15)
    assert code == 3 and "taken over" in output and "softprompt stop --undo" in output
    assert not (tmp_path / "ends").exists() and f"{one.trial}.2" not in view(tmp_path).ended


def run_many(tmp_path, *, workers, trials, kill, seconds):
    """Runs workers on many trials, kills some in turn, and starts others for them.

    Returns:
        The trials that ended, how often, and how many workers were killed.
    """
    ends = tmp_path / "ends"
    write_plan(tmp_path, [job(n, steps=2, seconds=seconds / 2) for n in range(trials)])
    running = [start(tmp_path, ends, beat=0.5, dead=3.0) for _ in range(workers)]
    killed, rng, drain = 0, random.Random(0), []
    while killed < kill:
        time.sleep(0.4)
        alive = any(worker.poll() is None for worker in running)
        assert alive, [worker.communicate()[0] for worker in running]
        target = rng.choice(running)
        if target.poll() is None and view(tmp_path).attempts:
            target.kill()
            target.communicate()
            running.remove(target)
            running.append(start(tmp_path, ends, beat=0.5, dead=3.0))
            killed += 1
        assert len(view(tmp_path).done) < trials or killed, "the trials were too short"
    for worker in running:
        thread = threading.Thread(target=worker.communicate)
        thread.start()
        drain.append(thread)
    for thread in drain:
        thread.join()
    assert [worker.returncode for worker in running] == [0] * workers
    return Counter(line.split()[0] for line in ends.read_text().splitlines()), killed


def check_published_once(tmp_path, trials):
    """Each trial has one row, written once, and is done by the holder of its newest claim."""
    store, seen = open_store(tmp_path), view(tmp_path)
    writes = Counter((tmp_path / "ends.writes").read_text().splitlines())
    for one in map(job, range(trials)):
        row, done = f"{one.folder}/result.json", f"{QUEUE}/done/{one.trial}"
        assert writes[row] <= 1 and writes[done] <= 1, "a worker may be killed before it notes it"
        assert json.loads(store.read(row))["status"] == "done"
        holder = json.loads(store.read(f"{QUEUE}/claims/{seen.newest(one.trial)}"))
        assert store.read(done).decode() == holder["token"]
    assert len(seen.done) == trials and not seen.failed


def test_workers_that_are_killed_cost_nothing_but_time(tmp_path):
    """Mutations: a dead worker's trial is never taken over; a done one is run again; a row that is
    done is replaced."""
    ended, _ = run_many(tmp_path, workers=3, trials=24, kill=2, seconds=0.1)
    check_published_once(tmp_path, 24)
    assert sum(ended.values()) <= 24 + 2 * 2, "what a killed worker had just ended runs again"


@pytest.mark.long
def test_eight_processes_two_hundred_trials(tmp_path):
    """5 % of the claims are killed. Mutations: as above."""
    _, killed = run_many(tmp_path, workers=8, trials=200, kill=10, seconds=0.4)
    check_published_once(tmp_path, 200)
    print(f"{killed} workers killed, {max(view(tmp_path).attempts.values())} holders at most")


@pytest.mark.long
def test_a_thousand_trials_cost_little(tmp_path):
    """Mutation: every claim lists the store for each trial of the plan."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run_many(tmp_path, workers=16, trials=1000, kill=0, seconds=0.05)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"{used:.1f} s of processor time")
    assert len(view(tmp_path).done) == 1000 and used < 60
