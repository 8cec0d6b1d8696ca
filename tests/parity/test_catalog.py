"""The catalogue's parameters against those of transformers' own models, made without memory."""

from typing import Any

import pytest

from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.catalog import CATALOG, Entry, Pretraining
from softprompt.pretrained.families import find_family
from softprompt.pretrained.families.t5 import COPIES
from softprompt.pretrained.published import DECODERS
from tests.tiny_t5 import hf_t5_config

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")

RAW = {repo: raw for repo, raw, _ in DECODERS}
ENTRIES = list({entry.config: entry for entry in CATALOG.values()}.values())


def find_raw(entry: Entry) -> dict[str, Any]:
    """The config.json of a decoder: that of its repository, or of a model made here, ours."""
    if isinstance(entry.source, Pretraining):
        return find_family(entry.config)[1].raw(entry.config)
    return next(raw for repo, raw in RAW.items() if CATALOG[repo].config == entry.config)


def theirs(entry: Entry) -> Any:
    """The model that transformers makes of the same config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM, T5ForConditionalGeneration

    if isinstance(entry.config, T5Config):
        raw, make = hf_t5_config(entry.config), T5ForConditionalGeneration._from_config
    else:
        raw, make = find_raw(entry), AutoModelForCausalLM.from_config
        raw = raw.get("text_config", raw)
    config = AutoConfig.for_model(**raw)
    with torch.device("meta"):
        return make(config)


@pytest.mark.parametrize("entry", ENTRIES, ids=[entry.name for entry in ENTRIES])
def test_parameters_are_those_of_transformers(entry):
    """Mutation: a bias, norm or projection that `decoder_shapes` forgets; a size of another one."""
    model = theirs(entry)
    if not isinstance(entry.config, T5Config):
        assert model.num_parameters() == entry.parameters
        return
    # transformers 5 ties every T5's head until a checkpoint has one; `tied` says whose has not.
    copies = (*COPIES, *(["lm_head.weight"] if entry.config.tied else ()))
    named = model.named_parameters(remove_duplicate=False)
    assert sum(x.numel() for name, x in named if name not in copies) == entry.parameters
