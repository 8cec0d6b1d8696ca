"""Real trials by workers: the same bits as a local sweep, two terminals, and a bucket."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from softprompt import cli, results
from softprompt.trials.engine.claims import QUEUE, View
from softprompt.trials.engine.plan import read_plan
from softprompt.trials.engine.publish import newest_step
from softprompt.trials.engine.status import read_status
from softprompt.trials.engine.store import open_store
from softprompt.trials.engine.worker import scratch_folder
from tests.engine.emulator import BUCKET, Proxy, emulator, environment
from tests.engine.waiting import wait_for
from tests.own_task import words, write_task
from tests.tiny_t5 import write_complete_t5

REPOSITORY = Path(__file__).resolve().parents[2]
SAME = ("predictions.jsonl", "delta.safetensors")
PLANNED = ["--workdir", "shared", "--engine", "store"]
WORK = """
from softprompt import interrupts
from softprompt.trials.engine.claims import Timing
from softprompt.trials.engine.worker import work
interrupts.exit_at_once()
"""
TIMES = {"seconds", "tokens_per_second", "examples_per_second", "peak_share", "input_wait_share"}

EXPERIMENT = '''
"""Prompts of two lengths, and one without a task's file."""
from softprompt.analysis.plots import length_plot
from softprompt.analysis.tables import summarise
from softprompt.config import base_config

CAPTION = "Prompts."


def sweep(subset="full"):
    made = []
    for number in range(int(subset)):
        config = base_config()
        config.method.length = 2 + number % 2
        config.seed = number
        made.append(config)
    return made


def table(rows):
    return summarise(rows, {"trial": lambda row: row["name"]})


def figure(rows):
    return length_plot({}, {}, xlabel="", ylabel="")
'''


@pytest.fixture(scope="module")
def keys(tmp_path_factory, tiny_folder):
    """The words of the command line for trials of 40 steps."""
    place = write_task(tmp_path_factory.mktemp("engine"))
    given = words(place, tiny_folder, train__steps=40, log__checkpoint_every=5)
    return [word for word in given if not word.startswith("--config.method.length")]


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """A folder for compiled programs."""
    return str(tmp_path_factory.mktemp("programs"))


@pytest.fixture
def compile_once(programs, monkeypatch):
    """The processes of these tests compile a program once between them."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", programs)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def command(*arguments):
    return [sys.executable, "-m", "softprompt", *map(str, arguments)]


def variables(**more):
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"} | more


def contents(folder):
    """What must be equal of a trial: predictions and delta, and the log without times."""
    found = {name: (folder / name).read_bytes() for name in SAME}
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    found["log"] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return found


def same_trials(left, right):
    trials = {row["trial"]: folder for folder, row in results.read_trials(left)}
    others = {row["trial"]: folder for folder, row in results.read_trials(right)}
    assert trials.keys() == others.keys() and trials
    for trial, folder in trials.items():
        assert contents(Path(folder)) == contents(Path(others[trial])), trial


@pytest.mark.long
@pytest.mark.usefixtures("compile_once")
def test_workers_train_what_a_local_sweep_trains(tmp_path, keys, monkeypatch):
    """Two workers, one of which is stopped in the middle, against one process without workers, bit
    for bit. Mutation: the next holder begins without the checkpoint, or with the log of another."""
    monkeypatch.chdir(tmp_path)
    Path("some.py").write_text(EXPERIMENT)
    sweep = ["sweep", "some.py", "--subset", "4", *keys, "--workdir"]
    subprocess.run(command(*sweep, "local"), env=variables(), check=True, capture_output=True)
    assert cli.main([*sweep, "shared", "--engine", "store"]) == 0
    first = subprocess.Popen(command("work", "shared"), env=variables(), stdout=subprocess.PIPE)
    store = open_store("shared")
    for _ in range(600):
        if View(store.list(QUEUE)).attempts:
            break
        time.sleep(0.1)
    time.sleep(4)
    first.send_signal(signal.SIGTERM)
    first.communicate()
    second = [
        subprocess.Popen(command("work", "shared"), env=variables(), stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert [(worker.communicate(), worker.returncode)[1] for worker in second] == [0, 0]
    same_trials("local", "shared")
    assert cli.main(["table", "shared", "--experiment", "some.py"]) == 0


@pytest.mark.long
@pytest.mark.usefixtures("compile_once")
def test_two_terminals_share_a_sweep(tmp_path, keys, monkeypatch):
    """Mutations: both train the same trial; one that the other terminal trains is a failed row."""
    monkeypatch.chdir(tmp_path)
    Path("some.py").write_text(EXPERIMENT)
    sweep = command("sweep", "some.py", "--subset", "4", *keys, "--workdir", "out")
    both = [
        subprocess.Popen(sweep, env=variables(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate()[1].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    rows = results.read_rows("out")
    assert [row["status"] for row in rows] == ["done"] * 4
    seen = View(open_store("out").list(QUEUE))
    assert set(seen.attempts.values()) == {1} and len(seen.done) == 4


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # gcsfs's sockets
def test_a_bucket_with_two_workers_of_which_one_is_killed(tmp_path, keys, monkeypatch):
    """At most 20 requests a trial and 10 a worker-minute, and no object twice within a second.
    Mutations: a listing for each trial; a file is published at each checkpoint."""
    monkeypatch.chdir(tmp_path)
    Path("some.py").write_text(EXPERIMENT)
    with emulator(tmp_path / "gcs", monkeypatch) as url:
        proxy, workdir = Proxy(url), f"gs://{BUCKET}/w"
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
        sweep = ["sweep", "some.py", "--subset", "12", *keys, "--workdir", workdir]
        subprocess.run(
            command(*sweep, "--engine", "store"), env=variables(), check=True, timeout=400
        )
        planned, began = len(proxy.seen), time.monotonic()
        workers = [
            subprocess.Popen(command("work", workdir), env=environment(proxy.url) | variables())
            for _ in range(2)
        ]
        store = open_store(workdir)
        mine = 0
        while len(View(store.list(QUEUE)).done) < 3:
            time.sleep(1)
            mine += 1
        workers[0].kill()
        assert [worker.wait(600) for worker in workers] == [-9, 0]
        minutes = 2 * (time.monotonic() - began) / 60
        requests = len(proxy.seen) - planned - mine - 1
        print(
            f"{requests} requests for 12 trials in {minutes:.1f} worker-minutes, {planned} before"
        )
        assert requests <= 12 * 20 + 10 * minutes
        written: dict[str, float] = {}
        for moment, method, name in proxy.seen:
            if method in ("POST", "PUT") and name:
                assert moment - written.get(name, 0.0) >= 1.0, name
                written[name] = moment
        rows = results.read_rows(workdir)
        assert Counter(row["status"] for row in rows) == {"done": 12}
        proxy.close()


@pytest.mark.long
@pytest.mark.parametrize("grace", [20.0, 1.0])
def test_claims_are_free_soon_after_sigterm_during_a_compilation(tmp_path, grace, monkeypatch):
    """Within 25 s by default; a compilation that takes longer than the grace is cut off.
    Mutation: the worker waits for its child, whose signals are handled after the step."""
    monkeypatch.chdir(tmp_path)
    write_complete_t5(tmp_path / "model")
    room = {"task__max_input": 64, "task__max_target": 8, "method__name": "lora"}
    keys = words(write_task(tmp_path), tmp_path / "model", **room)
    Path("some.py").write_text(EXPERIMENT)
    assert cli.main(["sweep", "some.py", "--subset=1", *keys, *PLANNED]) == 0
    store = open_store("shared")
    code = f"work('shared', timing=Timing(beat=0.5, grace={grace}))"
    worker = subprocess.Popen([sys.executable, "-c", f"{WORK}{code}"], env=variables())
    wait_for(lambda: "compile the training step" in stages(store), "compilation", 120)
    worker.send_signal(signal.SIGTERM)
    began = time.monotonic()
    (trial,) = View(store.list(QUEUE)).attempts
    wait_for(lambda: View(store.list(QUEUE)).free(trial), "free claim", grace + 5)
    print(f"free after {time.monotonic() - began:.1f} s")
    assert worker.wait(10) == 75


@pytest.mark.long
@pytest.mark.usefixtures("compile_once")
def test_workers_and_a_plain_sweep_go_on_where_the_other_one_was(tmp_path, keys, monkeypatch):
    """A sweep is killed, a worker goes on and is stopped, a sweep ends it, bit for bit. Mutations:
    a checkpoint in the trial's folder is not looked at, nor one that a worker has published."""
    monkeypatch.chdir(tmp_path)
    Path("some.py").write_text(EXPERIMENT)
    keys = [*keys, "--config.train.steps=600", "--config.log.checkpoint_every=25"]
    sweep = ["sweep", "some.py", "--subset", "1", *keys, "--workdir"]
    subprocess.run(command(*sweep, "alone"), env=variables(), check=True, capture_output=True)
    (name,) = (path.name for path in Path("alone").iterdir() if path.is_dir() and "-" in path.name)

    def stop(words, folder, number, after):
        with open("log", "w") as log:
            one = subprocess.Popen(command(*words), env=variables(), stdout=log, stderr=log)
        wait_for(lambda: newest_step(folder) >= after, "checkpoint", 300)
        one.send_signal(number)
        one.wait()
        return newest_step(folder), resumed(Path("log").read_text())

    first, _ = stop([*sweep, "shared"], Path("shared") / name, signal.SIGKILL, 100)
    assert cli.main([*sweep, "shared", "--engine", "store"]) == 0
    scratch = scratch_folder(read_plan(open_store("shared"))) / name
    second, began = stop(["work", "shared"], scratch, signal.SIGTERM, first + 50)
    shutil.rmtree(scratch)
    last = subprocess.run(command(*sweep, "shared"), env=variables(), stderr=subprocess.PIPE)
    print(first, began, second, resumed(last.stderr.decode()))
    assert (began, resumed(last.stderr.decode())) == ([first], [second]) and second < 600
    same_trials("alone", "shared")


def resumed(output):
    """The steps from which a process says that it resumes."""
    return [int(step) for step in re.findall(r"resumes from step (\d+)", output)]


@pytest.mark.long
def test_a_worker_on_an_empty_host_compiles_nothing_again(tmp_path, monkeypatch):
    """What one worker has compiled the next one takes from the store. Mutation: it is not
    fetched, or not published."""
    monkeypatch.chdir(tmp_path)
    write_complete_t5(tmp_path / "model")
    room = {"task__max_input": 64, "task__max_target": 8, "method__name": "lora"}
    keys = words(write_task(tmp_path), tmp_path / "model", **room, compute__population=1)
    Path("some.py").write_text(EXPERIMENT)
    assert cli.main(["sweep", "some.py", "--subset=3", *keys, *PLANNED]) == 0
    store = open_store("shared")
    for host, done in [("one", 2), ("two", 3)]:
        (tmp_path / host).mkdir()
        home = {"TMPDIR": str(tmp_path / host), "HOME": str(tmp_path / host)}
        home["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # a quick machine needs less
        worker = subprocess.Popen(command("work", "shared"), env=variables(**home))
        wait_for(lambda done=done: len(View(store.list(QUEUE)).done) == done, "row", 200)
        worker.terminate()
        assert worker.wait(60) in (0, 75)
    rows = sorted(results.read_rows("shared"), key=lambda row: row["compile_seconds"])
    print([row["compile_seconds"] for row in rows], list(store.list("programs")))
    assert rows[1]["compile_seconds"] < 0.5 * rows[2]["compile_seconds"]
    large = ("jit_train_step-", "jit_score-", "jit_first_delta-")  # others take about 0.1 s
    files = [[path.name for path in Path(host).rglob("*-cache")] for host in ("one", "two")]
    kept = [{name for name in names if name.startswith(large)} for names in files]
    assert kept[0] == kept[1] and len(kept[0]) >= 3


def stages(store):
    """What the workers say that their trials do."""
    return [text for beat in read_status(store)[2] for text in beat["stages"].values()]
