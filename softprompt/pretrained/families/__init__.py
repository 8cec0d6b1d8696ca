"""The families of models that Hugging Face folders may hold: one short file each."""

import functools

from softprompt.errors import UserError
from softprompt.models import ModelConfig
from softprompt.models.decoder import DecoderConfig
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.families.base import Family
from softprompt.pretrained.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from softprompt.pretrained.families.gpt2 import GPT2
from softprompt.pretrained.families.gpt_neox import GPT_NEOX
from softprompt.pretrained.families.keys import IGNORED, Raw, read_keys
from softprompt.pretrained.families.llama import LLAMA, MISTRAL
from softprompt.pretrained.families.opt import OPT
from softprompt.pretrained.families.qwen import QWEN2, QWEN3
from softprompt.pretrained.families.t5 import MT5, T5, UMT5

DECODERS: dict[str, Family] = {
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "Gemma3ForConditionalGeneration": GEMMA3_WITH_IMAGES,
    "GemmaForCausalLM": GEMMA,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "OPTForCausalLM": OPT,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
}

ENCODER_DECODERS: dict[str, Family] = {
    "T5ForConditionalGeneration": T5,
    "T5WithLMHeadModel": T5,
    "MT5ForConditionalGeneration": MT5,
    "UMT5ForConditionalGeneration": UMT5,
}

FAMILIES = DECODERS | ENCODER_DECODERS


@functools.cache
def find_family(config: ModelConfig) -> tuple[str, Family]:
    """The architecture of transformers that computes what a model computes, and its family.

    Raises:
        UserError: there is none.
    """
    families = ENCODER_DECODERS if isinstance(config, T5Config) else DECODERS
    for architecture, family in families.items():
        try:
            if read_family({"architectures": [architecture], **family.raw(config)})[1] == config:
                return architecture, family
        except UserError:
            continue
    raise UserError(f"no family of transformers computes what this config says: {config}")


def read_family(raw: Raw, *, file: str = "config.json") -> tuple[Family, ModelConfig]:
    """The family of a config.json's content, and the model that it describes.

    Args:
        raw: the content; `architectures` names the family.
        file: its name in errors.

    Raises:
        UserError: another architecture, an unknown key, a value that is not allowed, or a variant
            that the model does not have.
    """
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else named or "(none)"
    if not isinstance(architecture, str) or architecture not in FAMILIES:
        raise UserError(
            f"{file}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    family = FAMILIES[architecture]
    try:
        config = family.read(read_keys(raw, family.keys, ignored=IGNORED | family.ignored))
        _check_sizes(config)
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
    return family, config


def _check_sizes(config: ModelConfig) -> None:
    """Raises where sizes do not go together. Tensors of other shapes are found by their table."""
    if isinstance(config, T5Config):
        if config.start >= config.vocab:
            raise UserError(
                f"decoder_start_token_id {config.start} is not below vocab_size {config.vocab}"
            )
        if config.max_distance <= config.buckets // 2:
            raise UserError(
                f"relative_attention_max_distance {config.max_distance} must be above half of "
                f"relative_attention_num_buckets {config.buckets}"
            )
        return
    if config.heads % config.kv_heads:
        raise UserError(
            f"num_key_value_heads {config.kv_heads} does not divide num_attention_heads "
            f"{config.heads}"
        )
    rotated = config.rotary_size or config.head_size
    if config.positions == "rotary" and rotated + rotated % 2 > config.head_size:
        raise UserError(f"head size {config.head_size} is odd: its halves cannot be rotated")
