"""Models of transformers: random ones, and what it generates."""

from pathlib import Path
from typing import Any

import pytest

from tests.families import VARIANTS
from tests.generation_cases import BEAMS, EOS, NEW
from tests.tiny_t5 import VARIANTS as T5_VARIANTS
from tests.tiny_t5 import hf_t5_config, tiny_t5_config

torch = pytest.importorskip("torch")


def random_model(name: str) -> Any:
    """A model of transformers whose every parameter is random, of a size that matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = dict(VARIANTS[name])
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter, tensor in model.named_parameters():
        noise = torch.randn_like(tensor)
        if tensor.ndim == 2:
            scale = 0.5 if "embed" in parameter or "wte" in parameter else 1.3
            tensor.data = noise * scale / (1 if scale == 0.5 else min(tensor.shape) ** 0.5)
        else:
            tensor.data += 0.2 * noise
    return model


def read_back(folder: str | Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def saved_by_transformers(folder: Path, family: str) -> Any:
    """A random model that transformers saved in its own format, with its norms and head moved.

    The other matrices are as they are drawn. Twice as large, they sharpen the unscaled softmax
    until float32 itself is off by more than 1e-4 on both sides, against the same model in float64.
    """
    from transformers import (
        MT5Config,
        MT5ForConditionalGeneration,
        T5Config,
        T5ForConditionalGeneration,
        UMT5Config,
        UMT5ForConditionalGeneration,
    )

    raw = hf_t5_config(tiny_t5_config(**T5_VARIANTS[family]))
    config, model_class = {
        "mT5": (MT5Config, MT5ForConditionalGeneration),
        "UMT5": (UMT5Config, UMT5ForConditionalGeneration),
    }.get(family, (T5Config, T5ForConditionalGeneration))
    torch.manual_seed(0)
    keys = {k: v for k, v in raw.items() if k not in ("architectures", "model_type")}
    model = model_class(config(**keys | {"layer_norm_epsilon": 3e-5}))
    if not raw["tie_word_embeddings"]:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or "relative" in name:
                tensor.add_(0.5 * torch.randn_like(tensor))
    model.save_pretrained(folder)
    return model_class.from_pretrained(folder).eval()


def theirs(model: Any, inputs: list[Any], eos: int | None = None, **options: Any) -> list[Any]:
    """What transformers generates after the inputs, run as one batch, without EOS."""
    from transformers import GenerationConfig

    options |= {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": eos, "pad_token_id": 0}
    model.generation_config = GenerationConfig(**options, decoder_start_token_id=0)
    longest = max(map(len, inputs))
    padding = [[0] * (longest - len(ids)) for ids in inputs]
    tokens_BT = [[*pad, *map(int, ids)] for pad, ids in zip(padding, inputs, strict=True)]
    mask_BT = [[*pad, *[1] * len(ids)] for pad, ids in zip(padding, inputs, strict=True)]
    with torch.no_grad():
        said = model.generate(torch.tensor(tokens_BT), attention_mask=torch.tensor(mask_BT))
    new_BN = said[:, 1 if model.config.is_encoder_decoder else longest :].tolist()
    return [ids[: ids.index(eos)] if eos in ids else ids for ids in new_BN]


def alone(model: Any, inputs: list[Any], penalty: float) -> list[Any]:
    """What its beam search finds for each input, run alone."""
    options = {"num_beams": BEAMS, "length_penalty": penalty}
    return [theirs(model, [ids], EOS, **options)[0] for ids in inputs]
