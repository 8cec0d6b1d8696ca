"""One trial as an idempotent command on a folder: whose it is, what it holds, when it ends."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from softprompt.config import from_dict, to_dict, trial_id
from softprompt.errors import UserError
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.results import read_result
from softprompt.training.logs import read_log
from softprompt.training.memory import program_memory
from softprompt.trials.estimate import estimate
from softprompt.trials.measure import measure
from softprompt.trials.prepare import check_read, initial_state, prepare, train_source
from softprompt.trials.run import check_folder, read_config, run_trial, write_config
from softprompt.trials.session import Session
from softprompt.trials.sweep import record_failure
from tests.own_task import SIZES, Lines, make_config, write_task


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_task(tmp_path_factory.mktemp("trial"))


@pytest.fixture(scope="module")
def session():
    return Session(Lines())


@pytest.fixture(scope="module")
def config(place, tiny_folder):
    return make_config(place, tiny_folder)


@pytest.fixture(scope="module")
def done(place, config, session):
    """The folder of a finished trial, and its row."""
    row = run_trial(config, place / "done", session=session)
    return place / "done", row


def test_what_the_folder_holds(done, config):
    """Mutation: write the result before the delta."""
    folder, row = done
    names = {child.name for child in folder.iterdir()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "delta.safetensors",
        "predictions.jsonl",
        "result.json",
    }
    assert to_dict(read_config(folder)) == to_dict(config)
    assert read_result(folder) == json.loads(json.dumps(row))
    newest = max((folder / name for name in names), key=lambda file: file.stat().st_mtime_ns)
    assert newest.name == "result.json"


def test_the_row(done, config):
    folder, row = done
    assert (row["trial"], row["status"], row["steps"]) == (trial_id(config), "done", 8)
    assert row["trainable"] == 3 * 48
    assert row["metrics"]["validation"]["examples"] == SIZES["validation"]
    assert row["metrics"]["test"]["examples"] == SIZES["test"]
    assert row["metrics"]["selected_step"] in (0, 8)
    assert 0 < row["compile_seconds"] < row["seconds"]
    assert row["flops"] > 0
    assert 0 <= row["input_wait_share"] < 1
    assert row["peak_memory_bytes"] > 2**20
    assert row["delta_bytes"] == (folder / "delta.safetensors").stat().st_size
    assert (row["devices"]["count"], row["devices"]["processes"]) == (8, 1)


def test_the_memory_of_a_program():
    """Mutation: what is donated counts twice; what lies between is left out; outputs alone."""
    x = jax.ShapeDtypeStruct((2**18,), np.float32)  # a megabyte

    def memory(function, **options):
        return program_memory(jax.jit(function, **options).lower(x, x).compile())

    kept, donated = (
        memory(lambda x, y: (2 * x + y, jnp.sort(y)), donate_argnums=d) for d in ((), 0)
    )
    assert kept >= 4 * 2**20, "two come in, two go out"
    assert kept - donated == 2**20
    assert memory(lambda x, y: x + jnp.sort(y)[::2].sum()) >= 3.5 * 2**20, (
        "half of one lies between"
    )


@pytest.mark.matrix
def test_the_memory_of_a_step(done, place, tiny_folder, session, tmp_path):
    """Mutation: it is that of the process, or without what is trained. The delta, two moments and
    the gradient are as large as the weights."""
    _, row = done
    whole = row["weight_bytes"]
    assert whole < row["step_memory_bytes"] < row["peak_memory_bytes"] / 10
    full = make_config(place, tiny_folder, method__name="full")
    trained = run_trial(full, tmp_path, session=session)
    assert (trained["weight_bytes"], trained["delta_bytes"] // whole) == (0, 1)
    assert trained["step_memory_bytes"] > row["step_memory_bytes"] + 2 * whole
    costs = estimate(full, session)
    assert 0.2 < costs["memory_bytes"] / trained["step_memory_bytes"] < 5


def test_an_estimate_counts_the_update_and_the_text(
    place, tiny_folder, session, monkeypatch, tmp_path
):
    """Mutation: training all weights costs what their products do; a text is free."""
    monkeypatch.setattr("softprompt.trials.estimate.machine_flops", lambda dtype: 1e9)
    monkeypatch.setattr("softprompt.trials.estimate.machine_bandwidth", lambda: 1e6)
    costs = estimate(make_config(place, tiny_folder, method__name="full"), session)
    parameters = costs["trainable"]
    assert costs["seconds"] == pytest.approx(costs["flops"] / 5e8 + 8 * parameters * 60 / 1e6)
    none = {"method__name": "none"}
    plain = estimate(make_config(place, tiny_folder, **none), session)
    (tmp_path / "a.txt").write_text("a warm film " * 400)
    text = {"eval__text": str(tmp_path / "a.txt")}
    scored = estimate(make_config(place, tiny_folder, **none, **text), session)
    assert plain["seconds"] == pytest.approx(plain["flops"] / 5e8)
    assert scored["flops"] - plain["flops"] > 2 * parameters * 65536


def test_the_delta_is_the_selected_one(done, config):
    """And says where it is from."""
    folder, row = done
    delta, provenance = load_delta(folder / "delta.safetensors")
    assert delta["prompt"].shape == (3, 48)
    assert delta["prompt"].dtype == np.float32
    assert provenance["trial"] == row["trial"]
    assert provenance["model"] == config.model.name
    assert len(provenance["fingerprint"]) == 16
    assert provenance["method"] == "prompt"


def test_predictions_agree_with_the_row(done, place):
    folder, row = done
    lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"test-{n}" for n in range(SIZES["test"])]
    truth = [json.loads(line)["label"] for line in (place / "test.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == truth
    for line in lines:
        assert line["predicted"] == max(line["scores"], key=line["scores"].get)
        assert all(score < 0 for score in line["scores"].values())
    hits = np.mean([line["predicted"] == line["label"] for line in lines])
    assert hits == row["metrics"]["test"]["accuracy"]


def test_a_finished_trial_is_not_run_again(done, config, session):
    """Mutation: load the model before the result is looked for."""
    folder, row = done
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    progress = Lines()
    again = run_trial(config, folder, session=Session(progress))
    assert again == read_result(folder)
    assert progress.said == [f"prompt-3-vocabulary-mine-s0 is done already (in {folder})"]
    assert progress.stages == [], "no model, no data, no compilation"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_logging_and_mesh_may_differ_on_a_rerun(done, place, tiny_folder):
    """They are not part of what a trial is."""
    folder, _ = done
    other = make_config(place, tiny_folder, log__every=5, mesh__model=2)
    assert run_trial(other, folder, session=Session(Lines()))["status"] == "done"


def test_another_config_is_refused(done, place, tiny_folder):
    """Mutation: compare folders by name, or not at all."""
    folder, _ = done
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    other = make_config(place, tiny_folder, method__length=5, seed=3)
    with pytest.raises(UserError) as error:
        run_trial(other, folder, session=Session(Lines()))
    assert str(error.value) == (
        f"{folder} holds another trial (method.length: 5, 3; seed: 3, 0: requested, stored); "
        "give another --workdir"
    )
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_a_failed_trial_is_tried_again(config, session, tmp_path):
    """Mutation: take any row for an end."""
    row = {"trial": trial_id(config), "status": "failed", "config": to_dict(config)}
    (tmp_path / "result.json").write_text(json.dumps(row))
    assert run_trial(config, tmp_path, session=session)["status"] == "done"
    assert read_result(tmp_path)["status"] == "done"


@pytest.mark.parametrize("method", ["none", "fewshot"])
def test_methods_that_train_nothing(place, tiny_folder, session, tmp_path, method):
    """No log, no checkpoint, an empty delta; and idempotent too."""
    shots = {"method__shots": 2} if method == "fewshot" else {}
    config = make_config(place, tiny_folder, method__name=method, **shots)
    row = run_trial(config, tmp_path, session=session)
    assert row["trainable"] == 0
    assert row["metrics"]["test"]["examples"] == SIZES["test"]
    names = {child.name for child in tmp_path.iterdir()}
    assert names == {"config.json", "delta.safetensors", "predictions.jsonl", "result.json"}
    assert load_delta(tmp_path / "delta.safetensors")[0] == {}
    assert run_trial(config, tmp_path, session=session) == read_result(tmp_path)


def test_selecting_the_last_delta(place, done, tiny_folder, session, tmp_path):
    """Mutation: test the best one whatever the config says."""
    config = make_config(place, tiny_folder, eval__select="last")
    row = run_trial(config, tmp_path, session=session)
    assert row["metrics"]["selected_step"] == 8
    (line,) = [x for x in read_log(tmp_path) if x["step"] == 8 and "validation/accuracy" in x]
    assert row["metrics"]["validation"]["accuracy"] == line["validation/accuracy"]
    (trained,) = [x for x in read_log(tmp_path) if x["step"] == 8 and "loss" in x]
    norm = np.linalg.norm(load_delta(tmp_path / "delta.safetensors")[0]["prompt"])
    assert norm == pytest.approx(trained["delta_norm"], rel=1e-6)


def scores_of(prepared, delta):
    """Scores [N, C] of the test split's candidates, rounded as predictions are."""
    _, (predictions,) = measure(prepared, delta, "test")
    return np.array([list(one["scores"].values()) for one in predictions])


def test_the_average_is_what_is_tested_and_saved(place, done, tiny_folder, session, tmp_path):
    """And training goes as without it. Mutation: save the delta; average from zero; train on from
    the average."""
    settings = {"optimizer__rate": 0.3, "eval__select": "last", "log__snapshots": 1}
    plain = make_config(place, tiny_folder, **settings)
    run_trial(plain, tmp_path / "plain", session=session)
    average = make_config(place, tiny_folder, **settings, train__ema=0.75)
    row = run_trial(average, tmp_path / "average", session=session)
    wanted_PD = np.array(initial_state(prepare(plain, session)).delta["prompt"], np.float64)
    for step in range(1, 9):
        name = f"snapshots/{step}.safetensors"
        delta_PD = load_delta(tmp_path / "plain" / name)[0]["prompt"]
        wanted_PD = 0.75 * wanted_PD + 0.25 * delta_PD
        found_PD = load_delta(tmp_path / "average" / name)[0]["prompt"]
        np.testing.assert_allclose(found_PD, wanted_PD, rtol=1e-4, atol=1e-5)
    saved_PD = load_delta(tmp_path / "average" / "delta.safetensors")[0]["prompt"]
    np.testing.assert_array_equal(saved_PD, found_PD)
    assert np.abs(saved_PD - delta_PD).max() > 0.05
    prompts = ({"prompt": x_PD} for x_PD in (delta_PD, saved_PD))
    scores = [scores_of(prepare(plain, session), prompt) for prompt in prompts]
    assert np.abs(scores[0] - scores[1]).max() > 1e-3
    lines = (tmp_path / "average" / "predictions.jsonl").read_text().splitlines()
    found = [list(json.loads(line)["scores"].values()) for line in lines]
    np.testing.assert_allclose(found, scores[1], atol=2e-5)
    assert row["metrics"]["selected_step"] == 8


@pytest.mark.parametrize("unit", ["absolute", "embedding_rms"])
def test_rows_stay_within_the_cap(place, tiny_folder, session, tmp_path, unit):
    """In the rate's unit. Mutation: the cap is not set, or another unit's; the root of the width is
    left out."""
    more = {"optimizer__rate": 0.5, "optimizer__rate_unit": unit, "optimizer__max_row_norm": 1.5}
    config = make_config(place, tiny_folder, **more)
    run_trial(config, tmp_path, session=session)
    table_VD = np.asarray(session.model(config).weights["embed"]["embedding"], np.float64)
    typical = np.sqrt(np.mean(table_VD**2) * table_VD.shape[1])
    cap = 1.5 * (typical if unit == "embedding_rms" else 1)
    lines = [line for line in read_log(tmp_path) if "loss" in line]
    assert max(line["row_norm_max"] for line in lines) == pytest.approx(cap, rel=1e-5)


@pytest.mark.matrix
def test_microbatches_change_nothing(place, done, tiny_folder, session, tmp_path):
    """Mutation: pad the rows to the mesh alone, so that they do not divide."""
    batch = {"train__batch": 6, "mesh__model": 8}
    whole = make_config(place, tiny_folder, **batch)
    split = make_config(place, tiny_folder, **batch, train__microbatches=2)
    run_trial(whole, tmp_path / "whole", session=session)
    run_trial(split, tmp_path / "split", session=session)
    losses = [
        [line["loss"] for line in read_log(tmp_path / name) if "loss" in line]
        for name in ("whole", "split")
    ]
    assert len(losses[0]) == 8
    np.testing.assert_allclose(*losses, atol=1e-5)


def test_a_mistake_leaves_no_folder(place, tiny_folder, session, tmp_path):
    """Or the corrected command would be refused. Mutation: claim the folder first."""
    wrong = make_config(place, tiny_folder, method__init="file", method__init_file="no.safetensors")
    with pytest.raises(UserError, match=r"no.safetensors: No such file"):
        run_trial(wrong, tmp_path / "w", session=session)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("text", ["nowhere.txt", "short.txt"])
def test_a_text_is_read_before_anything_is_trained(place, tiny_folder, tmp_path, text):
    """Mutation: only once the trial has trained."""
    (tmp_path / "short.txt").write_text("a warm film")
    wrong = make_config(place, tiny_folder, eval__text=str(tmp_path / text))
    with pytest.raises(UserError, match="config key 'eval.text'"):
        run_trial(wrong, tmp_path / "w", session=Session(Lines()))
    assert not (tmp_path / "w").exists()


def test_an_imported_delta_is_kept_by_a_sweep_that_tries_again(config, session, tmp_path):
    """Mutations: the row of the first failure makes the folder a trial's own; a trial's own delta
    whose row was deleted is taken for an imported one."""
    folder, own = epath.Path(tmp_path / "imported"), epath.Path(tmp_path / "own")
    for place, origin in ((folder, {"imported": {}}), (own, {})):
        write_config(place, config)
        save_delta(place / "delta.safetensors", {"prompt": np.zeros((1, 4))}, origin)
    check_folder(own, config)
    theirs = (folder / "delta.safetensors").read_bytes()
    for _ in range(2):
        with pytest.raises(UserError, match="holds an imported delta") as error:
            run_trial(config, folder, session=session)
        record_failure(config, folder, error.value, 1.0)
    assert (folder / "delta.safetensors").read_bytes() == theirs


def test_claiming(config, tmp_path):
    folder = epath.Path(tmp_path / "new")
    check_folder(folder, config)
    assert not folder.exists()
    write_config(folder, config)
    written = (folder / "config.json").read_text()
    assert to_dict(from_dict(json.loads(written))) == to_dict(config)
    write_config(folder, config)
    check_folder(folder, config)
    assert (folder / "config.json").read_text() == written


def test_of_several_processes_the_first_claims(config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_config(epath.Path(tmp_path / "new"), config)
    assert not (tmp_path / "new").exists()


def test_reading_a_config(tmp_path):
    with pytest.raises(
        UserError, match=rf"{tmp_path}: not a trial's folder \(it has no config.json\)"
    ):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(UserError, match=r"config.json: not readable as JSON \(Expecting"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"method": {"lenght": 3}}')
    message = r"config.json: unknown config key 'method.lenght' \(did you mean"
    with pytest.raises(UserError, match=message):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config.json: expected a JSON object"):
        read_config(tmp_path)


def test_a_variable_that_no_module_reads_is_refused(config, session):
    """Linen would ignore it. Mutation: do not look."""
    prepared = prepare(config, session)
    step, weights, batch = prepared.step, prepared.loaded.weights, train_source(prepared)[0]
    delta = {"prompt": np.zeros((3, 48), np.float32)}
    check_read(step, weights, delta, batch)
    with pytest.raises(UserError, match="no module of the model reads the delta's prefix"):
        check_read(step, weights, delta | {"prefix": np.zeros(3, np.float32)}, batch)


def test_only_the_first_process_writes(place, tiny_folder, session, tmp_path, monkeypatch):
    """Mutation: another one writes its row, which may come before the delta."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    row = run_trial(
        make_config(place, tiny_folder, method__name="none"), tmp_path / "w", session=session
    )
    assert row["status"] == "done"
    assert not list(tmp_path.rglob("*.*"))
