"""Contract 8: what is computed does not depend on the devices, nor on the processes.

Each trial runs through `run_trial`, with float32 weights and exact matmuls. Losses are compared in
nats.
"""

import dataclasses
import json
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from softprompt.config import ConfigDict, trial_id
from softprompt.console import Progress
from softprompt.methods.delta_file import load_delta
from softprompt.pretrained.loading import Loaded
from softprompt.results import read_result
from softprompt.training.logs import read_log
from softprompt.training.sharding import Gather, make_mesh, path_name, put_weight
from softprompt.trials.prepare import initial_state, prepare
from softprompt.trials.run import run_trial
from softprompt.trials.session import Session
from tests.families import write_family_folder
from tests.own_task import REPOSITORY, make_config, words, write_task
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5

FIRST, LAST = 1e-5, 1e-4  # how far losses may differ at the first step and at the twentieth
TRIAL = {"train__steps": 20, "train__batch": 12, "optimizer__rate": 0.05, "eval__select": "last"}
MESHES = [(8, 1), (2, 4)]  # (4, 2) and (2, 2) over two processes are below


class MeshSession(Session):
    """A session on a mesh of the first devices."""

    shape = (1, 1)

    def mesh(self, config: ConfigDict) -> Mesh:
        data, model = self.shape
        return make_mesh(data, model, devices=jax.devices()[: data * model])


def session_on(shape):
    session = MeshSession(Progress())
    session.shape = shape
    return session


def losses(folder):
    """The training loss of every step."""
    return np.array([line["loss"] for line in read_log(folder) if "loss" in line])


def check_same(folder, reference):
    """Whether two trials' folders hold the same training run, and the same scores."""
    apart = np.abs(losses(folder) - losses(reference))
    assert len(apart) == read_result(reference)["steps"]
    print(f"first loss {apart[0]:.1e} apart, last {apart[-1]:.1e}")
    assert apart[0] < FIRST
    assert apart.max() < LAST
    ours, theirs = (load_delta(place / "delta.safetensors")[0] for place in (folder, reference))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=LAST), ours, theirs)
    for ours, theirs in zip(predictions(folder), predictions(reference), strict=True):
        assert ours["id"] == theirs["id"]
        for label, score in ours["scores"].items():
            assert score == pytest.approx(theirs["scores"][label], abs=LAST)


def predictions(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A task, and a tiny model whose heads, ffn and vocabulary divide by 2, 4 and (heads) 8."""
    root = write_task(tmp_path_factory.mktemp("devices"))
    write_llama_folder(root / "model", heads=8, kv_heads=4, width=64)
    return root


def config_of(place, **more):
    """20 steps at a rate that moves the prompt far; the last delta is the one that is kept."""
    more = {**TRIAL, **more}
    return make_config(place, more.pop("model", place / "model"), **more)


@pytest.fixture(scope="module")
def alone(place):
    """The folder of the trial on one device."""
    run_trial(config_of(place), place / "alone", session=session_on((1, 1)))
    return place / "alone"


@pytest.mark.matrix
@pytest.mark.parametrize("shape", MESHES)
def test_any_mesh_trains_the_same(place, alone, tmp_path, shape):
    """Fails if rows are dropped instead of padded, or if a loss is a mean over a device's rows."""
    run_trial(config_of(place), tmp_path / "w", session=session_on(shape))
    check_same(tmp_path / "w", alone)


@pytest.mark.matrix
def test_heads_that_no_mesh_divides(place, tmp_path):
    """Fails if heads are split over devices that their number is no multiple of."""
    model = write_llama_folder(tmp_path / "model", heads=9, kv_heads=3, width=54)
    for name, shape in (("alone", (1, 1)), ("w", (2, 4))):
        run_trial(config_of(place, model=model), tmp_path / name, session=session_on(shape))
    check_same(tmp_path / "w", tmp_path / "alone")


def test_sharded_weights_train_the_same(place, alone, tmp_path):
    """Fails if a layer is computed with its shards as if they were whole, or if the session leaves
    `gather` out or the weights whole.
    """
    config, session = config_of(place, mesh__weights="sharded"), session_on((4, 2))
    run_trial(config, tmp_path / "w", session=session)
    check_same(tmp_path / "w", alone)
    assert trial_id(config) == trial_id(config_of(place))
    loaded = session.model(config)
    assert loaded.model.gather == Gather(session.mesh(config))
    leaf = loaded.weights["layers"]["mlp"]["up"]["kernel"]
    assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}


@pytest.mark.matrix
def test_dropout_on_a_mesh(place, alone, tmp_path):
    """Fails if masks depend on a row's place, on its device, or on the microbatch it is in."""
    more = {"train__dropout": 0.2, "method__dropout": 0.1, "train__steps": 6}
    run_trial(config_of(place, **more), tmp_path / "alone", session=session_on((1, 1)))
    run_trial(
        config_of(place, **more, train__microbatches=2), tmp_path / "w", session=session_on((2, 1))
    )
    check_same(tmp_path / "w", tmp_path / "alone")
    assert np.abs(losses(tmp_path / "w") - losses(alone)[:6]).min() > 0.01, "dropped, each step"


@pytest.mark.matrix
@pytest.mark.parametrize("method", ("lora", "full"))
def test_other_methods_on_a_mesh(place, tmp_path, method):
    """Weights that are trained lie as frozen ones would, and so do the optimizer's moments.

    Fails if they are whole on every device, or if the moments are.
    """
    config = config_of(
        place, method__name=method, optimizer__rate=1e-3, optimizer__name="sgd", train__steps=8
    )
    for shape in [(1, 1), (2, 4)]:
        run_trial(config, tmp_path / f"{shape}", session=session_on(shape))
    check_same(tmp_path / "(2, 4)", tmp_path / "(1, 1)")
    if method == "full":
        adam = config_of(place, method__name=method, mesh__weights="sharded")
        state = initial_state(prepare(adam, session_on((2, 4))))
        for tree in (state.delta, optax.tree.get(state.opt_state, "mu")):
            leaf = tree["layers"]["mlp"]["up"]["kernel"]
            assert {shard.data.size for shard in leaf.addressable_shards} == {leaf.size // 8}


@pytest.mark.matrix
@pytest.mark.parametrize("family", ("t5", "gemma3"))
def test_other_families_on_a_mesh(tmp_path, family):
    """As above, where 3 heads divide by nothing; T5 with prompts on both stacks."""
    write_task(tmp_path)
    if family == "t5":
        write_complete_t5(tmp_path / "model")
    else:
        write_family_folder(tmp_path / "model", family)
    room = {"task__max_input": 64, "task__max_target": 8}
    room |= {"method__place": "both"} if family == "t5" else {}
    for shape in [(1, 1), (4, 2)]:
        run_trial(config_of(tmp_path, **room), tmp_path / f"{shape}", session=session_on(shape))
    check_same(tmp_path / "(4, 2)", tmp_path / "(1, 1)")


def test_weights_are_split_over_the_model_axis_and_rows_over_data(place):
    """Fails if `put_weight` or `put_batch` replicates, as with P() for every rule."""
    session = session_on((2, 4))
    prepared = prepare(config_of(place), session)
    leaves, _ = jax.tree_util.tree_flatten_with_path(prepared.loaded.weights)
    for path, leaf in leaves:
        name = path_name(path)
        sizes = {shard.data.size for shard in leaf.addressable_shards}
        assert len(leaf.addressable_shards) == 8
        assert sizes == {leaf.size if name.endswith("scale") else leaf.size // 4}, name
    state = initial_state(prepared)
    for leaf in jax.tree.leaves(state.arrays()):
        assert leaf.sharding.is_fully_replicated
        assert len(leaf.devices()) == 8


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def start_processes(folder, overrides, *, count=2, devices=2):
    """Starts the processes of a cluster on this machine."""
    port = free_port()
    head = [sys.executable, "-m", "tests.process", str(devices), str(folder)]
    numbers = [f"--distributed=localhost:{port},{number},{count}" for number in range(count)]
    return [
        subprocess.Popen(
            [*head, number, *overrides],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in numbers
    ]


def finish(processes):
    """What each process printed; all must end well."""
    try:
        ended = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, errors) in zip(processes, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def test_two_processes_train_the_same_and_the_first_writes(place, alone, tmp_path):
    """Fails if a process feeds its neighbour's rows, or if MetricsLog writes in every process, or
    if `agreed` is what each process says."""
    overrides = words(place, place / "model", **TRIAL, mesh__model=2)
    ended = finish(start_processes(tmp_path / "w", overrides))
    check_same(tmp_path / "w", alone)
    row = read_result(tmp_path / "w")
    assert (row["devices"]["count"], row["devices"]["processes"]) == (4, 2)
    assert "metrics.jsonl" in ended[0]["written"]
    assert ended[1]["written"] == []
    assert [one["agreed"] for one in ended] == [True, True]


@pytest.mark.matrix
def test_two_processes_save_all_weights(place, tmp_path):
    """Full fine-tuning whose weights no process has whole. Mutations: the first process fetches
    what it cannot reach; it alone asks for what all must send."""
    full = {"method__name": "full", "mesh__weights": "sharded", "log__snapshots": 2}
    sgd = {"optimizer__name": "sgd", "optimizer__rate": 0.05}
    more = {**TRIAL, **full, **sgd, "train__steps": 2}
    run_trial(config_of(place, **more), tmp_path / "alone", session=session_on((1, 1)))
    finish(start_processes(tmp_path / "w", words(place, place / "model", **more), devices=1))
    check_same(tmp_path / "w", tmp_path / "alone")
    ours, theirs = (
        load_delta(tmp_path / name / "snapshots" / "2.safetensors")[0] for name in ("w", "alone")
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=LAST), ours, theirs)


@pytest.mark.matrix
def test_a_sigterm_to_one_process_stops_both(place, tmp_path):
    """Both save after the same step, and go on from it. Mutations: the command line's own handler
    takes the signal from JAX; the one that got it leaves alone."""
    more = {**TRIAL, "train__steps": 5000, "log__checkpoint_every": 10_000, "log__every": 1}
    overrides = words(place, place / "model", **more)
    processes = start_processes(tmp_path / "w", overrides, devices=1)
    try:
        end = time.monotonic() + 240
        log = tmp_path / "w" / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("loss") > 3):
            assert time.monotonic() < end, "no step was taken"
            time.sleep(0.05)
        processes[1].terminate()
        ended = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [75, 75], ended[0][1][-2000:]
    (saved,) = (int(child.name) for child in (tmp_path / "w" / "checkpoints").iterdir())
    assert 3 < saved < 5000 and losses(tmp_path / "w").size == saved


class LoadedSession(MeshSession):
    """Lays weights that are loaded already over its mesh, instead of reading them again."""

    def model(self, config: ConfigDict) -> Loaded:
        mesh, loaded = self.mesh(config), self.loaded

        def put(path, leaf):
            return put_weight(mesh, path_name(path), np.asarray(leaf))

        def make():
            weights = jax.tree_util.tree_map_with_path(put, loaded.weights)
            return dataclasses.replace(loaded, weights=weights)

        if "model" not in self._models:
            self._models["model"] = make()
        return self._models["model"]


def run_smollm2(smollm2, folder, shape):
    """Trains on the real model: 9 heads and 3 key-value heads, which no mesh divides.

    16 examples a step: on fewer, float32 rounding alone moves the loss of 30 layers by 1e-5.
    """
    more = {"model": smollm2.name, "task__template": "{text}:", "optimizer__rate": 0.005}
    config = config_of(folder, **more, train__batch=16, train__steps=6, method__length=4)
    session = LoadedSession(Progress())
    session.shape, session.loaded = shape, smollm2
    run_trial(config, folder / f"{shape}", session=session)
    return folder / f"{shape}"


@pytest.fixture(scope="module")
def snippets_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real")
    sizes = {"train": 32, "validation": 4, "test": 4}
    return write_task(folder, sizes, endings=("film",))


@pytest.mark.real
@pytest.mark.long
def test_smollm2_on_a_mesh(smollm2, snippets_folder):
    """Eight devices share two cores: six steps. Twenty, and other meshes, are on tiny models."""
    alone, sharded = (run_smollm2(smollm2, snippets_folder, shape) for shape in ((1, 1), (2, 4)))
    check_same(sharded, alone)


@pytest.mark.matrix
def test_a_sweep_joins_before_it_asks_for_devices(place, tmp_path):
    """Fails if configs are resolved first: dtype "auto" asks for devices, and it is too late."""
    file = tmp_path / "one.py"
    file.write_text(
        "from softprompt.config import base_config\nCAPTION = ''\n"
        "def sweep(subset):\n    return [base_config()]\n"
        "def table(rows): ...\ndef figure(rows): ...\n"
    )
    overrides = [w for w in words(place, place / "model", **TRIAL) if "model.dtype" not in w]
    command = [sys.executable, "-m", "softprompt", "sweep", str(file), "--dry-run"]
    address = f"--distributed=localhost:{free_port()},0,1"
    more = ["--workdir", str(tmp_path / "w"), address, *overrides]
    done = subprocess.run([*command, *more], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "1 to run" in done.stdout
