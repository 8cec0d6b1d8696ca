"""The decoder families that Hugging Face folders may hold: one short file each."""

import functools

from softprompt.errors import UserError
from softprompt.models.decoder import DecoderConfig
from softprompt.pretrained.families.base import Family, Raw
from softprompt.pretrained.families.gemma import GEMMA, GEMMA2, GEMMA3, GEMMA3_WITH_IMAGES
from softprompt.pretrained.families.gpt2 import GPT2
from softprompt.pretrained.families.gpt_neox import GPT_NEOX
from softprompt.pretrained.families.llama import LLAMA, MISTRAL
from softprompt.pretrained.families.opt import OPT
from softprompt.pretrained.families.qwen import QWEN2, QWEN3

FAMILIES: dict[str, Family] = {
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

# Read by softprompt/pretrained/t5_names.py.
T5_ARCHITECTURES = (
    "T5ForConditionalGeneration",
    "T5WithLMHeadModel",
    "MT5ForConditionalGeneration",
)


@functools.cache
def find_family(config: DecoderConfig) -> tuple[str, Family]:
    """The architecture of transformers that computes what a decoder computes, and its family.

    Raises:
        UserError: there is none.
    """
    for architecture, family in FAMILIES.items():
        try:
            if read_family({"architectures": [architecture], **family.raw(config)})[1] == config:
                return architecture, family
        except UserError:
            continue
    raise UserError(f"no family of transformers computes what this config says: {config}")


def read_family(raw: Raw, *, file: str = "config.json") -> tuple[Family, DecoderConfig]:
    """The family of a config.json's content, and the decoder that it describes.

    Args:
        raw: the content; `architectures` names the family.
        file: what to call it in an error.

    Raises:
        UserError: another architecture, a variant that the decoder does not have, or a missing key.
    """
    (architecture,) = (raw.get("architectures") or ["(none)"])[:1]
    if architecture not in FAMILIES:
        raise UserError(
            f"{file}: architecture {architecture!r} is not supported; "
            f"supported: {', '.join([*FAMILIES, *T5_ARCHITECTURES])}"
        )
    family = FAMILIES[architecture]
    try:
        return family, family.config(raw)
    except KeyError as e:
        raise UserError(f"{file}: no key {e}") from e
    except UserError as e:
        raise UserError(f"{file}: {e}") from None
