"""The real Gemma 3 270M (a 4-bit GGUF file) against transformers reading the same file, in float32.

It comes under terms of its own: run with SOFTPROMPT_ACCEPT_TERMS=gemma once you have accepted them.
"""

from typing import Any

import pytest

from softprompt.errors import UserError
from softprompt.pretrained import gguf
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.loading import find, load_model
from tests.parity.real import largest_difference
from tests.texts import AWKWARD, real_lines

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

NAME = "gemma3-270m-q4"


@pytest.fixture(scope="module")
def file() -> gguf.File:
    try:
        return gguf.File(find(NAME))
    except UserError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="module")
def reference(file: gguf.File) -> Any:
    """The tokenizer that transformers reads from the same file."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(file.path.parent, gguf_file=file.path.name)


def test_logits(file, reference, shared_data):
    # Breaks if: a 1 is added to the norms, the windows' rotary base is that of the others, or the
    # embeddings are not scaled.
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": file.path.parent, "gguf_file": file.path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    ours = load_model(NAME)
    lines = (shared_data / "sst2" / "stsa.binary.test").read_text().splitlines()
    texts_ids = [reference(line[2:])["input_ids"] for line in lines[:6]]
    assert all(ids[0] == ours.tokenizer.bos_id for ids in texts_ids)
    long = reference((shared_data / "wikitext2" / "test.txt").read_text()[:3600])["input_ids"]
    assert len(long) > 560 > ours.config.windows[0]
    short = largest_difference(ours, model, texts_ids)
    far = largest_difference(ours, model, [long[:560]])
    print(f"largest difference of logits: {short:.2e}, past the window {far:.2e}")
    assert max(short, far) < 1e-3


def test_token_ids_and_decoding(file, reference, shared_data):
    # Breaks if: merges follow the scores, or user-defined tokens are not added.
    ours = gguf.read_tokenizer(file)
    marked = "<start_of_turn>user\n\n\n\thi<end_of_turn>[multimodal]<start_of_image> a <unused7>"
    for line in (*real_lines(shared_data, 1000), *AWKWARD, marked):
        ids = reference(line)["input_ids"]
        assert [ours.bos_id, *ours.encode(line)] == ids, line
        assert ours.decode(ids) == reference.decode(ids)
        assert ours.decode(ids[1:]) == line
    assert ours.add_bos
    assert ours.vocab_size == len(reference) == CATALOG[NAME].config.vocab
    assert ours.bos_id == reference.bos_token_id
    assert ours.eos_id == reference.eos_token_id


def test_the_catalogued_config_is_that_of_the_file(file):
    entry = CATALOG[NAME]
    config = gguf.open_model(file)[0]
    assert config.norm_eps == pytest.approx(entry.config.norm_eps)
    for field in ("windows", "query_scale", "embed_scale", "rope_base_local", "vocab", "width"):
        assert getattr(config, field) == getattr(entry.config, field)
    assert entry.parameters == 268_098_176
