"""Reading the keys of a config.json: types, defaults, allowed values, and unknown keys.

transformers keeps a key that it does not know as an attribute of its config, and much of its code
asks for attributes by name. So a key that is neither read here nor known to be harmless is refused:
it may change what the model computes.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from softprompt.errors import UserError

Raw = Mapping[str, Any]
REQUIRED = object()


class Key(NamedTuple):
    """A key that a family reads.

    Attributes:
        default: the value that transformers gives an absent key; `REQUIRED` if it gives none.
        accepts: whether a value is allowed.
        allowed: the allowed values, as an error describes them.
        field: the field of the model's config with the same value, if there is one.
    """

    default: Any
    accepts: Callable[[Any], bool]
    allowed: str
    field: str = ""


def count(default: Any = REQUIRED, field: str = "", *, least: int = 1, null: bool = False) -> Key:
    """A whole number. Null is allowed if it is the default or if `null` is set."""
    allowed = f"a whole number of at least {least}"
    return _or_null(Key(default, lambda x: type(x) is int and x >= least, allowed, field), null)


def number(default: Any = REQUIRED, field: str = "", *, null: bool = False) -> Key:
    """A positive number. Null is allowed if it is the default or if `null` is set."""

    def accepts(x: Any) -> bool:
        return type(x) in (int, float) and 0 < x < math.inf

    return _or_null(Key(default, accepts, "a positive number", field), null)


def flag(default: bool | None, field: str = "") -> Key:
    """True or false. Null is allowed if it is the default."""
    return _or_null(Key(default, lambda x: type(x) is bool, "true, false", field), False)


def one_of(*allowed: Any, field: str = "") -> Key:
    """One of some values; the first is the default."""
    return Key(allowed[0], lambda x: x in allowed, ", ".join(map(repr, allowed)), field)


def section() -> Key:
    """A JSON object, or null."""
    return _or_null(Key(None, lambda x: isinstance(x, dict), "an object"), False)


def _or_null(key: Key, null: bool) -> Key:
    if key.default is not None and not null:
        return key
    accepts = key.accepts
    return key._replace(accepts=lambda x: x is None or accepts(x), allowed=f"{key.allowed}, null")


def refuse(key: str, value: Any, *allowed: Any) -> UserError:
    """The error for a value that the model does not compute."""
    return UserError(f"{key} {value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")


def read_keys(
    raw: Raw, keys: Mapping[str, Key], *, ignored: Collection[str] = (), prefix: str = ""
) -> dict[str, Any]:
    """The values of a family's keys, with transformers' defaults for those that are absent.

    Args:
        raw: a config.json, or a section of it.
        keys: those to read.
        ignored: other keys that may be present. An unknown key may be present if it is null.
        prefix: of a key in errors, such as "rope_scaling.".

    Raises:
        UserError: an unknown key, an absent one without a default, or a value that is not allowed.
    """
    unknown = sorted(k for k in raw if k not in keys and k not in ignored and raw[k] is not None)
    if unknown:
        listed = ", ".join(f"{prefix}{key} {raw[key]!r}"[:120] for key in unknown)
        raise UserError(
            f"unknown keys: {listed}: they may change what the model computes; "
            "delete those that do not"
        )
    values = {}
    for name, key in keys.items():
        values[name] = value = raw.get(name, key.default)
        if value is REQUIRED:
            raise UserError(f"no key {prefix + name!r}")
        if name in raw and not key.accepts(value):
            raise UserError(f"{prefix}{name} {value!r} is not supported; allowed: {key.allowed}")
    return values


# Keys that every family reads: another value would change what the model computes.
COMMON: Mapping[str, Key] = {
    "is_causal": one_of(True),
    "add_cross_attention": one_of(False),
    "tie_encoder_decoder": one_of(False),
    "pruned_heads": one_of({}),
}

# Keys that do not change the logits: token ids, settings of training and of text generation, and
# the origin of the file.
# Source: `PreTrainedConfig` and `GenerationConfig` of transformers 4 and 5, and the config.json of
# published models.
IGNORED = frozenset(
    """
    architectures transformers_version name_or_path _name_or_path _commit_hash dtype torch_dtype
    unsloth_fixed unsloth_version transformers.js_config tokenizer_class prefix
    output_hidden_states output_attentions output_past return_dict use_return_dict use_cache
    chunk_size_feed_forward torchscript use_bfloat16 gradient_checkpointing pretraining_tp
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    id2label label2id num_labels problem_type finetuning_task task_specific_params is_decoder
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id
    initializer_range initializer_factor init_std
    dropout dropout_rate attention_dropout activation_dropout hidden_dropout classifier_dropout
    attention_probs_dropout_prob hidden_dropout_prob attn_pdrop embd_pdrop resid_pdrop layerdrop
    max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    cache_implementation
    """.split()
)
