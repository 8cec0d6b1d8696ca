"""Config files and their arguments, and what the files of this repository say."""

import os
import sys
from pathlib import Path

import pytest

from softprompt.config import values as configs
from softprompt.config.files import list_modules, load_config, parse_arg
from softprompt.data.builtin_tasks import get_task
from softprompt.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def test_parse_arg():
    found = parse_arg("length=5,small,rate=1", length=20, small=False, rate=0.1, name="x")
    assert found.to_dict() == {"length": 5, "small": True, "rate": 1.0, "name": "x"}
    with pytest.raises(UserError, match="unknown config argument 'lenght' .did you mean 'length'"):
        parse_arg("lenght=5", length=20)
    with pytest.raises(UserError, match="config key 'length' is 'x'"):
        parse_arg("length=x", length=20)


@pytest.mark.parametrize("path", list_modules("configs"))
def test_every_config_file_loads_and_says_what_it_is(path):
    configs.validate(load_config(path))
    text = (REPOSITORY / path).read_text()
    for word in ("Question:", "Command:", "Cost:"):
        assert word in text


def test_the_papers_setting():
    """Section 1 of what is to be reproduced. Mutation: any number of the preset."""
    flat = configs.flatten(load_config("configs/paper.py"))
    wanted = {
        "model.name": "google/t5-base-lm-adapt",
        "method.length": 100,
        "method.init": "labels",
        "method.common_text": "vocabulary",
        "method.common_tokens": 5000,
        "method.place": "encoder",
        "method.prompt_to_input": True,
        "task.name": "boolq_dev",
        "task.form": "t5",
        "task.eos": True,
        "task.max_input": 512,
        "task.max_target": 8,
        "train.batch": 32,
        "train.steps": 30_000,
        "train.z_loss": 1e-4,
        "train.dropout": 0.1,
        "method.dropout": 0.0,
        "optimizer.name": "adafactor_t5x",
        "optimizer.rate": 0.3,
        "optimizer.rate_unit": "absolute",
        "optimizer.schedule": "constant",
        "optimizer.warmup": 0,
        "optimizer.weight_decay": 1e-5,
        "optimizer.decay_rate": 0.8,
        "optimizer.start_step": 1_100_000,
        "optimizer.clip": 0.0,
        "eval.metric": "generated_task_score",
        "eval.metrics": "accuracy,generated_accuracy",
        "eval.beams": 1,
        "eval.select": "best",
    }
    assert {key: flat[key] for key in wanted} == wanted
    task = get_task(load_config("configs/paper.py").task)
    assert dict(task.verbalizers) == {"False": " False", "True": " True"}
    assert task.splits["validation"] == task.splits["test"], "as in the paper"


def test_the_papers_sizes():
    names = [load_config(f"configs/paper.py:{size}").model.name for size in ("small", "xxl")]
    assert names == ["google/t5-small-lm-adapt", "google/t5-xxl-lm-adapt"]
    config = load_config("configs/paper.py:xl,task=rte_dev,seed=2")
    assert (config.model.name, config.task.name) == ("google/t5-xl-lm-adapt", "rte_dev")
    assert config.seed == 2
    with pytest.raises(UserError, match="'base,xl' names base and xl; allowed: one size"):
        load_config("configs/paper.py:base,xl")
    with pytest.raises(UserError, match="unknown config argument 'bas' .did you mean 'base'"):
        load_config("configs/paper.py:bas")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.method.lenght = 5", "bad.py, line 4: unknown config key 'lenght' (did you mean method"),
        ("c.method.length = 'x'", "bad.py, line 4: TypeError: "),
        ("c.mesh.remat = 'layer'", "config key 'mesh.remat' is now called 'compute.remat'"),
        ("return 3", "get_config() returned int"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("c.method.length = -1", "config key 'method.length' is -1"),
    ],
)
def test_a_broken_config_file_is_one_line(tmp_path, body, message):
    file = tmp_path / "bad.py"
    file.write_text(
        "from softprompt.config import base_config\n"
        f"def get_config():\n  c = base_config()\n  {body}\n  return c\n"
    )
    with pytest.raises(UserError) as caught:
        load_config(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_edit_within_the_same_second_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    file = tmp_path / "mine.py"
    body = "from softprompt.config import base_config\ndef get_config():\n  c = base_config()\n"
    for length in (10, 20):
        file.write_text(f"{body}  c.method.length = {length}\n  return c\n")
        os.utime(file, (1_000_000_000, 1_000_000_000))
        assert load_config(str(file)).method.length == length
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_a_missing_config_file_lists_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config file 'configs/no.py'.*configs/base.py"):
        load_config("configs/no.py")
    with pytest.raises(UserError, match="takes no argument"):
        load_config("configs/base.py:length=3")
