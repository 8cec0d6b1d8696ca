"""`softprompt serve` on a tiny model and a real trial: the engine behind the application."""

import numpy as np
import pytest
import uvicorn

from softprompt import cli
from softprompt.console import Progress
from softprompt.trials.evaluate import predict_lines
from tests.own_task import words, write_task
from tests.serving.http import ADMIN_KEY, KEY, bearer, call, post
from tests.tiny import write_llama_folder

LINES = ["a warm film", "the plot is thin", "moving"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a trial and an imported prompt under `tasks`, and keys."""
    place = tmp_path_factory.mktemp("serve")
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "context": 1024}
    model = write_llama_folder(place / "model", **sizes)
    write_task(place)
    trial = ["train", *words(place, model, train__steps=4), "--workdir", f"{place}/tasks/mine"]
    assert cli.main(trial) == 0
    np.save(place / "five.npy", np.ones((5, 16), np.float32))
    imported = [f"{place}/five.npy", "--model", str(model), "--workdir", f"{place}/tasks/five"]
    assert cli.main(["import", *imported]) == 0
    (place / "key").write_text(KEY)
    (place / "admin").write_text(ADMIN_KEY)
    return place


def serve(place, monkeypatch, use, *more):
    """Runs the command; in place of the socket, the application is given to `use`."""
    run = lambda server, sockets: use(server.config.app)  # noqa: E731
    monkeypatch.setattr(uvicorn.Server, "run", run)
    sizes = ["--rows", "2", "--max-input", "64", "--max-tokens", "32", "--port", "0"]
    return cli.main(["serve", f"{place}/tasks", "--model", f"{place}/model", *sizes, *more])


def test_a_folder_of_tasks_is_served(place, monkeypatch):
    """Breaks when the engine is not given what the command says, or its answers are another
    command's: load no task, or fill another template.
    """
    seen = {}

    def use(app):
        seen["names"] = [
            one["id"] for one in call(app, "GET", "/v1/models", headers=bearer(KEY)).json()["data"]
        ]
        predicted = post(app, "/v1/tasks/mine/predict", {"inputs": LINES}, headers=bearer(KEY))
        seen["predictions"] = predicted.json()["predictions"]
        ask = {"prompt": "the film", "temperature": 0, "max_tokens": 6, "echo": True, "logprobs": 1}
        for name in ("model", "mine", "five"):
            answer = post(app, "/v1/completions", ask | {"model": name}, headers=bearer(KEY))
            seen[name] = answer.json()["choices"][0]
        again = call(app, "PUT", "/v1/tasks/mine", headers=bearer(ADMIN_KEY))
        gone = call(app, "DELETE", "/v1/tasks/five", headers=bearer(ADMIN_KEY))
        seen["changes"] = again.status_code, gone.status_code
        seen["too long"] = post(
            app, "/v1/completions", ask | {"model": "mine", "max_tokens": 33}, headers=bearer(KEY)
        ).status_code

    keys = ["--key-file", f"{place}/key", "--admin-key-file", f"{place}/admin"]
    assert serve(place, monkeypatch, use, *keys, "--alias", "best=mine:1,five:1") == 0
    assert seen["names"] == ["model", "five", "mine", "best"]
    with Progress() as progress:
        expected = list(predict_lines(place / "tasks" / "mine", LINES, progress))
    for ours, theirs in zip(seen["predictions"], expected, strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probabilities"] == pytest.approx(theirs["probabilities"], abs=2e-6)
    for name in ("model", "mine", "five"):
        found = seen[name]["logprobs"]
        assert found["token_logprobs"][0] is None
        assert all(value < 0 for value in found["token_logprobs"][1:])
        greedy = zip(found["token_logprobs"][-6:], found["top_logprobs"][-6:], strict=True)
        assert all(chosen == max(top.values()) for chosen, top in greedy)
        assert seen[name]["text"].startswith("the film")
    assert len({str(seen[name]["logprobs"]) for name in ("model", "mine", "five")}) == 3
    assert seen["changes"] == (200, 200)
    assert seen["too long"] == 400


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--host", "0.0.0.0"], "--key-file"),
        (["--port", "70000"], "70000"),
        (["--rows", "0"], "--rows is 0"),
        (["--timeout", "nan"], "--timeout is nan"),
        (["--alias", "best=absent:1"], "'absent'"),
        (["--alias", "mine=five:1"], "taken"),
        (["--key-file", "absent"], "absent"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(place, monkeypatch, capsys, more, said):
    """Breaks when a check comes after the engine: it would take minutes to say so."""
    monkeypatch.setattr("softprompt.serving.engine.Engine", None)
    assert serve(place, monkeypatch, lambda app: None, *more) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
