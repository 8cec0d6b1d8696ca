"""What a session keeps: models, while they are few enough."""

import weakref
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from softprompt.config import from_dict, to_dict
from softprompt.models.dropout import Dropout
from softprompt.training.memory import CACHE_SHARE, bytes_here, bytes_of
from softprompt.training.sharding import make_mesh, put_weight
from softprompt.trials import session as session_module
from softprompt.trials.data import TaskData
from softprompt.trials.session import CACHED_DATA, Session
from tests.contracts.examples import trial_config, write_task
from tests.own_task import Lines
from tests.tiny import write_llama_folder


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    """Of three models of one size."""
    place = tmp_path_factory.mktemp("models")
    folders = [write_llama_folder(place / str(n), seed=n) for n in range(3)]
    return [trial_config(folder, "jsonl:none") for folder in folders]


def test_models_are_kept_while_there_is_room(configs, monkeypatch):
    """Room for one besides. Mutations: all are kept; none is; the last used goes first."""
    each = bytes_here(Session(Lines()).model(configs[0]).weights)
    monkeypatch.setattr(session_module, "device_memory", lambda: 1.5 * each / CACHE_SHARE)
    shared = Session(Lines())
    first, second = shared.model(configs[0]), shared.model(configs[1])
    assert shared.model(configs[0]) is first, "it is the last used now"
    third = shared.model(configs[2])
    assert shared.model(configs[0]) is first
    assert shared.model(configs[2]) is third
    assert shared.model(configs[1]) is not second
    assert len(shared.progress.stages) == 4


def test_a_model_that_is_larger_than_all_that_is_kept(configs, monkeypatch):
    """Mutations: the model that is asked for is forgotten at once; room is made after a load, so
    that memory has both.
    """
    monkeypatch.setattr(session_module, "device_memory", lambda: 0)
    shared = Session(Lines())
    first = weakref.ref(shared.model(configs[0]))
    assert shared.model(configs[0]) is first()
    load, there = shared._load, []
    monkeypatch.setattr(shared, "_load", lambda c: there.append(first()) or load(c))
    shared.model(configs[1])
    assert there == [None] and len(shared.progress.stages) == 2


def test_what_is_odd_about_the_data_is_said_once(tiny_folder, tmp_path):
    """Breaks when leaks between splits, or labels that a sum cannot compare, go unsaid."""
    source, keys = write_task(tmp_path), {"task__id_field": ""}
    keys["task__verbalizers"] = {"neg": " negative", "pos": " x"}
    (tmp_path / "test.jsonl").write_bytes((tmp_path / "train.jsonl").read_bytes())
    shared = Session(Lines())
    for _ in range(2):
        shared.data(trial_config(tiny_folder, source, **keys), bos=False)
    said = [line for line in shared.progress.said if "favours" in line or "also stand" in line]
    assert said[0] == "warning: 40 of 40 test texts of task 'own' also stand in train"
    assert len([line for line in said if "eval.score=mean" in line]) == 1


def test_tokens_are_those_of_a_revision(configs, monkeypatch):
    """Mutation: a revision with another tokenizer takes the first one's tokens."""
    read = []

    def no_data(config, loaded, *, bos, say):
        read.append(config)
        return TaskData(None, *[SimpleNamespace(ids=[])] * 3)

    monkeypatch.setattr(session_module, "read_task", no_data)
    monkeypatch.setattr(Session, "model", lambda self, config: None)
    shared, tree = Session(Lines()), to_dict(configs[0])
    for tree["model"]["revision"] in ("", "step1", "step1"):
        shared.data(from_dict(tree), bos=True)
    assert len(read) == 2


def test_data_used_longest_ago_is_forgotten(configs, monkeypatch):
    """Mutations: data is never forgotten; the last used goes first."""
    read = []

    def no_data(config, loaded, *, bos, say):
        read.append(config.data.cap)
        return TaskData(None, *[SimpleNamespace(ids=[])] * 3)

    monkeypatch.setattr(session_module, "read_task", no_data)
    shared, tree = Session(Lines()), to_dict(configs[0])
    for cap in [*range(CACHED_DATA), CACHED_DATA - 1, 0]:
        tree["data"]["cap"] = cap
        shared.data(from_dict(tree), bos=True)
    assert read == [*range(CACHED_DATA), 0]
    assert len(shared._data) == CACHED_DATA


def test_a_program_is_told_by_what_is_dropped(configs):
    """Mutation: arrays alone tell it, of which a rate of the model has as many as one of LoRA."""
    shared, key = Session(Lines()), jax.random.key(0)
    keys = [Dropout(key, **{name: np.float32(0.9)}) for name in ("model", "lora")]
    keys.append(Dropout(key, model=np.float32(0.7)))
    first, lora, again = [shared.program(None, None, None, ({}, {}, {}, {}, k)) for k in keys]
    assert first is again and first is not lora


def test_bytes_of_a_device():
    """Mutation: the bytes of the whole array."""
    mesh = make_mesh(2, 4)
    array = put_weight(mesh, "layers/mlp/up/kernel", jax.numpy.zeros((2, 8, 12)).__array__())
    assert bytes_of({"up": array}) == 2 * 8 * 12 * 4
    assert bytes_here({"up": array}) == 2 * 8 * 12 * 4 / 4
