"""Published decoders: the content of each repository's `config.json`, and its licence.

A family's function holds what its repositories share, and a table what differs with size. They are
read by the code that reads downloaded folders, so that a name and its download agree.

Source: `config.json` of each repository on the hub.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from softprompt.pretrained.families.keys import Raw

APACHE = "Apache-2.0"


class Published(NamedTuple):
    """A repository of the hub: its name, the content of its config.json, its licence."""

    repo: str
    raw: Raw
    licence: str


def _raw(architecture: str, model_type: str, sizes: Sequence[int], /, **more: Any) -> Raw:
    """A config.json; `sizes` are width, layers, heads, and perhaps ffn and key-value heads."""
    keys = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads"),
        *("intermediate_size", "num_key_value_heads"),
    )
    named = {"architectures": [f"{architecture}ForCausalLM"], "model_type": model_type}
    return {**named, **dict(zip(keys, sizes, strict=False)), **more}


# size: width, layers, heads, vocabulary
_PYTHIA = {
    "14m": (128, 6, 4, 50304),
    "31m": (256, 6, 8, 50304),
    "70m": (512, 6, 8, 50304),
    "160m": (768, 12, 12, 50304),
    "410m": (1024, 24, 16, 50304),
    "1b": (2048, 16, 8, 50304),
    "1.4b": (2048, 24, 16, 50304),
    "2.8b": (2560, 32, 32, 50304),
    "6.9b": (4096, 32, 32, 50432),
    "12b": (5120, 36, 40, 50688),
}


def _pythia() -> Iterator[Published]:
    for size, (width, layers, heads, vocab) in _PYTHIA.items():
        raw = _raw(
            "GPTNeoX",
            "gpt_neox",
            (width, layers, heads, 4 * width),
            vocab_size=vocab,
            max_position_embeddings=2048,
            rotary_pct=0.25,
            rotary_emb_base=10000,
            use_parallel_residual=True,
            hidden_act="gelu",
            layer_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
        for suffix in ("", "-deduped"):
            yield Published(f"EleutherAI/pythia-{size}{suffix}", raw, APACHE)


# suffix: width, layers, heads
_GPT2 = {
    "": (768, 12, 12),
    "-medium": (1024, 24, 16),
    "-large": (1280, 36, 20),
    "-xl": (1600, 48, 25),
}


def _gpt2() -> Iterator[Published]:
    for suffix, (width, layers, heads) in _GPT2.items():
        raw = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "vocab_size": 50257,
            "n_embd": width,
            "n_layer": layers,
            "n_head": heads,
            "n_positions": 1024,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
        }
        yield Published(f"openai-community/gpt2{suffix}", raw, "MIT")


# size: width, layers, heads
_OPT = {
    "125m": (768, 12, 12),
    "350m": (1024, 24, 16),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
    "30b": (7168, 48, 56),
    "66b": (9216, 64, 72),
}


def _opt() -> Iterator[Published]:
    for size, (width, layers, heads) in _OPT.items():
        odd = size == "350m"  # narrow embeddings, and norms after what they normalise elsewhere
        raw = _raw(
            "OPT",
            "opt",
            (width, layers, heads),
            vocab_size=50272,
            ffn_dim=4 * width,
            word_embed_proj_dim=512 if odd else width,
            do_layer_norm_before=not odd,
            max_position_embeddings=2048,
            activation_function="relu",
        )
        yield Published(f"facebook/opt-{size}", raw, "OPT-175B")


# size: width, layers, heads, key-value heads, ffn, rotary base
_SMOLLM2 = {
    "135M": (576, 30, 9, 3, 1536, 100000),
    "360M": (960, 32, 15, 5, 2560, 100000),
    "1.7B": (2048, 24, 32, 32, 8192, 130000),
}


def _smollm2() -> Iterator[Published]:
    for size, (width, layers, heads, kv_heads, ffn, base) in _SMOLLM2.items():
        raw = _raw(
            "Llama",
            "llama",
            (width, layers, heads, ffn, kv_heads),
            vocab_size=49152,
            max_position_embeddings=8192,
            rope_theta=base,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        )
        for suffix in ("", "-Instruct"):
            yield Published(f"HuggingFaceTB/SmolLM2-{size}{suffix}", raw, APACHE)


# version and size: width, layers, heads, ffn, factor of the rotary scaling, suffixes
_LLAMA3 = {
    "3.1-8B": (4096, 32, 32, 14336, 8.0, ("", "-Instruct")),
    "3.1-70B": (8192, 80, 64, 28672, 8.0, ("", "-Instruct")),
    "3.1-405B": (16384, 126, 128, 53248, 8.0, ("", "-Instruct")),
    "3.2-1B": (2048, 16, 32, 8192, 32.0, ("", "-Instruct")),
    "3.2-3B": (3072, 28, 24, 8192, 32.0, ("", "-Instruct")),
    "3.3-70B": (8192, 80, 64, 28672, 8.0, ("-Instruct",)),
}


def _llama3() -> Iterator[Published]:
    for size, (width, layers, heads, ffn, factor, suffixes) in _LLAMA3.items():
        raw = _raw(
            "Llama",
            "llama",
            (width, layers, heads, ffn, 8),
            vocab_size=128256,
            max_position_embeddings=131072,
            rope_theta=500000.0,
            rope_scaling={
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            rms_norm_eps=1e-5,
            tie_word_embeddings=size.startswith("3.2"),
        )
        for suffix in suffixes:
            repo = f"meta-llama/Llama-{size}{suffix}"
            yield Published(repo, raw, f"Llama {size[:3]} Community")


# size: width, layers, heads, key-value heads, ffn, vocabulary; context and epsilon of the base
_QWEN25 = {
    "0.5B": (896, 24, 14, 2, 4864, 151936, 32768, 1e-6),
    "1.5B": (1536, 28, 12, 2, 8960, 151936, 131072, 1e-6),
    "3B": (2048, 36, 16, 2, 11008, 151936, 32768, 1e-6),
    "7B": (3584, 28, 28, 4, 18944, 152064, 131072, 1e-6),
    "14B": (5120, 48, 40, 8, 13824, 152064, 131072, 1e-5),
    "32B": (5120, 64, 40, 8, 27648, 152064, 131072, 1e-5),
    "72B": (8192, 80, 64, 8, 29568, 152064, 131072, 1e-5),
}


def _qwen25() -> Iterator[Published]:
    licences = {"3B": "Qwen Research", "72B": "Qwen"}
    for size, row in _QWEN25.items():
        width, layers, heads, kv_heads, ffn, vocab, *of_base = row
        for suffix, (context, epsilon) in {"": of_base, "-Instruct": (32768, 1e-6)}.items():
            raw = _raw(
                "Qwen2",
                "qwen2",
                (width, layers, heads, ffn, kv_heads),
                vocab_size=vocab,
                max_position_embeddings=context,
                use_sliding_window=False,
                rope_theta=1000000.0,
                rms_norm_eps=epsilon,
                tie_word_embeddings=size in ("0.5B", "1.5B", "3B"),
            )
            yield Published(f"Qwen/Qwen2.5-{size}{suffix}", raw, licences.get(size, APACHE))


# size: width, layers, heads, ffn. The 32B has no base model.
_QWEN3 = {
    "0.6B": (1024, 28, 16, 3072),
    "1.7B": (2048, 28, 16, 6144),
    "4B": (2560, 36, 32, 9728),
    "8B": (4096, 36, 32, 12288),
    "14B": (5120, 40, 40, 17408),
    "32B": (5120, 64, 64, 25600),
}


def _qwen3() -> Iterator[Published]:
    for size, (width, layers, heads, ffn) in _QWEN3.items():
        for suffix, context in {"-Base": 32768, "": 40960}.items():
            raw = _raw(
                "Qwen3",
                "qwen3",
                (width, layers, heads, ffn, 8),
                vocab_size=151936,
                head_dim=128,
                max_position_embeddings=context,
                use_sliding_window=False,
                rope_theta=1000000.0,
                rms_norm_eps=1e-6,
                tie_word_embeddings=size in ("0.6B", "1.7B", "4B"),
            )
            if (size, suffix) != ("32B", "-Base"):
                yield Published(f"Qwen/Qwen3-{size}{suffix}", raw, APACHE)


# repository: architecture, width, layers, heads, key-value heads, head size, ffn, and the rest.
# gemma-2-9b said 224 for query_pre_attn_scalar at first (gemma-2-9b-it until its commit 1937c70).
_GEMMA = {
    "gemma-2b": ("", 2048, 18, 8, 1, 256, 16384, {}),
    "gemma-7b": ("", 3072, 28, 16, 16, 256, 24576, {}),
    "gemma-2-2b": ("2", 2304, 26, 8, 4, 256, 9216, {"query_pre_attn_scalar": 256}),
    "gemma-2-9b": ("2", 3584, 42, 16, 8, 256, 14336, {"query_pre_attn_scalar": 256}),
    "gemma-2-27b": ("2", 4608, 46, 32, 16, 128, 36864, {"query_pre_attn_scalar": 144}),
    "gemma-3-270m": ("3", 640, 18, 4, 1, 256, 2048, {"query_pre_attn_scalar": 256}),
    "gemma-3-1b": ("3", 1152, 26, 4, 1, 256, 6912, {"query_pre_attn_scalar": 256}),
}
_GEMMA_GENERATIONS = {
    "": {"hidden_act": "gelu_pytorch_tanh", "vocab_size": 256000, "max_position_embeddings": 8192},
    "2": {
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 256000,
        "max_position_embeddings": 8192,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "vocab_size": 262144,
        "max_position_embeddings": 32768,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "rope_theta": 1000000,
        "rope_local_base_freq": 10000,
    },
}


def _gemma() -> Iterator[Published]:
    for name, (generation, width, layers, heads, kv, head_size, ffn, rest) in _GEMMA.items():
        raw = _raw(
            f"Gemma{generation}",
            f"gemma{generation}",
            (width, layers, heads, ffn, kv),
            head_dim=head_size,
            rms_norm_eps=1e-6,
            **_GEMMA_GENERATIONS[generation],
            **rest,
        )
        base = "-pt" if name == "gemma-3-1b" else ""
        for suffix in (base, "-it"):
            yield Published(f"google/{name}{suffix}", raw, "Gemma terms")


# size: width, layers, heads, key-value heads, head size, ffn, and further keys
_GEMMA3_WITH_IMAGES = {
    "4b": (2560, 34, 8, 4, 256, 10240, {}),
    "12b": (3840, 48, 16, 8, 256, 15360, {}),
    "27b": (5376, 62, 32, 16, 128, 21504, {"query_pre_attn_scalar": 168}),
}


def _gemma3_with_images() -> Iterator[Published]:
    """Only the text part is described."""
    for size, (width, layers, heads, kv, head_size, ffn, rest) in _GEMMA3_WITH_IMAGES.items():
        text = _raw(
            "Gemma3",
            "gemma3_text",
            (width, layers, heads, ffn, kv),
            head_dim=head_size,
            rope_scaling={"factor": 8.0, "rope_type": "linear"},
            sliding_window=1024,
            **rest,
        )
        raw = {
            "architectures": ["Gemma3ForConditionalGeneration"],
            "model_type": "gemma3",
            "text_config": {key: text[key] for key in text if key != "architectures"},
        }
        for suffix in ("-pt", "-it"):
            yield Published(f"google/gemma-3-{size}{suffix}", raw, "Gemma terms")


DECODERS: tuple[Published, ...] = (
    *_pythia(),
    *_gpt2(),
    *_opt(),
    *_smollm2(),
    *_llama3(),
    *_qwen25(),
    *_qwen3(),
    *_gemma(),
    *_gemma3_with_images(),
)
