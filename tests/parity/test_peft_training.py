"""Must show 1 of the methods: training in PEFT and here, from one delta on the same examples.

PEFT gets an example a row, padded on the right; we pack several into a row. Prefixes of a T5 are
left out: PEFT gives its layers the wrong ones.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from softprompt.pretrained.loading import find
from tests.contracts.examples import LENGTHS, TARGETS, cut, random_examples, snippets
from tests.interchange import methods
from tests.interchange.cases import CASES, MODELS, Case, write_model

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")


def _case(model: str, kind: str, method: str, options: dict[str, Any], **keys: Any) -> Case:
    return Case(model, kind, options, {"name": method, **keys})


def _causal(model: str) -> dict[str, Case]:
    """What needs no projections' names."""
    vectors = {"num_virtual_tokens": 3}
    return {
        f"prompt-{model}": _case(model, "PromptTuningConfig", "prompt", vectors, length=3),
        f"prefix-{model}": _case(model, "PrefixTuningConfig", "prefix", vectors, length=3),
    }


_SAME = (
    "prompt-t5 lora-llama lora-gpt2 lora-t5 dora-llama dora-gpt2 ia3-llama ia3-gpt2 ia3-t5".split()
)
TINY = {**_causal("llama"), **_causal("gpt2"), **{name: CASES[name] for name in _SAME}}
_LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
_KEYS = {"rank": 4, "alpha": 8, "rslora": False, "targets": "q,v,down"}
REAL_VECTORS = _causal("smollm2")
REAL_LAYERS = {
    "lora-smollm2": _case("smollm2", "LoraConfig", "lora", _LORA, **_KEYS),
    "ia3-smollm2": _case("smollm2", "IA3Config", "ia3", {}, targets="k,v,down"),
}
REAL = REAL_VECTORS | REAL_LAYERS
# Where training starts and how fast it goes. Further out rounding grows from step to step until the
# two sides part, whoever computes: a prompt whose rows are short is divided by their length, and
# LoRA's factors multiply each other.
SPREADS = {"prompt": 1.5, "prefix": 0.4, "lora": 0.1, "dora": 0.1, "ia3": 0.4}
RATES = {"sgd": 0.02, "adamw": 0.003}
REAL_SPREADS = {"prompt": 0.3, "prefix": 0.4, "lora": 0.02, "ia3": 0.2}
REAL_RATE = 0.0003
STEPS, BATCHES = 50, 6  # steps on tiny models; batches, and so steps, on the real one


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The tiny models' folders."""
    place = tmp_path_factory.mktemp("models")
    for model in {case.model for case in TINY.values()}:
        write_model(place / model, model)
    return place


def tiny_pair(folder: Path, tmp_path: Path, name: str):
    """Both sides of a tiny case, with three batches of six examples."""
    from tests.interchange.live import beside, trained
    from tests.parity.peft_training import pair

    case = TINY[name]
    vocab = MODELS[case.model]["vocab_size"]
    examples = random_examples(LENGTHS * 3, TARGETS * 3, vocab=vocab)
    batches = [cut(examples, range(6 * n, 6 * n + 6)) for n in range(3)]
    ours = methods.load(folder / case.model)
    with beside(folder):
        return pair(
            trained(case, spread=SPREADS[case.method["name"]]),
            case,
            tmp_path / "adapter",
            ours,
            batches,
        )


def check_gradients(both, name: str, tolerance: float) -> None:
    from tests.parity.peft_training import apart, gradients

    ours, theirs = gradients(both)
    assert min(np.linalg.norm(leaf) for leaf in theirs.values()) > 0
    found = apart(ours, theirs)
    worst = max(found, key=found.__getitem__)
    print(f"{name}: gradients of {worst} {found[worst]:.1e} apart, the most")
    assert found[worst] < tolerance


def check_training(both, name: str, **how) -> None:
    from tests.parity.peft_training import moved_apart, train_ours, train_theirs

    ours, found = train_ours(both, **how)
    theirs, wanted = train_theirs(both, **how)
    losses = np.abs(np.divide(ours, theirs) - 1).max()
    moves = moved_apart(both.delta(), found, wanted)
    worst = max(moves, key=moves.__getitem__)
    print(
        f"{name}, {how}: loss {theirs[0]:.4f} to {theirs[-1]:.4f}, {losses:.1e} apart; "
        f"{worst} {moves[worst]:.1e} of its way"
    )
    assert losses < 1e-4
    assert moves[worst] < 0.01


@pytest.mark.parametrize("name", TINY)
def test_first_gradients(folder, tmp_path, name):
    """Mutations: LoRA's scale is alpha / sqrt(rank); positions after a prompt or prefix are one
    off; IA3 leaves a projection's bias as it is, or is added to the input of "down"; an example's
    weight does not grow with the length of its target.
    """
    check_gradients(tiny_pair(folder, tmp_path, name), name, 1e-5)


@pytest.mark.parametrize("optimizer", RATES)
@pytest.mark.parametrize("name", TINY)
def test_fifty_steps(folder, tmp_path, name, optimizer):
    """Mutations: AdamW's decay goes through its moments; SGD has none."""
    both = tiny_pair(folder, tmp_path, name)
    check_training(both, name, optimizer=optimizer, rate=RATES[optimizer], steps=STEPS)


@pytest.fixture(scope="module")
def base():
    """The real model that transformers reads from the file."""
    from transformers import AutoModelForCausalLM

    path = find("smollm2-135m-instruct-q4")
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )


@pytest.fixture
def real_pair(base, smollm2, shared_data, tmp_path):
    """Makes both sides of a real case, with batches of three of the shortest snippets."""
    from tests.interchange.live import beside, trained
    from tests.parity.peft_training import pair

    found = snippets(shared_data, smollm2.tokenizer, 300)
    order = sorted(range(300), key=lambda n: len(found.inputs[n]))[: 3 * BATCHES]
    batches = [cut(found, order[n::BATCHES]) for n in range(BATCHES)]

    def make(name: str):
        case = REAL[name]
        spread = REAL_SPREADS[case.method["name"]]
        ours = smollm2.model, smollm2.weights
        with beside(tmp_path):
            theirs = trained(case, base=copy.deepcopy(base), spread=spread)
            return pair(theirs, case, tmp_path / "adapter", ours, batches)

    return make


def check_real(real_pair, name):
    """Gradients, then six steps, each on another batch."""
    check_gradients(real_pair(name), name, 1e-4)
    check_training(real_pair(name), name, optimizer="adamw", rate=REAL_RATE, steps=BATCHES)


@pytest.mark.real
@pytest.mark.usefixtures("quick")
class TestRealVectors:
    """Two classes, so that workers may share the minutes that they take."""

    @pytest.mark.parametrize("name", REAL_VECTORS)
    def test_training(self, real_pair, name):
        """Prompt and prefix: what stands before the text."""
        check_real(real_pair, name)


@pytest.mark.real
@pytest.mark.usefixtures("quick")
class TestRealLayers:
    """The methods that change layers."""

    @pytest.mark.parametrize("name", REAL_LAYERS)
    def test_training(self, real_pair, name):
        """Mutation: LoRA's scale is alpha / sqrt(rank)."""
        check_real(real_pair, name)
