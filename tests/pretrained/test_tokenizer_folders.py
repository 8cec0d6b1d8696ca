"""Tokenizers of the families' Hugging Face folders: sentencepiece, bytes, and byte-level BPE."""

import json
from pathlib import Path

import pytest
import sentencepiece

from softprompt.pretrained.tokenizer import from_folder
from tests.texts import AWKWARD
from tests.tiny import SENTENCES, tiny_tokenizer

PLAIN = [text for text in AWKWARD if "<|" not in text and "\x00" not in text]


def train(folder: Path, name: str, **options: object) -> sentencepiece.SentencePieceProcessor:
    """Trains a sentencepiece model on a few sentences; returns it opened."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(SENTENCES * 4))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / name), minloglevel=2, num_threads=1, **options
    )
    corpus.unlink()
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.model"))


def settings(folder: Path, **values: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(("model_type", "sentinels"), [("t5", 100), ("mt5", 0)])
def test_t5s_sentencepiece(tmp_path, model_type, sentinels):
    # Breaks if: sentencepiece is not installed; its own ids are the reference.
    roles = {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
    reference = train(tmp_path, "spiece", vocab_size=80, model_type="unigram", **roles)
    settings(tmp_path, extra_ids=sentinels, eos_token="</s>", tokenizer_class="T5Tokenizer")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = from_folder(tmp_path)
    for text in (*PLAIN, *SENTENCES, "the ﬁlm,  ½ of\tit"):
        assert tokenizer.encode(text) == reference.encode(text), text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, True)
    assert tokenizer.vocab_size == 80 + sentinels
    assert tokenizer.encode("<extra_id_0>")[-1] == (179 if sentinels else 2)
    assert tokenizer.decode(tokenizer.encode("the ﬁlm")) == "the film"


def test_llamas_sentencepiece(tmp_path):
    reference = train(
        tmp_path,
        "tokenizer",
        vocab_size=420,
        model_type="bpe",
        normalization_rule_name="identity",
        byte_fallback=True,
        remove_extra_whitespaces=False,
    )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings(tmp_path, tokenizer_class="LlamaTokenizer", add_bos_token=True, **tokens)
    tokenizer = from_folder(tmp_path)
    for text in (*PLAIN, *SENTENCES):
        if not text.startswith(" ") and text:  # transformers puts no second space before one
            assert tokenizer.encode(text) == reference.encode(text), text
            assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (True, False)


def test_byt5s_bytes(tmp_path):
    # Breaks if: a byte's token is off by the special ones, or sentinels are not added.
    from transformers import ByT5Tokenizer

    reference = ByT5Tokenizer()
    reference.save_pretrained(tmp_path)
    tokenizer = from_folder(tmp_path)
    for text in (*AWKWARD, "a</s>b", "x<extra_id_0>y <extra_id_124>", "<pad>"):
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == reference.decode(ids) == text
    assert tokenizer.vocab_size == len(reference) == 384
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    assert (tokenizer.add_bos, tokenizer.add_eos) == (False, True)


@pytest.mark.parametrize(
    ("name", "adds_bos"),
    [
        ("GPT2Tokenizer", False),
        ("GPTNeoXTokenizer", False),
        ("Qwen2Tokenizer", False),
        ("GemmaTokenizer", True),
        ("OPT", True),
    ],
)
def test_folders_that_transformers_saves(tmp_path, name, adds_bos):
    # Breaks if: the post-processor's tokens are taken for the text's, or add_bos is not theirs.
    import transformers

    state = json.loads(tiny_tokenizer().to_str())["model"]
    merges = [tuple(pair) for pair in state["merges"]]
    kind = getattr(transformers, "GPT2Tokenizer" if name == "OPT" else name)
    special = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "unk_token": "<|eos|>"}
    more = {"add_bos_token": True} if adds_bos else {}
    kind(vocab=state["vocab"], merges=merges, **special, **more).save_pretrained(tmp_path)
    reference = transformers.AutoTokenizer.from_pretrained(tmp_path)
    tokenizer = from_folder(tmp_path)
    for text in (*AWKWARD, *SENTENCES):
        ids = reference(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text) == ids, text
        bos = [tokenizer.bos_id] if adds_bos else []
        assert reference(text)["input_ids"] == bos + ids
    assert tokenizer.add_bos == adds_bos
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
