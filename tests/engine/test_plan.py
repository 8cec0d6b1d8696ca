"""Plans: written once, without devices; who may work on them; and the status of a sweep."""

import json
import os
import subprocess
import sys
import tarfile
import time
from io import BytesIO

import pytest

from softprompt import cli, source
from softprompt.errors import UserError
from softprompt.results import write_result
from softprompt.trials.engine import plan as plans
from softprompt.trials.engine.claims import QUEUE, STOP, View
from softprompt.trials.engine.plan import check_backend, check_worker, plan_sweep, read_plan
from softprompt.trials.engine.status import page, read_status, summary
from softprompt.trials.engine.store import open_store
from softprompt.trials.sweep import trial_folder
from tests.engine.plans import REPOSITORY, job, write_plan
from tests.trials.rows import config, done_row


def some(*lengths):
    return [config(length, seed) for seed, length in enumerate(lengths)]


def test_a_plan_is_written_once_and_taken_up(tmp_path):
    """Mutations: a second plan replaces the first; a done trial of an earlier sweep runs again; a
    rerun leaves failed trials and the stop as they are."""
    trials = some(1, 1, 5)
    write_result(trial_folder(tmp_path, trials[0]), done_row(trials[0]))
    first = plan_sweep(str(tmp_path), "x", "full", trials, target="")
    store = open_store(tmp_path)
    assert View(store.list(QUEUE)).done == {first.jobs[0].trial}
    for name in (STOP, f"{QUEUE}/failed/{first.jobs[1].trial}"):
        store.write(name, b"")
    assert plan_sweep(str(tmp_path), "x", "full", trials, target="") == first == read_plan(store)
    seen = View(store.list(QUEUE))
    assert not seen.failed and not seen.stop
    with pytest.raises(UserError, match="plan.json holds x .full., 3 trials"):
        plan_sweep(str(tmp_path), "x", "full", trials[:2], target="")
    assert len({one.group for one in first.jobs}) == 2, "seeds share a step, lengths do not"


def test_a_worker_of_other_code_or_another_type_refuses(tmp_path, monkeypatch):
    """Mutations: the commit is not compared; nor what `auto` is; a missing plan is a traceback."""
    plan = plan_sweep(str(tmp_path), "x", "full", some(1), target="tpu")
    assert (plan.target, plan.dtype) == ("tpu", "bfloat16")
    check_worker(plan)
    check_backend(plan, "gpu", "bfloat16")
    with pytest.raises(UserError, match="is for tpu, where .* is bfloat16; on .* cpu"):
        check_backend(plan, "cpu", "float32")
    monkeypatch.setattr(plans, "commit", lambda: "other")
    with pytest.raises(UserError, match="the plan is of commit .*, this worker's is other"):
        check_worker(plan)
    assert cli.main(["work", str(tmp_path / "empty")]) == 2
    assert cli.main(["work", str(tmp_path), "--distributed", "host"]) == 2


def test_the_code_travels_as_an_archive_that_knows_its_commit(tmp_path, monkeypatch):
    """Mutation: code that was unpacked from the archive has no commit, and no worker may run it."""
    head = subprocess.run(
        ["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    if not head:
        pytest.skip("not a git repository")
    with tarfile.open(fileobj=BytesIO(source.archive(head))) as tar:
        tar.extractall(tmp_path, filter="data")
    assert (tmp_path / "softprompt/cli.py").exists()
    monkeypatch.setattr(source, "ROOT", tmp_path)
    assert source.commit_now() == head
    assert source.is_clean(head) and not source.is_clean(f"{head}-dirty")


def test_planning_opens_no_device(tmp_path):
    """It would keep a TPU from the workers of the host. Mutation: `resolve` asks JAX."""
    code = (
        "import sys; from softprompt import cli\n"
        "from jax._src import xla_bridge\n"
        "sys.exit(cli.main(sys.argv[1:]) or int(xla_bridge.backends_are_initialized()))"
    )
    words = ["sweep", "prompt_length", "--subset", "quickstart", "--workdir", str(tmp_path / "w")]
    command = [sys.executable, "-c", code, *words, "--engine", "store"]
    run = {"cwd": REPOSITORY, "env": os.environ | {"JAX_PLATFORMS": "tpu"}, "capture_output": True}
    assert subprocess.run([*command, "--target", "tpu"], **run).returncode == 0
    assert {one.config["model"]["dtype"] for one in read_plan(open_store(tmp_path / "w")).jobs} == {
        "bfloat16"
    }
    other = ["sweep", "prompt_length", "--workdir", str(tmp_path / "v"), "--engine", "store"]
    assert cli.main(other) == 2 and not (tmp_path / "v").exists()


def test_the_worker_imports_no_jax():
    """Mutation: import jax, or what imports it, at the top of one of its modules."""
    code = "import sys, softprompt.trials.engine.worker; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY).returncode == 0


def test_status_of_a_thousand_trials(tmp_path, capsys, monkeypatch):
    """Mutations: a file is read for each trial; a host without devices is not named; what is left
    of a released claim counts as claimed."""
    jobs = [job(number) for number in range(1000)]
    write_plan(str(tmp_path), jobs)
    store = open_store(tmp_path)
    for number, one in enumerate(jobs[:700]):
        store.create(f"{QUEUE}/claims/{one.trial}.1", str(number).encode())
    for one in jobs[:600]:
        store.create(f"{QUEUE}/done/{one.trial}", b"")
    store.create(f"{QUEUE}/failed/{jobs[600].trial}", b"")
    store.create(f"{QUEUE}/ended/{jobs[601].trial}.1", b"")
    beat = {"worker": "a-1", "time": time.time(), "machine": "a: 4 x TPU v6e", "chips": 4}
    beats = [
        beat | {"chip_seconds": 7200.0, "chip_seconds_lost": 360.0, "held": {"x": {}}, "done": 600},
        beat | {"worker": "b-2", "problem": "opens no device: no TPU <found>", "left": True},
        beat | {"worker": "c-3", "time": time.time() - 400},
    ]
    for one in beats:
        store.write(f"{QUEUE}/beats/{one['worker']}", json.dumps(one).encode())
    files, read = [], type(store).read
    with monkeypatch.context() as patch:
        patch.setattr(type(store), "read", lambda *call: files.append(call) or read(*call))
        found = read_status(store)
    assert len(files) < 10
    lines = summary(*found, 2.0)
    assert "1000 trials: 600 done, 1 failed, 98 claimed, 301 waiting" in lines[0]
    assert lines[1] == "2.00 chip-hours used, 0.10 of them lost; 4.00 dollars at 2 a chip-hour"
    assert lines[2] == "estimate: 1.33 chip-hours left, from the 600 trials that ended"
    text = page(*found, None, refresh=15)
    assert "no TPU &lt;found&gt;" in text and 'content="15"' in text and "dollars" not in text
    assert cli.main(["status", str(tmp_path), "--html", str(tmp_path / "s.html")]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("works", "opens no device: no TPU", "no beat for 6 min"))
