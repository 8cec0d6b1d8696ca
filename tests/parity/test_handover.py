"""Prompts handed over as added tokens and as vectors, in live transformers."""

import json

import numpy as np
import pytest

from softprompt.console import Progress
from softprompt.inference.decode import cut
from softprompt.pretrained.loading import load_model, read_model_config
from softprompt.trials.convert import export_run
from softprompt.trials.evaluate import Predictor
from tests.families import VOCAB, write_family_folder
from tests.handover_cases import TEXTS, begin_with_bos, random_prompt, write_trial
from tests.own_task import write_task
from tests.tiny import tiny_config, write_tokenizer

pytestmark = pytest.mark.parity

torch = pytest.importorskip("torch")
NAMES = ("gpt2", "neox", "opt-350m", "llama", "qwen3", "gemma2", "gemma3")
NEW = 8


@pytest.fixture(params=NAMES)
def place(tmp_path, request):
    """A model whose texts begin with BOS, two trials, and their folders "hf" and "vllm"."""
    model = write_family_folder(write_task(tmp_path) / "model", request.param)
    write_tokenizer(model, tiny_config(vocab=VOCAB))  # a token for each row, since any row may win
    begin_with_bos(model)
    width = read_model_config(str(model)).prompt_width
    trials = []
    for name, length, bos in (("first", 4, "after"), ("second", 9, "before")):
        more = {"method__length": length, "method__bos": bos, "task__max_input": 64}
        delta = random_prompt(length, width, seed=length)
        trials.append(write_trial(tmp_path / name, tmp_path, model, delta, **more))
    for kind in ("hf", "vllm"):
        export_run(trials, kind=kind, to=tmp_path / kind)
    return tmp_path


def test_transformers_generates_what_the_trials_do(place):
    """Greedily from strings; and sampling takes no added token, though nearly all tokens are as
    likely at this temperature. Mutations: the tokenizer of the folder puts BOS first; Gemma's rows
    are not divided by its scaling; generation_config.json does not suppress the added ids.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(place / "hf")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, ours = AutoTokenizer.from_pretrained(folder), load_model(folder).tokenizer
    tasks = json.loads((place / "hf" / "tasks.json").read_text())["tasks"]
    for name in ("first", "second"):
        wanted = Predictor(place / name, Progress()).generate(TEXTS, max_new=NEW)
        for text, answer in zip(TEXTS, wanted, strict=True):
            given = tokenizer(tasks[name]["begins"] + text, return_tensors="pt")
            read = given["input_ids"][0].tolist()
            assert read == tasks[name]["ids"] + ours.encode(text)
            made = model.generate(**given, do_sample=False, max_new_tokens=NEW)
            ids = made[0, len(read) :].numpy()
            assert ours.decode(cut(ids, NEW, 1)) == answer
    torch.manual_seed(0)
    hot = {"do_sample": True, "temperature": 1e4, "top_k": 0, "max_new_tokens": 30}
    made = model.generate(**given, **hot, num_return_sequences=20)[:, len(read) :]
    assert made.max() < VOCAB and len(made.unique()) > 100


def test_the_clients_input_is_what_the_trials_read(place):
    """As vLLM mixes it: embeddings at the prompt's positions, ids after them. Mutations: the other
    way round; the text's BOS left out; the client's tokenizer adds special tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    namespace: dict = {"__file__": str(place / "vllm" / "client.py"), "__name__": "client"}
    exec((place / "vllm" / "client.py").read_text(), namespace)  # from its own folder
    model = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    requests = [{"task": name, "input": TEXTS[0]} for name in ("first", "second")]
    added = AutoModelForCausalLM.from_pretrained(place / "hf", dtype=torch.float32).eval()
    tasks = json.loads((place / "hf" / "tasks.json").read_text())["tasks"]
    text_ids = tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    for request, mixed in zip(requests, namespace["read_inputs"](requests, tokenizer), strict=True):
        is_id_T = torch.tensor(mixed["prompt_is_token_ids"])[:, None]
        with torch.no_grad():
            embeds_TD = model.get_input_embeddings()(torch.tensor(mixed["prompt_token_ids"]))
            inputs_TD = torch.where(is_id_T, embeds_TD, mixed["prompt_embeds"])
            found = model(inputs_embeds=inputs_TD[None]).logits[0, -1]
            ids = torch.tensor([tasks[request["task"]]["ids"] + text_ids])
            wanted = added(ids).logits[0, -1]
        np.testing.assert_allclose(found, wanted[:VOCAB], atol=1e-4)
