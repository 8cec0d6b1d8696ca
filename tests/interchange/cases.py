"""Adapters of PEFT on tiny random models: what they are made with, and what they mean to us."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from softprompt.interchange.adapter_files import Adapter
from softprompt.interchange.peft import to_peft
from softprompt.models import ModelConfig
from softprompt.pretrained.families import read_family
from tests.families import VARIANTS, config_of_folder, write_family_folder
from tests.tiny_t5 import hf_t5_config, tiny_t5_config, write_t5_folder

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"

_T5_SIZES: dict[str, dict[str, Any]] = {
    "t5": {"width": 8, "heads": 2, "head_size": 6, "ffn": 10, "encoder_layers": 1},
    "t5-square": {"width": 8, "heads": 2, "head_size": 4, "ffn": 10},  # where PEFT's prefixes work
    "t5-ungated": {
        "width": 8,
        "heads": 2,
        "head_size": 6,
        "ffn": 10,
        "gated": False,
        "activation": "relu",
    },
}
_SIZES = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 10}
_GROUPED = {**_SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**VARIANTS["llama"], **_GROUPED},
    "qwen3": {**VARIANTS["qwen3"], **_GROUPED},
    "gemma2": {**VARIANTS["gemma2"], **_GROUPED},
    "gpt2": {**VARIANTS["gpt2"], "n_embd": 8, "n_head": 2, "n_layer": 2, "n_inner": 10},
    "neox": {**VARIANTS["neox"], **_SIZES, "num_attention_heads": 2, "rotary_pct": 0.5},
    "opt": {
        **VARIANTS["opt"],
        **{"num_hidden_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "ffn_dim": 10},
    },
    **{name: hf_t5_config(tiny_t5_config(**sizes)) for name, sizes in _T5_SIZES.items()},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """An adapter.

    Attributes:
        model: a key of `MODELS`, and the name of the folder that it lies in.
        kind: the name of PEFT's config class.
        options: its arguments, but for the task.
        method: our config's keys for the same.
        plain: a trial here would write the same file; else it keeps what only PEFT knows.
        written: we write it at all.
        filled: the leaves have zeros (a LoRA's) or ones (IA3's) that the file leaves out, and we
            write them.
    """

    model: str
    kind: str
    options: dict[str, Any]
    method: dict[str, Any]
    plain: bool = True
    written: bool = True
    filled: bool = False


def _lora(model: str, names: str, targets: str, **more: Any) -> Case:
    options = {"r": 2, "lora_alpha": 6, "target_modules": names.split(), **more}
    name = "dora" if more.get("use_dora") else "lora"
    method = {"name": name, "rank": 2, "alpha": 6, "targets": targets}
    method |= {"rslora": more.get("use_rslora", False), "dropout": more.get("lora_dropout", 0.0)}
    return Case(model, "LoraConfig", options, method)


def _filled(model: str, names: str, targets: str, *, rank: int = 2, **more: Any) -> Case:
    """A LoRA whose modules differ in rank or scale, or that leaves layers out."""
    case = _lora(model, names, targets, **more)
    method = case.method | {"rank": rank}
    return dataclasses.replace(case, method=method, plain=False, filled=True)


_PROMPT = {"name": "prompt", "length": 3}
_ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
CASES: dict[str, Case] = {
    "prompt-llama": Case("llama", "PromptTuningConfig", {"num_virtual_tokens": 3}, _PROMPT),
    "prompt-gemma2": Case("gemma2", "PromptTuningConfig", {"num_virtual_tokens": 3}, _PROMPT),
    "prompt-text-gpt2": Case(
        "gpt2",
        "PromptTuningConfig",
        {
            "num_virtual_tokens": 3,
            "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "a moving film, é",
            "tokenizer_name_or_path": "gpt2",
        },
        _PROMPT,
        plain=False,
    ),
    "prompt-t5": Case(
        "t5",
        "PromptTuningConfig",
        {"num_virtual_tokens": 3, "num_transformer_submodules": 1},
        _PROMPT | {"place": "encoder"},
    ),
    "ptuning-llama": Case(
        "llama",
        "PromptEncoderConfig",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 5},
        _PROMPT,
        plain=False,
    ),
    "multitask-llama": Case(
        "llama",
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2},
        {"name": "multitask", "length": 3, "rank": 2},
    ),
    "multitask-t5": Case(
        "t5",
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2, "num_transformer_submodules": 1},
        {"name": "multitask", "length": 3, "rank": 2, "place": "encoder"},
    ),
    "prefix-llama": Case(
        "llama", "PrefixTuningConfig", {"num_virtual_tokens": 3}, {"name": "prefix", "length": 3}
    ),
    "prefix-mlp-gpt2": Case(
        "gpt2",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 4},
        {"name": "prefix", "length": 3},
        plain=False,
    ),
    "prefix-t5": Case(
        "t5-square",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3},
        {"name": "prefix", "length": 3, "place": "decoder"},
        plain=False,
        written=False,
    ),
    "lora-llama": _lora("llama", _ALL, "q,k,v,o,gate,up,down"),
    "lora-rs-llama": _lora("llama", "q_proj v_proj", "q,v", use_rslora=True, lora_dropout=0.25),
    "lora-qwen3": _lora("qwen3", "k_proj down_proj", "k,down"),
    "lora-gemma2": _lora("gemma2", "q_proj o_proj", "q,o"),
    "lora-gpt2": _lora("gpt2", "c_attn attn.c_proj c_fc", "qkv,o,up", fan_in_fan_out=True),
    "lora-neox": _lora("neox", "query_key_value dense dense_4h_to_h", "qkv,o,down"),
    "lora-opt": _lora("opt", "q_proj out_proj fc1 fc2", "q,o,up,down"),
    "lora-t5": _lora("t5", "q v o wi_0 wo", "q,v,o,gate,down"),
    "dora-llama": _lora("llama", _ALL, "q,k,v,o,gate,up,down", use_dora=True, use_rslora=True),
    "dora-gpt2": _lora(
        "gpt2", "c_attn attn.c_proj c_fc", "qkv,o,up", fan_in_fan_out=True, use_dora=True
    ),
    "dora-t5": _lora("t5", "q v o wi_0 wo", "q,v,o,gate,down", use_dora=True),
    "lora-patterns-llama": _filled(
        "llama",
        "q_proj v_proj down_proj",
        "q,v,down",
        rank=4,
        rank_pattern={"v_proj": 3, "^model.layers.1.mlp.down_proj": 4},
        alpha_pattern={"q_proj": 1, "layers.0.self_attn.v_proj": 5, ".*down_proj": 1.5},
    ),
    "lora-patterns-neox": _filled(
        "neox",
        "query_key_value dense",
        "qkv,o",
        rank=3,
        use_rslora=True,
        rank_pattern={"0.attention.query_key_value": 3},
        alpha_pattern={"dense": 2},
    ),
    "lora-layers-qwen3": _filled(
        "qwen3", "k_proj o_proj", "k,o", layers_to_transform=[1], layers_pattern="layers"
    ),
    "lora-names-gpt2": _filled(
        "gpt2", "0.attn.c_attn h.1.attn.c_proj 1.mlp.c_fc", "qkv,o,up", fan_in_fan_out=True
    ),
    "lora-regex-llama": _filled(
        "llama",
        "",
        "q,up",
        target_modules=r".*layers\.\d+\..*(q_proj|up_proj)",
        exclude_modules=["layers.1.mlp.up_proj"],
        bias="all",
    ),
    "lora-encoder-t5": _filled("t5", "", "q", target_modules=r"encoder.*SelfAttention\.q"),
    "ia3-layer-gpt2": Case(
        "gpt2",
        "IA3Config",
        {
            "target_modules": ["0.attn.c_attn", "1.mlp.c_proj"],
            "feedforward_modules": ["1.mlp.c_proj"],
            "fan_in_fan_out": True,
        },
        {"name": "ia3", "targets": "q,k,v,down"},
        plain=False,
        filled=True,
    ),
    "ia3-llama": Case("llama", "IA3Config", {}, {"name": "ia3", "targets": "k,v,down"}),
    "ia3-gpt2": Case(
        "gpt2", "IA3Config", {"fan_in_fan_out": True}, {"name": "ia3", "targets": "q,k,v,down"}
    ),
    "ia3-neox": Case("neox", "IA3Config", {}, {"name": "ia3", "targets": "q,k,v,down"}),
    "ia3-all-llama": Case(
        "llama",
        "IA3Config",
        {"target_modules": _ALL.split(), "feedforward_modules": ["down_proj"]},
        {"name": "ia3", "targets": "q,k,v,o,gate,up,down"},
    ),
    "ia3-t5": Case("t5-ungated", "IA3Config", {}, {"name": "ia3", "targets": "k,v,down"}),
}


def is_t5(model: str) -> bool:
    return model.startswith("t5")


@functools.cache
def sizes(model: str) -> ModelConfig:
    """The sizes of a model, as a folder of it is read."""
    if is_t5(model):
        return tiny_t5_config(**_T5_SIZES[model])
    return read_family(MODELS[model])[1]


def write_model(folder: Path, model: str) -> Path:
    """A folder that both sides read."""
    if is_t5(model):
        write_t5_folder(folder, **_T5_SIZES[model])
        assert config_of_folder(folder) == sizes(model)
        return folder
    return write_family_folder(folder, model, raw=MODELS[model])


def method(case: Case, **more: Any) -> dict[str, Any]:
    """The method section of a trial of the case."""
    return {"bos": "after", "prompt_to_input": True, "dropout": 0.0, **case.method, **more}


def exported(delta: Any, case: Case, imported: dict[str, Any] | None = None) -> Adapter:
    """The adapter that a trial of the case writes."""
    return to_peft(delta, sizes(case.model), method(case), base=case.model, imported=imported)


def same_config(text: str, config: dict[str, Any]) -> None:
    """Checks a config against PEFT's text of one; it writes sets in any order."""

    def ordered(found: dict[str, Any]) -> dict[str, Any]:
        return {k: sorted(v) if isinstance(v, list) else v for k, v in found.items()}

    assert json.dumps(json.loads(text), indent=2, sort_keys=True) == text, "PEFT's own form"
    assert ordered(config) == ordered(json.loads(text))
