"""Random GGUF files of every architecture against transformers reading the same file."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt.pretrained.loading import load_model
from tests.families import VARIANTS, VOCAB, family_tensors
from tests.pretrained.ggufs import CASES, write_gguf
from tests.tiny_t5 import FAMILIES, hf_t5_config, tiny_t5_config, tiny_t5_tensors

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

IDS = np.random.default_rng(0).integers(0, VOCAB - 11, 31).tolist()


def reference(file: Path, kind: str, raw: dict[str, Any]) -> Any:
    """What transformers makes of the tensors; of the metadata it leaves out a key or two."""
    import transformers

    rest = {key: value for key, value in raw.items() if key != "model_type"}
    config = transformers.AutoConfig.for_model(raw["model_type"], **rest)
    where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = getattr(transformers, kind)
    return model.from_pretrained(**where, config=config, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", CASES)
def test_decoders(tmp_path, name):
    # Breaks if: any part of the architecture's config or table is another.
    raw = {**VARIANTS[name], **CASES[name]}
    file = write_gguf(tmp_path / "a.gguf", model=(raw, family_tensors(name, raw=raw)))
    with torch.no_grad():
        wanted = reference(file, "AutoModelForCausalLM", raw)(torch.tensor([IDS])).logits[0].numpy()
    ours = load_model(str(file))
    logits_TV = jax.jit(ours.model.apply)({"params": ours.weights}, jnp.array(IDS))
    assert np.std(wanted) > 0.5
    np.testing.assert_allclose(logits_TV, wanted, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_t5(tmp_path, family):
    # Breaks if: two names of the table are swapped.
    config = tiny_t5_config(**{**FAMILIES[family], "vocab": VOCAB})
    model = hf_t5_config(config), tiny_t5_tensors(config, 0)
    file = write_gguf(tmp_path / "a.gguf", model=model)
    inputs, targets = IDS[:20], [0, *IDS[20:]]
    with torch.no_grad():
        found = reference(file, "T5ForConditionalGeneration", model[0])(
            input_ids=torch.tensor([inputs]), decoder_input_ids=torch.tensor([targets])
        )
    ours = load_model(str(file))
    logits_TV = ours.model.apply({"params": ours.weights}, jnp.array(inputs), jnp.array(targets))
    np.testing.assert_allclose(logits_TV, found.logits[0].numpy(), atol=1e-4)
