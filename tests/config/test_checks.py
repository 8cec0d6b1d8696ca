"""What a config's method, optimizer and initialiser have of keys, and what they allow of them."""

import math

import pytest

from softprompt.config import base_config, flatten, from_dict, has_effect, to_dict, trial_id
from softprompt.config.checks import check_used, settings_classes
from softprompt.config.files import load_config
from softprompt.config.schema import ALWAYS_ALLOWED, CHOOSERS, KEYS, METHOD_SETTINGS, SECTIONS
from softprompt.errors import UserError
from softprompt.methods import METHODS
from softprompt.methods.base import Setup
from softprompt.settings import keys as keys_of
from tests.tiny import tiny_config


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"optimizer.momentum": "0.9"},
            ("'optimizer.momentum' is 0.9", "optimizer.name=adamw", "(sgd has it)", "optimizer.b1"),
        ),
        (
            {"optimizer.name": "adafactor", "optimizer.start_step": "0"},
            ("'optimizer.start_step' is 0", "optimizer.name=adafactor", "adafactor_t5x has it"),
        ),
        (
            {"optimizer.name": "sgd", "optimizer.factored": "False"},
            ("'optimizer.factored' is False", "(adafactor, adafactor_t5x have it)"),
        ),
        (
            {"optimizer.name": "sgd", "optimizer.b1": "0.5"},
            ("'optimizer.b1' is 0.5", "its keys: optimizer.momentum"),
        ),
        (
            {"method.name": "none", "train.ema": "0.9"},
            ("'train.ema' is 0.9; allowed: 0.0 with method.name=none, which trains nothing",),
        ),
        (
            {"method.name": "fewshot", "train.dropout": "0.1"},
            ("'train.dropout' is 0.1; allowed: 0.0 with method.name=fewshot",),
        ),
        (
            {"method.name": "none", "optimizer.max_row_norm": "3"},
            ("'optimizer.max_row_norm' is 3.0; allowed: 0.0 with method.name=none",),
        ),
        (
            {"method.name": "fewshot", "data.mixture": "sms_spam,sarcasm"},
            ("'data.mixture' is 'sms_spam,sarcasm'; allowed: '' with method.name=fewshot",),
        ),
        (
            {"method.name": "multitask", "eval.text": "sotu"},
            ("'eval.text' is 'sotu'; allowed: '' for method.name=multitask",),
        ),
        (
            {"method.name": "prefix", "method.dropout": "0.1"},
            ("'method.dropout' is 0.1", "method.name=prefix", "(prompt, lora, dora have it)"),
        ),
        (
            {"method.targets": "q,v"},
            (
                "'method.targets' is 'q,v'",
                "method.name=prompt has no such key",
                "lora, dora, ia3 have",
            ),
        ),
        (
            {"method.placement": "pfeiffer"},
            ("'method.placement' is 'pfeiffer'", "(adapter has it); its keys: method.bos"),
        ),
        (
            {"method.bottleneck": "8"},
            ("'method.bottleneck' is 8; allowed: 64 without method.reparam",),
        ),
        (
            {"method.name": "lora", "method.place": "both"},
            ("'method.place' is 'both'", "method.name=lora", "(prompt, multitask, prefix have it)"),
        ),
        (
            {"method.name": "lora", "method.init": "text", "method.init_text": "a film"},
            ("'method.init_text' is 'a film'", "method.name=lora", "(prompt, multitask, prefix"),
        ),
        (
            {"method.name": "prefix", "method.init": "noise", "method.common_tokens": "9"},
            ("'method.common_tokens' is 9", "method.init=noise", "its keys: none"),
        ),
        ({"eval.patience": "2"}, ("'eval.patience' is 2; allowed: 0 without eval.every",)),
        (
            {"data.subset_seed": "2"},
            ("'data.subset_seed' is 2; allowed: 0 without data.train_examples or data.cap",),
        ),
        (
            {"method.name": "lora", "method.alpha": "0"},
            ("'method.alpha' is 0.0; allowed: above 0 with method.name=lora",),
        ),
        (
            {"method.name": "prefix", "method.reparam": "residual"},
            ("'method.reparam' is 'residual'; allowed for method.name=prefix: none, mlp",),
        ),
        (
            {"method.name": "multitask", "method.place": "both"},
            ("'method.place' is 'both'; allowed for method.name=multitask: encoder",),
        ),
        (
            {"method.init": "noise"},
            ("'method.init' is 'noise'; allowed for method.name=prompt: vocabulary, uniform,",),
        ),
    ],
)
def test_a_key_that_nothing_would_read_is_a_mistake(keys, words):
    """Breaks when AdamW ignores a momentum in silence, a prompt is trained where LoRA's targets are
    named, or a value is checked against what another method allows.
    """
    with pytest.raises(UserError) as caught:
        load_config("", list(keys.items()))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys",
    [
        {"optimizer.name": "sgd", "optimizer.momentum": "0.9"},
        {"optimizer.name": "adafactor_t5x", "optimizer.start_step": "0"},
        {"optimizer.name": "adafactor_t5x", "optimizer.factored": "False"},
        {"optimizer.name": "adafactor", "optimizer.factored": "False"},
        {"optimizer.name": "adafactor", "optimizer.factored_min": "64"},
        {"optimizer.b1": "0.5", "optimizer.b2": "0.9", "optimizer.eps": "1e-6"},
        {"train.ema": "0.9", "optimizer.max_row_norm": "3"},
        {"method.name": "none", "train.steps": "50", "optimizer.rate": "0.1", "eval.every": "5"},
        {"eval.patience": "2", "eval.every": "10"},
        {"data.subset_seed": "2", "data.cap": "100"},
        {"eval.text": "sotu", "eval.text_tokens": "600"},
        {"train.dropout": "0.1", "method.dropout": "0.999999"},
        {"train.dropout": "0.1", "method.name": "lora", "method.dropout": "0.1"},
        {"method.name": "ia3", "method.targets": "k"},
        {"method.name": "multitask", "method.rank": "2"},
        {"method.reparam": "residual", "method.bottleneck": "8"},
        {"method.name": "fewshot", "method.shots": "2"},
    ],
)
def test_and_where_it_is_read_it_is_none(keys):
    load_config("", list(keys.items()))


def test_every_key_that_needs_another_is_refused_without():
    """Breaks when one of the needed keys is not looked at: a sweep's baseline would take it."""
    usual = flatten(base_config())
    for name, key in KEYS.items():
        if not key.needs or "method.name" in key.owners:
            continue
        values = usual | {"optimizer.name": "adafactor"} | dict.fromkeys(key.needs, 0)
        assert not has_effect(values, name)
        with pytest.raises(UserError, match=f"{name}.* without {' or '.join(key.needs)}"):
            check_used(values | {name: usual[name] + 1})
        for other in key.needs:
            assert has_effect(values | {other: 1}, name)


def test_every_key_says_what_it_is():
    """Breaks when a key has no help or a number no range, or when a chooser has an option that its
    key does not allow.
    """
    for name, key in KEYS.items():
        assert len(key.help) > 4, name
        number = isinstance(key.default, int | float) and not isinstance(key.default, bool)
        assert number == (key.low > -math.inf), name
    for chooser, options in CHOOSERS.items():
        assert set(options) <= set(KEYS[chooser].choices)
    assert set(ALWAYS_ALLOWED) <= KEYS.keys()


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_its_own_keys_and_functions(name):
    """Breaks when a method's keys leak into another's, or `describe` forgets who has a key."""
    method, values = METHODS[name], flatten(base_config()) | {"method.name": name}
    own = keys_of(method.Settings)
    shared = {key for cls in SECTIONS for key in keys_of(cls)}
    for key in KEYS:
        if key.startswith("method.") and key not in shared:
            assert (key in own) == (name in KEYS[key].owners.get("method.name", ()))
    assert [cls for where, cls in settings_classes(values) if where == f"method.name={name}"] == [
        METHOD_SETTINGS[name]
    ]
    settings = method.Settings.of(values)
    assert settings.label() and hash(settings) == hash(method.Settings.of(values))
    cfg = method.resolve(settings, Setup(tiny_config(), tasks=2))
    assert hash(cfg) == hash(method.resolve(settings, Setup(tiny_config(), tasks=2)))
    assert hasattr(method, "context") == settings.is_context


def test_what_a_config_file_sets_for_its_prompt_does_not_bind_another_method():
    """Breaks when `method.length` or `method.init` is refused where another method is trained."""
    for file in ("configs/paper.py:base", "configs/own_data.py", "configs/quickstart.py:length=5"):
        load_config(file, [("method.name", "lora")])


def test_a_run_that_is_older_than_the_check_is_read():
    """Mutation: its config is refused, so that a finished trial cannot be evaluated."""
    tree = to_dict(base_config())
    tree["method"] |= {"rank": 4, "name": "lora", "shots": 2}
    tree["model"]["dtype"] = "float32"
    found = from_dict(tree)
    assert found.method.shots == 2
    assert not has_effect(flatten(found), "method.shots") and has_effect(
        flatten(found), "method.rank"
    )
    plain = from_dict({**tree, "method": {"name": "lora", "rank": 4}})
    assert trial_id(found) != trial_id(plain), "as it was"
