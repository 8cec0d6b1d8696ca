import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from softprompt.config import (
    base_config,
    from_dict,
    resolve,
    schema,
    scientific,
    to_dict,
    trial_id,
    weights_key,
)
from softprompt.config import values as configs
from softprompt.config.files import load_config
from softprompt.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def resolved(**keys):
    config = base_config()
    for key, value in keys.items():
        configs.set_key(config, key.replace("__", "."), value)
    config.model.dtype = "float32"
    return config


def test_base_config_is_valid_and_locked():
    config = base_config()
    configs.validate(config)
    with pytest.raises(AttributeError):
        config.method.lenght = 5


def test_the_config_is_what_its_keys_say():
    """Breaks when a key is composed that the config has not, or the other way round."""
    assert configs.flatten(base_config()) == {
        name: key.default for name, key in sorted(schema.KEYS.items())
    }
    assert schema.OPEN_MAPPINGS == ("task.verbalizers",)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("method.length", "5", 5),
        ("optimizer.rate", "1", 1.0),
        ("optimizer.rate", "3e-2", 0.03),
        ("log.tensorboard", "True", True),
        ("log.tensorboard", "false", False),
        ("model.name", "123", "123"),
        ("task.verbalizers.pos", " good", {"pos": " good"}),
        ("task.verbalizers", '{"a": " b"}', {"a": " b"}),
    ],
)
def test_overrides_are_read_as_the_keys_type(key, text, value):
    config = base_config()
    configs.set_key(config, key, text)
    stored = configs.flatten(config)[key if key != "task.verbalizers.pos" else "task.verbalizers"]
    assert stored == value
    assert type(stored) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("method.lenght", "5", "unknown config key 'method.lenght' (did you mean method.length"),
        ("lenght", "5", "did you mean method.length"),
        ("metod.length", "5", "did you mean method.length"),
        ("foo.bar", "5", "sections: compute, data, eval"),
        ("method", "5", "'method' is a section; its keys: method.alpha, method.bos"),
        ("method.length", "long", "config key 'method.length' is 'long'; it takes a whole number"),
        ("method.length", "2.5", "a whole number"),
        ("method.length", "-1", "config key 'method.length' is -1; allowed: at least 0"),
        ("optimizer.rate", "fast", "a number"),
        ("optimizer.rate", "nan", "config key 'optimizer.rate' is nan"),
        ("optimizer.b1", "1", "allowed: 0 to 0.999999"),
        ("log.wandb", "maybe", "config key 'log.wandb' is 'maybe'; it takes True or False"),
        ("task.verbalizers", "x", "a mapping of strings"),
        ("eval.score", "smu", "(did you mean 'sum'?); allowed: sum, mean"),
        ("method.init", "text", "'method.init_text' is empty; method.init=text needs it"),
        (
            "method.init_file",
            "a.safetensors",
            "config key 'method.init_file' is 'a.safetensors'; method.init=vocabulary has no such "
            "key (file has it); its keys: method.common_tokens, method.common_text",
        ),
        ("train.microbatches", "5", "must divide train.batch, 32"),
        ("optimizer.warmup", "200", "at most train.steps, 100"),
        (
            "optimizer.momentum",
            "1",
            "config key 'optimizer.momentum' is 1.0; allowed: 0 to 0.999999",
        ),
        ("train.ema", "1", "config key 'train.ema' is 1.0; allowed: 0 to 0.999999"),
        ("train.ema", "-0.1", "config key 'train.ema' is -0.1; allowed: 0 to 0.999999"),
        ("train.dropout", "1", "config key 'train.dropout' is 1.0; allowed: 0 to 0.999999"),
        ("train.dropout", "nan", "config key 'train.dropout' is nan; allowed: 0 to 0.999999"),
        ("method.dropout", "1.5", "config key 'method.dropout' is 1.5; allowed: 0 to 0.999999"),
        ("method.dropout", "-0.1", "config key 'method.dropout' is -0.1; allowed: 0 to 0.9999"),
        ("optimizer.factored", "no", "config key 'optimizer.factored' is 'no'; it takes True or"),
        (
            "optimizer.start_step",
            "-1",
            "config key 'optimizer.start_step' is -1; allowed: 0 to 1073",
        ),
        ("optimizer.max_row_norm", "-1", "'optimizer.max_row_norm' is -1.0; allowed: at least 0"),
        ("optimizer.max_row_norm", "inf", "'optimizer.max_row_norm' is inf; allowed: at least 0"),
        ("mesh.data", "0", "config key 'mesh.data' is 0"),
        ("mesh.remat", "layer", "config key 'mesh.remat' is now called 'compute.remat'"),
        ("task.source", "my.jsonl", "allowed: jsonl:PATH"),
        ("data.mixture", "sms_spam,", "'data.mixture' has an entry {'name': ''}; allowed: the n"),
        ("data.mixture", "[]", "'data.mixture' has an entry None; allowed: the name of a task"),
        ("data.mixture", "[3]", "'data.mixture' has an entry 3; allowed: the name of a task"),
        ("data.mixture", '["sms_spam"', "'data.mixture' is not JSON: Expecting ',' delimiter"),
        ("data.mixture", "sarcasm, sms_spam,sarcasm", "'data.mixture' names 'sarcasm' twice"),
        (
            "data.mixture",
            '[{"name": "mine", "sorce": "tsv:x"}]',
            "unknown config key 'task.sorce' (did you mean task.source",
        ),
        ("data.mixture", '[{"name": "mine", "source": "tsv:x"}]', "'task.template' is empty"),
        ("data.cap", "-1", "config key 'data.cap' is -1; allowed: at least 0"),
        ("task.source", "jsonl:my.jsonl", "'task.template' is empty"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_what_is_allowed(key, text, message):
    with pytest.raises(UserError) as caught:
        load_config("", [(key, text)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_choice_is_checked():
    for name, key in schema.KEYS.items():
        if key.choices:
            with pytest.raises(UserError, match=f"'{name}' is 'zzz'; allowed: "):
                load_config("", [(name, "zzz")])


def test_every_range_is_checked():
    for name, key in schema.KEYS.items():
        if key.low > -math.inf:
            with pytest.raises(UserError, match=f"'{name}' is .*allowed: "):
                load_config("", [(name, str(int(key.low) - 1))])


def test_labels_may_have_dots():
    """Mutation: a label such as 1.0 is no key of a config."""
    config = base_config()
    configs.set_key(config, "task.verbalizers.1.0", " good")
    configs.set_key(
        config, "task.verbalizers", {**config.task.verbalizers.to_dict(), "0.0": " bad"}
    )
    wanted = {"0.0": " bad", "1.0": " good"}
    again = from_dict(json.loads(json.dumps(to_dict(resolve(config)))))
    assert to_dict(again)["task"]["verbalizers"] == wanted
    assert trial_id(again) == trial_id(config)


def test_json_round_trip():
    config = resolved(method__length=5, task__verbalizers={"a": " b"}, optimizer__rate=1)
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert to_dict(again) == to_dict(config)
    assert trial_id(again) == trial_id(config)


def test_a_config_of_an_older_version_takes_defaults_for_what_it_lacks():
    tree = to_dict(resolved(method__length=5))
    del tree["method"]["bos"], tree["log"]
    assert to_dict(from_dict(tree)) == to_dict(resolved(method__length=5))
    with pytest.raises(UserError, match="unknown config key 'method.size'"):
        from_dict({"method": {"size": 3}})


def test_a_stored_config_may_have_old_names():
    """Mutations: an old name is unknown; its value is dropped; a renamed key changes the id."""
    config = resolved(compute__remat="layer", compute__population=4, compute__attention="reference")
    tree = to_dict(config)
    tree["mesh"] |= tree.pop("compute")
    again = from_dict(json.loads(json.dumps(tree)))
    assert to_dict(again) == to_dict(config)
    assert trial_id(again) == trial_id(resolved())
    assert scientific(tree) == scientific(config)
    assert configs.RENAMED.keys().isdisjoint(schema.KEYS)
    assert set(configs.RENAMED.values()) <= schema.KEYS.keys()


def test_weights_are_the_same_whatever_is_computed_with_them():
    """Breaks when trials that differ in how they run load the same model twice."""
    key = weights_key(resolved())
    assert key == weights_key(resolved(compute__population=4, compute__remat="layer"))
    assert key != weights_key(resolved(mesh__model=2))
    assert key != weights_key(resolved(mesh__weights="sharded"))


def test_id_is_the_same_in_every_version():
    # Written down once: a change here orphans every finished trial.
    assert scientific(resolved(method__length=5)) == {"method.length": 5, "model.dtype": "float32"}
    assert trial_id(resolved(method__length=5)) == "acadd86e8b"


def test_id_ignores_mesh_and_logging():
    plain = trial_id(resolved())
    for key, value in [("mesh.data", 4), ("mesh.model", 2), ("log.every", 1), ("log.wandb", True)]:
        assert trial_id(resolved(**{key: value})) == plain
    allowed = resolved(method__init_any_weights=True)  # a permission, which changes no result
    assert trial_id(allowed) == plain
    assert configs.differences(allowed, resolved()) == []


def test_id_covers_what_is_scientific():
    changes = {"seed": 1, "method.length": 5, "task.name": "sms_spam", "eval.score": "mean"}
    ids = {trial_id(resolved(**{key: value})) for key, value in changes.items()}
    bfloat16 = resolved()
    bfloat16.model.dtype = "bfloat16"
    assert len(ids | {trial_id(resolved()), trial_id(bfloat16)}) == len(changes) + 2


def test_a_new_key_with_the_old_behaviour_as_default_changes_no_id(monkeypatch):
    """Breaks when the id hashes the whole config instead of what differs from the defaults."""
    before = trial_id(resolved(method__length=5))
    old = configs.base_config

    def newer():
        config = old()
        with config.unlocked():
            config.method.later = 0.0
        return config

    monkeypatch.setattr(configs, "base_config", newer)
    config = newer()
    config.method.length = 5
    config.model.dtype = "float32"
    assert "method.later" in configs.flatten(config)
    assert trial_id(config) == before
    config.method.later = 0.1
    assert trial_id(config) != before


@pytest.mark.parametrize(
    ("backend", "version", "flags", "dtype"),
    [
        ("cpu", "0.10.2", "avx2 avx512f avx512_bf16", "float32"),
        ("cpu", "0.12.0.1", "avx2 avx512f", "float32"),
        ("cpu", "0.12.0.1", "avx2 avx512f avx512_bf16", "bfloat16"),
        ("cpu", "0.12.0.1", "avx2 amx_bf16", "bfloat16"),
        ("tpu", "0.10.2", "avx2", "bfloat16"),
        ("gpu", "0.10.2", "avx2", "bfloat16"),
    ],
)
def test_auto_dtype(backend, version, flags, dtype):
    """Breaks when a CPU computes in bfloat16 without instructions for it, or JAX without them."""
    config, machine = base_config(), {"jax_version": version, "cpu_flags": flags}
    assert resolve(config, backend=backend, **machine).model.dtype == dtype
    assert config.model.dtype == "auto"
    config.model.dtype = "float32"
    assert resolve(config, backend=backend, **machine).model.dtype == "float32"


def test_differences_name_scientific_keys_with_both_values():
    ours, theirs = resolved(method__length=5), resolved(method__length=20, log__every=1)
    assert configs.differences(ours, theirs) == ["method.length: 5, 20"]


def test_reading_a_config_asks_for_no_devices():
    """So that `--distributed` can join first. Breaks when a method's or an optimizer's module makes
    an array at import, or the id of a config with a dtype asks JAX for its backend.
    """
    code = (
        "from softprompt.config.files import load_config; from softprompt.config import trial_id;"
        "trial_id(load_config('', [('model.dtype', 'float32')]))"
    )
    environment = os.environ | {"JAX_PLATFORMS": "nowhere"}  # which fails once it is asked for
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env=environment)


@pytest.mark.parametrize(
    ("keys", "metric"),
    [
        ({}, "accuracy"),
        ({"task__name": "qa", "task__source": "jsonl:qa.jsonl"}, "exact_match"),
        ({"task__name": "qa", "task__source": "jsonl:qa.jsonl", "eval__metric": "f1"}, "f1"),
        (
            {"task__name": "qa", "task__source": "csv:a", "task__verbalizers": {"a": "b"}},
            "accuracy",
        ),
        ({"task__name": "no_such_task"}, "accuracy"),
        ({"data__mixture": "sms_spam, sarcasm"}, "accuracy"),
        ({"data__mixture": "qa", "task__name": "qa", "task__source": "csv:a"}, "exact_match"),
        ({"data__mixture": "qa,cb", "task__name": "qa", "task__source": "csv:a"}, "accuracy"),
    ],
)
def test_the_default_metric_of_free_text_is_its_first(keys, metric):
    """Breaks when a free-text task has to name a metric, or the id of another task's trial changes.
    The last one's tasks have no common metric: measuring names the task that lacks it.
    """
    if keys.get("task__source"):
        keys = {**keys, "task__template": "{text}"}
    assert resolve(resolved(**keys)).eval.metric == metric
