"""`softprompt export` for other engines: `--format vllm`, and `--format hf` of prompts."""

import dataclasses
import inspect
import json

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file
from tokenizers import Tokenizer, pre_tokenizers

from softprompt.errors import UserError
from softprompt.inference.decode import generate
from softprompt.interchange import vllm_client
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.models.decoder import Decoder
from softprompt.pretrained.loading import load_model
from softprompt.training.step import StepConfig, shared_part
from softprompt.trials import handover
from softprompt.trials.evaluate import Predictor
from softprompt.trials.handover import export_added_tokens
from tests.handover_cases import TEXTS, begin_with_bos, random_prompt, write_trial
from tests.mistakes import run
from tests.own_task import Lines, write_task
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5

NEW = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A decoder whose texts begin with BOS, and trials with prompts after and before BOS."""
    root = write_task(tmp_path_factory.mktemp("place"))
    begin_with_bos(write_llama_folder(root / "llama", layers=2))
    for name, length, bos in (("first", 3, "after"), ("second", 2, "before")):
        delta, more = random_prompt(length, 48, seed=length), {"method__bos": bos}
        write_trial(root / name, root, root / "llama", delta, method__length=length, **more)
    return root


def added(place, capsys, to, *names):
    """Exports trials as added tokens; returns tasks.json and the loaded model."""
    folders = [place / name for name in names]
    run(capsys, "export", "--run", *folders, "--format", "hf", "--to", to)
    return json.loads((to / "tasks.json").read_text()), load_model(str(to))


def test_the_folder_generates_what_the_trials_do(place, tmp_path, capsys):
    """Two tasks in one batch of the exported folder, from strings. The vectors are so large that a
    tied head would generate their ids. Mutations: BOS on the other side of a prompt; the tokenizer
    puts BOS first; the ids of the two tasks swapped; a tied head.
    """
    names = ("first", "second")
    tasks, loaded = added(place, capsys, tmp_path / "to", *names)
    begins = [tasks["tasks"][name]["begins"] for name in names]
    assert begins == [
        "<|first:0|><|first:1|><|first:2|><|bos|>",
        "<|second:0|><|second:1|><|second:2|>",  # the first of them is BOS
    ]
    assert tasks["base"] == "<|bos|>" and not loaded.tokenizer.add_bos
    inputs = [loaded.tokenizer.encode(start + text) for start in begins for text in TEXTS]
    assert inputs[0][:4] == tasks["tasks"]["first"]["ids"]
    shared = shared_part(StepConfig(loaded.model, "none", None), {}, loaded.weights)
    ids = generate(loaded.model, loaded.weights, shared, inputs, max_new=NEW, eos_id=1)
    answers = [loaded.tokenizer.decode(one) for one in ids]
    wanted = [
        text
        for name in names
        for text in Predictor(place / name, Lines()).generate(TEXTS, max_new=NEW)
    ]
    assert answers == wanted and len(set(answers)) > 3
    tied = Decoder(dataclasses.replace(loaded.config, tied=True))
    rest = {key: value for key, value in loaded.weights.items() if key != "head"}
    logits_TV = np.asarray(tied.apply({"params": rest}, np.array(inputs[0], np.int32)))
    assert logits_TV[-1].argmax() >= 320


def test_what_lies_in_the_folder(place, tmp_path, capsys):
    """Mutation: an added id is not suppressed; the README names other ids or another task."""
    to = tmp_path / "to"
    tasks, loaded = added(place, capsys, to, "second", "first")
    ids = [*tasks["tasks"]["second"]["ids"], *tasks["tasks"]["first"]["ids"][:-1]]
    special = json.loads((to / "generation_config.json").read_text())
    assert special == {"bos_token_id": 0, "eos_token_id": 1, "suppress_tokens": ids}
    assert ids == list(range(320, 326)) and loaded.config.vocab == 326
    assert tasks["tasks"]["first"]["templates"] == {"mine": "Review: {text}\nSentiment:"}
    text = (to / "README.md").read_text()
    assert "ids 320 to 325" in text and '["tasks"]["second"]["begins"]' in text


def test_a_tokenizer_that_reads_texts_otherwise_after_added_tokens(place, tmp_path, capsys):
    """It begins with a space, but not after an added token. Mutation: no note, or one for all."""
    asked = ["export", "--format", "hf", "--run"]
    notes = run(capsys, *asked, place / "first", "--to", tmp_path / "a")["notes"]
    assert ["ids 320 to 322" in note for note in notes] == [True]
    model = write_llama_folder(tmp_path / "llama", layers=2)
    file = str(model / "tokenizer.json")
    tokenizer = Tokenizer.from_file(file)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="Ġ", prepend_scheme="first")
    tokenizer.save(file)
    trial = write_trial(tmp_path / "run", place, model, random_prompt(3, 48, seed=0))
    notes = run(capsys, *asked, trial, "--to", tmp_path / "b")["notes"]
    assert ["`ids`" in note for note in notes] == [False, True]


class Vectors(np.ndarray):
    """An array with the one method of a tensor that the client calls."""

    def new_zeros(self, shape):
        return np.zeros(shape, self.dtype)


def test_vectors_and_the_client(place, tmp_path, capsys):
    """A prompt before BOS holds BOS; each task of a multitask prompt has its own vectors, which
    stand before the text's ids. Mutations: the shared prompt without its factors; the tasks
    swapped; the text's BOS left out; ids at the vectors' places.
    """
    mixture = json.dumps(["mine", {"name": "other", "source": "jsonl:x", "template": "{text}:"}])
    random = np.random.default_rng(0)
    shapes = {"prompt": (2, 48), "task_cols": (2, 2, 3), "task_rows": (2, 3, 48)}
    delta = {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    more = {"method__name": "multitask", "method__rank": 3, "method__length": 2}
    write_trial(tmp_path / "many", place, place / "llama", delta, data__mixture=mixture, **more)
    to, folders = tmp_path / "to", (place / "first", place / "second", tmp_path / "many")
    run(capsys, "export", "--run", *folders, "--format", "vllm", "--to", to)
    assert (to / "client.py").read_text() == inspect.getsource(vllm_client)
    found = load_file(to / vllm_client.PROMPTS)
    embed_VD = np.asarray(load_model(str(place / "llama")).weights["embed"]["embedding"])
    first, second = (
        load_delta(folder / "delta.safetensors")[0]["prompt"] for folder in folders[:2]
    )
    factors = np.einsum("npz,nzd->npd", delta["task_cols"], delta["task_rows"])
    wanted = {
        "first": first,
        "second": np.concatenate([embed_VD[:1], second]),
        "many.mine": delta["prompt"] * factors[0],
        "many.other": delta["prompt"] * factors[1],
    }
    assert found.keys() == wanted.keys()
    for name, vectors_PD in wanted.items():
        np.testing.assert_allclose(found[name], vectors_PD, rtol=1e-5, atol=1e-6)
    tasks = json.loads((to / vllm_client.TASKS).read_text())["tasks"]
    assert {name: one["text_begins"] for name, one in tasks.items()} == {
        "first": [0],
        "second": [],
        "many.mine": [0],
        "many.other": [0],
    }
    assert tasks["many.other"]["templates"] == {"other": "{text}:"}
    mixed = vllm_client.mixed_input(found["first"].view(Vectors), [0, 7, 9])
    np.testing.assert_array_equal(mixed["prompt_embeds"][:3], first)
    assert not mixed["prompt_embeds"][3:].any() and mixed["prompt_embeds"].shape == (6, 48)
    assert mixed["prompt_token_ids"] == [0, 0, 0, 0, 7, 9]
    assert mixed["prompt_is_token_ids"] == [False] * 3 + [True] * 3


def test_mistakes(place, tmp_path, capsys):
    """Nothing is left behind. Mutation: any of the checks left out."""
    first, to = place / "first", tmp_path / "to"
    write_llama_folder(tmp_path / "other", seed=1)
    write_complete_t5(tmp_path / "t5")
    prompt = random_prompt(3, 48, seed=0)
    write_trial(tmp_path / "first", place, place / "llama", prompt)
    write_trial(tmp_path / "elsewhere", place, tmp_path / "other", prompt)
    write_trial(tmp_path / "int8", place, place / "llama", prompt, model__quantize="int8")
    write_trial(
        tmp_path / "empty",
        place,
        place / "llama",
        {"prompt": prompt["prompt"][:0]},
        method__length=0,
    )
    write_trial(tmp_path / "lora", place, place / "llama", {}, method__name="lora")
    strange = write_trial(tmp_path / "strange", place, place / "llama", prompt)
    save_delta(strange / "delta.safetensors", prompt, {"fingerprint": "others"})
    write_trial(tmp_path / "wide", place, place / "llama", random_prompt(3, 40, seed=0))
    encoder = {"encoder": random_prompt(3, 20, seed=0)}
    write_trial(tmp_path / "seq2seq", place, tmp_path / "t5", encoder)
    for folders, message in {
        (first, tmp_path / "first"): "there is a prompt named 'first' already",
        (first, tmp_path / "elsewhere"): f"config key 'model.name' is '{tmp_path}/other'; allowed",
        (
            first,
            tmp_path / "lora",
        ): "method 'lora' has no vectors to hand over; allowed: prompt, mu",
        (
            tmp_path / "int8",
        ): "config key 'model.quantize' is 'int8'; allowed for a hand-over: none",
        (tmp_path / "empty",): "the prompt has no vectors (length 0)",
        (strange,): "was trained on weights others, ",
        (tmp_path / "wide",): "prompt [3, 40] does not fit this model; allowed: [3, 48]",
        (tmp_path / "seq2seq",): "is an encoder-decoder; allowed: decoders",
    }.items():
        line = run(capsys, "export", "--run", *folders, "--format", "vllm", "--to", to, code=2)
        assert message in line
        assert not to.exists()
    both = ["--run", first, place / "second", "--to", to]
    line = run(capsys, "export", *both, "--format", "npy", code=2)
    assert line == "--run: 2 trials; --format npy writes one; allowed: 1"
    with pytest.raises(
        UserError, match="^--to gs://a/b: a whole model is written to a local folder$"
    ):
        export_added_tokens([first], epath.Path("gs://a/b"))


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_nothing_is_half_written(place, tmp_path, capsys, monkeypatch, kind):
    """The disk is full before the README. Mutation: the files before it stay."""

    def full(file, text):
        assert file.parent.exists()
        raise UserError(f"cannot write {file}: No space left on device")

    monkeypatch.setattr(handover, "write_text", full)
    to = tmp_path / "to"
    asked = ["export", "--run", place / "first", "--format", kind, "--to", to]
    assert "No space left" in run(capsys, *asked, code=2)
    assert not to.exists()
