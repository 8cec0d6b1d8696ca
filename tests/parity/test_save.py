"""What is saved is read by transformers, and computes what the folder it came from does."""

import functools
from typing import Any

import numpy as np
import pytest

from softprompt.pretrained.loading import load_model
from softprompt.pretrained.save import save_folder
from tests.families import VARIANTS, VOCAB, write_family_folder
from tests.pretrained.ggufs import write_gguf
from tests.pretraining.test_train import plainly, run, tiny_recipe, tiny_t5
from tests.tiny_t5 import VARIANTS as T5_VARIANTS
from tests.tiny_t5 import write_complete_t5

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(0, VOCAB - 11, (2, 23)).tolist()


def again(source: Any, folder: Any) -> Any:
    """The folder, after a model has been loaded and saved."""
    loaded = load_model(str(source))
    return save_folder(folder, loaded.config, loaded.weights, loaded.tokenizer, shard_bytes=30_000)


def logits(folder: Any, kind: str, **more: Any) -> np.ndarray:
    import transformers

    model = getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS), **more).logits.numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_decoders(tmp_path, name):
    # Breaks if: any key of a family's `raw` is not what transformers calls it.
    folder = write_family_folder(tmp_path / "a", name)
    wanted = logits(folder, "AutoModelForCausalLM")
    assert np.std(wanted) > 0.5
    after = logits(again(folder, tmp_path / "b"), "AutoModelForCausalLM")
    np.testing.assert_allclose(after, wanted, atol=1e-5)


@pytest.mark.parametrize("family", T5_VARIANTS)
def test_t5(tmp_path, family):
    # Breaks if: transformers ties or scales another head than we do.
    sizes = {key: value for key, value in T5_VARIANTS[family].items() if key != "vocab"}
    folder, decoder = write_complete_t5(tmp_path / "a", **sizes), torch.tensor(IDS)[:, :9]
    kind = "T5ForConditionalGeneration"
    wanted = logits(folder, kind, decoder_input_ids=decoder)
    after = logits(again(folder, tmp_path / "b"), kind, decoder_input_ids=decoder)
    np.testing.assert_allclose(after, wanted, atol=1e-5)


def test_a_gguf_file_and_its_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    file = write_gguf(tmp_path / "a.gguf", metadata={"tokenizer.ggml.add_bos_token": True})
    folder = again(file, tmp_path / "b")
    ours, theirs = load_model(str(file)).tokenizer, AutoTokenizer.from_pretrained(folder)
    text = "Review: a film,  that\n\nnever 1234"
    assert theirs(text)["input_ids"] == [ours.bos_id, *ours.encode(text)]
    assert logits(folder, "AutoModelForCausalLM").shape == (2, 23, 320)


@pytest.mark.parametrize("kind", ["causal", "span_corruption"])
def test_a_pretrained_model(tmp_path, monkeypatch, kind):
    """Breaks if: a model of the ladder is saved in a form that transformers computes otherwise, or
    its tokenizer is another one there.
    """
    from transformers import AutoTokenizer

    plainly(monkeypatch, tmp_path / "cache")
    folder = run(tiny_recipe() if kind == "causal" else tiny_t5())
    loaded, ids = load_model(str(folder)), np.array(IDS, np.int32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "A prompt is trained; the model is frozen."
    own = loaded.tokenizer.encode(text)
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == own
    assert tokenizer(text)["input_ids"] == [*own, *([1] if loaded.tokenizer.add_eos else [])]
    apply = functools.partial(loaded.model.apply, {"params": loaded.weights})
    if kind == "causal":
        ours, theirs = [apply(row) for row in ids], logits(folder, "AutoModelForCausalLM")
    else:
        ours = [apply(row, row[:9]) for row in ids]
        decoder = torch.tensor(IDS)[:, :9]
        theirs = logits(folder, "T5ForConditionalGeneration", decoder_input_ids=decoder)
    np.testing.assert_allclose(np.stack(ours), theirs, atol=1e-4)
