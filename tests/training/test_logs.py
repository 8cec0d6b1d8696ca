"""metrics.jsonl: what is kept on resume, what JSON cannot say, who writes, and copies elsewhere."""

import json
import sys

import jax
import numpy as np
import pytest

from softprompt.errors import UserError
from softprompt.training import logs
from softprompt.training.logs import MetricsLog, open_sinks, read_line, read_log


def fill(folder, steps):
    log = MetricsLog(folder, step=None, sinks=[])
    for step in steps:
        log.write({"step": step, "loss": step / 10})


def test_lines_are_appended_as_they_come(tmp_path):
    log = MetricsLog(tmp_path, step=None, sinks=[])
    assert read_log(tmp_path) == []
    log.write({"step": 1, "loss": np.float32(0.5)})
    assert read_log(tmp_path) == [{"step": 1, "loss": 0.5}]
    log.write({"step": 2, "loss": jax.numpy.float32(0.25)})
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


@pytest.mark.parametrize(("step", "kept"), [(None, []), (0, [0]), (4, [0, 2, 4, 4]), (9, None)])
def test_the_log_is_cut_back_to_the_restored_step(tmp_path, step, kept):
    """Mutation: keep `line["step"] < step`, or all lines."""
    steps = [0, 2, 4, 4, 6]
    fill(tmp_path, steps)
    MetricsLog(tmp_path, step=step, sinks=[]).write({"step": 99})
    assert [line["step"] for line in read_log(tmp_path)] == [*(steps if kept is None else kept), 99]


@pytest.mark.parametrize("rest", ['{"step": 3, "lo', '{"step": 3', "{", "[3]", '{"loss": 1}'])
def test_a_line_that_a_kill_cut_short_is_cut_off(tmp_path, rest):
    """Mutation: append to the file as it is found."""
    fill(tmp_path, [1, 2])
    with (tmp_path / logs.FILE).open("a") as file:
        file.write(rest)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]
    MetricsLog(tmp_path, step=5, sinks=[]).write({"step": 6})
    lines = (tmp_path / logs.FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 6]


def test_what_is_kept_keeps_its_bytes(tmp_path):
    fill(tmp_path, [1, 2])
    before = (tmp_path / logs.FILE).read_bytes()
    MetricsLog(tmp_path, step=2, sinks=[])
    assert (tmp_path / logs.FILE).read_bytes() == before


def test_numbers_that_are_not_finite_are_null(tmp_path):
    """JSON has no NaN. Mutation: write json.dumps' own NaN."""
    log = MetricsLog(tmp_path, step=None, sinks=[])
    log.write({"step": 1, "loss": float("nan"), "norm": np.float32("inf"), "rate": 0.1})
    text = (tmp_path / logs.FILE).read_text()
    assert text == '{"step": 1, "loss": null, "norm": null, "rate": 0.1}\n'


def test_of_several_processes_the_first_writes(tmp_path, monkeypatch):
    """Mutation: write in every process."""
    fill(tmp_path, [1, 2])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    before = (tmp_path / logs.FILE).read_bytes()
    MetricsLog(tmp_path, step=1, sinks=[]).write({"step": 3})
    assert (tmp_path / logs.FILE).read_bytes() == before


def test_a_folder_that_cannot_append_is_rewritten_by_each_line(tmp_path, monkeypatch):
    """As gs:// folders are; here a local one is told that it is not."""
    log = MetricsLog(tmp_path, step=None, sinks=[])
    monkeypatch.setattr(log, "_local", False)
    log.write({"step": 1})
    log.write({"step": 2})
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_sinks_get_each_new_line(tmp_path):
    fill(tmp_path, [1])
    seen = []
    log = MetricsLog(tmp_path, step=1, sinks=[seen.append])
    log.write({"step": 2, "loss": 0.5})
    assert seen == [{"step": 2, "loss": 0.5}]


CONFIG = {"train": {"steps": 4}}


def opened(folder, *sinks):
    """The named sinks, opened for a trial."""
    wanted = {name: name in sinks for name in ("tensorboard", "wandb")}
    return open_sinks(folder, "prompt-20", CONFIG, **wanted)


def test_no_sinks_unless_they_are_asked_for(tmp_path):
    with opened(tmp_path) as sinks:
        assert sinks == []


@pytest.mark.parametrize(("key", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_sink_without_its_package(tmp_path, monkeypatch, key, package):
    monkeypatch.setitem(sys.modules, package, None)
    wanted = rf"config key 'log.{key}' is True; allowed: False without {package}"
    with pytest.raises(UserError, match=wanted), opened(tmp_path, key):
        pass


class Closing:
    """Knows whether its block was left."""

    left = False

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.left = True


class FakeWriter(Closing):
    """Stands for tensorboardX.SummaryWriter, which an extra installs."""

    def __init__(self, folder):
        self.folder, self.scalars = folder, []
        FakeWriter.last = self

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def flush(self):
        pass


def test_tensorboard_gets_scalars_by_step(tmp_path, monkeypatch):
    module = type(sys)("tensorboardX")
    module.SummaryWriter = FakeWriter
    monkeypatch.setitem(sys.modules, "tensorboardX", module)
    with opened(tmp_path, "tensorboard") as sinks:
        MetricsLog(tmp_path, step=None, sinks=sinks).write({"step": 4, "loss": 0.5})
        assert not FakeWriter.last.left
    assert FakeWriter.last.left
    assert FakeWriter.last.folder == str(tmp_path / "tensorboard")
    assert FakeWriter.last.scalars == [("loss", 0.5, 4)]


def test_wandb_gets_the_config_and_lines_by_step(tmp_path, monkeypatch):
    """Mutations: a trial's run is ended by the next one's; it is never ended."""
    calls, runs = [], []

    class Run(Closing):
        def __init__(self):
            runs.append(self)

        def log(self, values, step):
            calls.append((values, step))

    module = type(sys)("wandb")
    module.init = lambda **given: calls.append(given) or Run()
    monkeypatch.setitem(sys.modules, "wandb", module)
    with opened(tmp_path, "wandb") as (sink,):
        sink({"step": 4, "loss": 0.5})
        assert not runs[0].left
    assert runs[0].left
    own = {"project": "softprompt", "name": "prompt-20", "config": CONFIG}
    assert calls == [own | {"reinit": "create_new"}, ({"loss": 0.5}, 4)]


def test_read_line():
    assert read_line('{"step": 1}') == {"step": 1}
    for text in ("", "nonsense", "1", "null", '{"loss": 1}'):
        assert read_line(text) is None
