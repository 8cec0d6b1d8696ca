"""A tiny model with tasks of every kind, and an engine that serves them."""

import threading

import pytest

from experiments.serving_tasks import make_task
from softprompt.pretrained.loading import load_model
from softprompt.serving.engine import Engine
from softprompt.serving.placement import Sizes
from softprompt.serving.requests import Finish
from tests.contracts.examples import trial_config, two_tasks, write_task

METHODS = {
    "short": {"name": "prompt", "length": 3},
    "long": {"name": "prompt", "length": 9},
    "prefix": {"name": "prefix", "length": 4},
    "lora": {"name": "lora", "rank": 2},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter", "bottleneck": 4},
    "bitfit": {"name": "bitfit"},
}


class Asked:
    """A request's events."""

    def __init__(self, engine, request):
        self.tokens, self.end, self.done = [], None, threading.Event()
        self.ticket = engine.submit(request, self.take)

    def take(self, event):
        if isinstance(event, Finish):
            self.end = event
            self.done.set()
        else:
            self.tokens.append(event)

    def wait(self):
        assert self.done.wait(60), "the request did not end"
        return self

    @property
    def ids(self):
        return [token.id for token in self.tokens]


@pytest.fixture(scope="session")
def tiny_loaded(tiny_folder):
    return load_model(str(tiny_folder))


@pytest.fixture(scope="session")
def task_root(tiny_loaded, tmp_path_factory):
    """Folders of untrained tasks: those of `METHODS`, and "two", a prompt for each of two tasks."""
    root = tmp_path_factory.mktemp("tasks")
    for seed, (name, method) in enumerate(METHODS.items()):
        make_task(root / name, tiny_loaded, seed=seed, **method)
    source = write_task(tmp_path_factory.mktemp("data"))
    config = trial_config(tiny_loaded.name, source, data__mixture=two_tasks(source))
    make_task(root / "two", tiny_loaded, seed=9, config=config, name="multitask", length=3)
    return root


@pytest.fixture(scope="module")
def engine(tiny_loaded, task_root):
    made = Engine(tiny_loaded, sizes=Sizes(rows=2, input=20, new=9))
    for name in ("short", "long", "lora"):
        made.load(name, task_root / name)
    yield made
    made.close()
