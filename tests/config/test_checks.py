"""A key that nothing reads is a mistake, and each is in the table of what reads it."""

import pytest

from softprompt.config import base_config, flatten, from_dict, to_dict, trial_id
from softprompt.config.checks import OWN_KEYS, check_used, reads
from softprompt.config.files import load_config
from softprompt.config.schema import CHOICES, METHOD_KEYS, NEEDS
from softprompt.errors import UserError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"optimizer.momentum": "0.9"},
            "config key 'optimizer.momentum' is 0.9; allowed: 0.0 with optimizer.name=adamw; "
            "sgd reads it",
        ),
        (
            {"optimizer.name": "adafactor", "optimizer.start_step": "0"},
            "config key 'optimizer.start_step' is 0; allowed: 1100000 with "
            "optimizer.name=adafactor; adafactor_t5x reads it",
        ),
        (
            {"optimizer.name": "sgd", "optimizer.factored": "False"},
            "config key 'optimizer.factored' is False; allowed: True with optimizer.name=sgd; "
            "adafactor, adafactor_t5x read it",
        ),
        (
            {"optimizer.name": "sgd", "optimizer.b1": "0.5"},
            "config key 'optimizer.b1' is 0.5; allowed: 0.9 with optimizer.name=sgd; adamw reads "
            "it",
        ),
        (
            {"method.name": "none", "train.ema": "0.9"},
            "config key 'train.ema' is 0.9; allowed: 0 with method.name=none, which trains nothing",
        ),
        (
            {"method.name": "fewshot", "data.mixture": "sms_spam,sarcasm"},
            "config key 'data.mixture' is 'sms_spam,sarcasm'; allowed: '' with method.name=fewshot",
        ),
        (
            {"method.name": "multitask", "eval.text": "sotu"},
            "config key 'eval.text' is 'sotu'; allowed: '' for method.name=multitask, whose "
            "prompts are for tasks",
        ),
        (
            {"method.name": "fewshot", "optimizer.max_row_norm": "3"},
            "config key 'optimizer.max_row_norm' is 3.0; allowed: 0 with method.name=fewshot, "
            "which trains nothing",
        ),
        (
            {"method.name": "none", "train.dropout": "0.1"},
            "config key 'train.dropout' is 0.1; allowed: 0 with method.name=none, which trains "
            "nothing",
        ),
        (
            {"method.name": "prefix", "method.dropout": "0.1"},
            "config key 'method.dropout' is 0.1; allowed: 0.0 with method.name=prefix; prompt, "
            "lora read it",
        ),
        (
            {"method.targets": "q,v"},
            "config key 'method.targets' is 'q,v'; allowed: '' with method.name=prompt; lora, ia3 "
            "read it",
        ),
        (
            {"method.placement": "pfeiffer"},
            "config key 'method.placement' is 'pfeiffer'; allowed: 'houlsby' with "
            "method.name=prompt; adapter reads it",
        ),
        (
            {"method.bottleneck": "8"},
            "config key 'method.bottleneck' is 8; allowed: 64 with method.name=prompt; adapter, "
            "method.reparam read it",
        ),
        (
            {"method.name": "lora", "method.place": "both"},
            "config key 'method.place' is 'both'; allowed: 'encoder' with method.name=lora; "
            "prompt, multitask, prefix read it",
        ),
        (
            {"eval.patience": "2"},
            "config key 'eval.patience' is 2; allowed: 0 without eval.every",
        ),
        (
            {"data.subset_seed": "2"},
            "config key 'data.subset_seed' is 2; allowed: 0 without data.train_examples or "
            "data.cap",
        ),
        (
            {"method.name": "lora", "method.alpha": "0"},
            "config key 'method.alpha' is 0.0; allowed: above 0 with method.name=lora, whose "
            "update it scales",
        ),
    ],
)
def test_a_key_that_nothing_would_read_is_a_mistake(keys, message):
    """Mutation: a momentum that AdamW ignores in silence, or a prompt that is trained where LoRA's
    targets are named.
    """
    with pytest.raises(UserError) as caught:
        load_config("", list(keys.items()))
    assert str(caught.value) == message


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
    """Mutation: one of them is not looked at; a sweep's baseline takes it."""
    usual = flatten(base_config())
    for key, others in NEEDS.items():
        values = usual | {"optimizer.name": "adafactor"} | dict.fromkeys(others, 0)
        assert not reads(values, key)
        with pytest.raises(UserError, match=f"{key}.* without {' or '.join(others)}"):
            check_used(values | {key: usual[key] + 1}, usual)
        for other in others:
            assert reads(values | {other: 1}, key)


EVERYONES = ("bos", "init", "length", "name", "reparam")  # reparam has a check of its own


def test_every_key_of_a_method_has_its_readers():
    """Mutation: a new key of a method's that no table has; a misspelt key or reader."""
    known = [key for key in flatten(base_config()) if key.startswith("method.")]
    assert sorted(METHOD_KEYS) == [key for key in known if key[7:] not in EVERYONES]
    names = {*CHOICES["method.name"], *CHOICES["optimizer.name"], "method.reparam"}
    assert {name for owners in OWN_KEYS.values() for name in owners} <= names


def test_what_a_config_file_sets_for_its_prompt_does_not_bind_another_method():
    """Mutation: `method.length` or `method.init` refused where another method is trained."""
    for file in ("configs/paper.py:base", "configs/own_data.py", "configs/quickstart.py:length=5"):
        load_config(file, [("method.name", "lora")])


def test_a_run_that_is_older_than_the_check_is_read():
    """Mutation: its config is refused, so that a finished trial cannot be evaluated."""
    tree = to_dict(base_config())
    tree["method"] |= {"rank": 4, "name": "lora", "shots": 2}
    tree["model"]["dtype"] = "float32"
    found = from_dict(tree)
    assert found.method.shots == 2
    assert not reads(flatten(found), "method.shots") and reads(flatten(found), "method.rank")
    plain = from_dict({**tree, "method": {"name": "lora", "rank": 4}})
    assert trial_id(found) != trial_id(plain), "as it was"
