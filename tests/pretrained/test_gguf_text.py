"""Tokenizers from GGUF metadata equal those that transformers builds of the same vocabulary.

Its GGUF converters need no PyTorch; where they leave out what the family's own class does (Qwen's
normalization), that class is the reference.
"""

import json
import struct
from collections.abc import Iterable

import gguf
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from softprompt.errors import UserError
from softprompt.pretrained.gguf import File, read_tokenizer
from softprompt.pretrained.gguf.text import CUTS, SPACE
from tests.pretrained.ggufs import write_gguf
from tests.texts import AWKWARD
from tests.tiny import SENTENCES

Types = gguf.TokenType
TEXTS = (
    *AWKWARD,
    *SENTENCES,
    "It's 12345 o'clock, HE'S late;  they'Ll come\n\n\nat 3.14159 or so   ",
    "a<|endoftext|>b <think>hm</think>",
    "cafe\u0301 \u212b",  # not in composed form
)


def byte_level(cut):
    """A trained byte-level BPE as a GGUF file has it."""
    trained = Tokenizer(models.BPE())
    own = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut is None)
    split = [] if cut is None else [pre_tokenizers.Split(Regex(cut), behavior="isolated")]
    trained.pre_tokenizer = pre_tokenizers.Sequence([*split, own])
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([*TEXTS] * 3, trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<think>"]
    return {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [
            int(
                Types.CONTROL
                if t == "<|endoftext|>"
                else Types.USER_DEFINED
                if t == "<think>"
                else 1
            )
            for t in tokens
        ],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "eos_token_id": 0,
    }


def ours(path, fields, architecture="llama"):
    return read_tokenizer(
        File(write_gguf(path / "a.gguf", tokenizer=fields, architecture=architecture))
    )


def theirs(fields, architecture="llama"):
    """What transformers makes of the metadata. Source: its `integrations/gguf`, private."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import (
        GGUF_TOKENIZER_MAPPING,
        convert_gguf_tokenizer,
    )

    names = GGUF_TOKENIZER_MAPPING["tokenizer"].items()
    named = {ours: fields[key[5:]] for key, ours in names if key[5:] in fields}
    return convert_gguf_tokenizer(architecture, named)[0]


def compare(mine, reference, texts: Iterable[str] = TEXTS):
    for text in texts:
        expected = reference.encode(text, add_special_tokens=False)
        assert mine.encode(text) == expected.ids, text
        assert mine.decode(expected.ids) == reference.decode(
            expected.ids, skip_special_tokens=False
        )


@pytest.mark.parametrize("pre", CUTS)
def test_byte_level(tmp_path, pre):
    # Breaks if: a pattern is another, or the tokens that are matched whole are not added.
    fields = byte_level(CUTS[pre]) | {"pre": pre}
    mine = ours(tmp_path, fields)
    composed = [text for text in TEXTS if "\u0301" not in text and "\u212b" not in text]
    compare(mine, theirs(fields), composed)
    assert mine.encode("a<|endoftext|>b")[1] == 0
    assert mine.token(mine.encode("<think>")[0]) == "<think>"
    assert mine.add_bos == ("llama" in pre or pre == "smaug-bpe")


def test_qwen_composes_characters(tmp_path):
    # Breaks if: the normalizer is left out.
    from transformers import Qwen2Tokenizer

    fields = byte_level(CUTS["qwen2"])
    vocab = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    reference = Qwen2Tokenizer(vocab=vocab, merges=merges, unk_token=None)
    reference.add_tokens(["<|endoftext|>", "<think>"])
    mine = ours(tmp_path, fields | {"pre": "qwen2"})
    for text in TEXTS:
        assert mine.encode(text) == reference(text)["input_ids"], text
    assert mine.encode("e\u0301") == mine.encode("\u00e9")


def test_a_word_that_is_a_token_is_not_merged_in_llama3(tmp_path):
    # Breaks if: ignore_merges is off. No merge makes "the" here.
    fields = byte_level(CUTS["llama-bpe"])
    fields["tokens"], fields["token_type"] = [*fields["tokens"], "zzqx"], [*fields["token_type"], 1]
    last = len(fields["tokens"]) - 1
    assert ours(tmp_path, fields | {"pre": "llama-bpe"}).encode("zzqx") == [last]
    assert ours(tmp_path, fields | {"pre": "gpt-2"}).encode("zzqx") != [last]


def test_tokens_outside_the_byte_alphabet_are_spelt_in_it(tmp_path):
    # Breaks if: _spelt_in_bytes returns what it is given.
    fields = byte_level(None) | {"pre": "gpt-2"}
    fields["tokens"], fields["token_type"] = [*fields["tokens"], "é é"], [*fields["token_type"], 4]
    mine = ours(tmp_path, fields)
    compare(mine, theirs(fields))
    last = len(fields["tokens"]) - 1
    assert mine.token(last) == "Ã©ĠÃ©"
    assert mine.decode([last]) == "é é"


def sentencepiece():
    """A trained sentencepiece-like BPE with bytes, control and user-defined tokens."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=260, show_progress=False)
    trained.train_from_iterator([*SENTENCES, "a  b    c"] * 3, trainer)
    learned = json.loads(trained.to_str())["model"]["vocab"]
    runs = [SPACE * n for n in (2, 3, 4)]
    pieces = [t for t in sorted(learned, key=learned.get) if t not in runs]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", "<think>"]
    types = [Types.UNKNOWN, Types.CONTROL, Types.CONTROL, *[Types.BYTE] * 256]
    types += [Types.USER_DEFINED] * 2
    tokens = [*head, *runs, *pieces]
    return {
        "model": "llama",
        "pre": "default",
        "tokens": tokens,
        "token_type": [int(t) for t in types] + [1] * (len(runs) + len(pieces)),
        "scores": [0.0] * (len(head) + len(runs)) + [float(-i) for i in range(len(pieces))],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }


def test_sentencepiece_of_llama(tmp_path):
    # Breaks if: merges are in another order, the space before a text is left out, or bytes are not
    # used.
    fields = sentencepiece()
    mine = ours(tmp_path, fields)
    compare(mine, theirs(fields))
    assert mine.add_bos
    assert (mine.bos_id, mine.eos_id) == (1, 2)
    assert mine.token(mine.encode("the film")[0]).startswith(SPACE)
    assert not ours(tmp_path, fields | {"add_bos_token": False}).add_bos
    bare = ours(tmp_path, fields | {"add_space_prefix": False})
    assert not bare.token(bare.encode("the film")[0]).startswith(SPACE)


def test_sentencepiece_with_merges_of_its_own(tmp_path):
    # Breaks if: merges in the file are not preferred to those that scores imply.
    fields = sentencepiece()
    merges = [f"{SPACE} t", f"{SPACE}t h"]
    fields["tokens"] += [t for t in (f"{SPACE}t", f"{SPACE}th") if t not in fields["tokens"]]
    fields["token_type"] += [1] * (len(fields["tokens"]) - len(fields["token_type"]))
    fields["scores"] += [-999.0] * (len(fields["tokens"]) - len(fields["scores"]))
    fields["merges"] = merges
    mine = ours(tmp_path, fields)
    compare(mine, theirs(fields))
    assert mine.token(mine.encode("the")[0]) == f"{SPACE}th"


def test_sentencepiece_of_gemma(tmp_path):
    # Breaks if: merges follow the scores, or runs of spaces stay as they are in the file.
    fields = sentencepiece()
    fields["tokens"] = [
        t.replace(SPACE, " ") if not t.strip(SPACE) else t for t in fields["tokens"]
    ]
    runs = range(fields["tokens"].index("  "), fields["tokens"].index("  ") + 3)
    fields["token_type"] = [4 if i in runs else t for i, t in enumerate(fields["token_type"])]
    fields["scores"] = [float(i) for i in range(len(fields["scores"]))]
    fields["add_space_prefix"] = False
    mine = ours(tmp_path, fields, "gemma3")
    compare(mine, theirs(fields, "gemma3"))
    for text in TEXTS:
        assert mine.decode(mine.encode(text)) == text
    assert mine.encode("a    b")[1] == runs[-1]


def unigram(charsmap=None):
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE)
    trainer = trainers.UnigramTrainer(
        vocab_size=150,
        special_tokens=["<pad>", "</s>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    trained.train_from_iterator([*SENTENCES] * 3, trainer)
    pieces = json.loads(trained.to_str())["model"]["vocab"]
    padding = [f"[PAD{i}]" for i in range(len(pieces), len(pieces) + 128)]
    fields = {
        "model": "t5",
        "pre": "default",
        "tokens": [token for token, _ in pieces] + padding,
        "scores": [float(score) for _, score in pieces] + [-10000.0] * 128,
        "token_type": [3, 3, 2] + [1] * (len(pieces) - 3) + [5] * 128,
        "eos_token_id": 1,
        "unknown_token_id": 2,
    }
    return fields if charsmap is None else fields | {"precompiled_charsmap": list(charsmap)}


def test_unigrams_of_t5(tmp_path):
    # Breaks if: white space is kept, sentinels are left as padding or counted the other way.
    fields = unigram()
    mine = ours(tmp_path, fields, "t5")
    texts = [*TEXTS, "a <extra_id_0> b <extra_id_99></s> [PAD7]"]
    compare(mine, theirs(fields, "t5"), texts)
    assert (mine.bos_id, mine.eos_id, mine.add_bos, mine.add_eos) == (None, 1, False, True)
    first = fields["tokens"].index("[PAD" + str(len(fields["tokens"]) - 128) + "]")
    assert mine.encode("<extra_id_0>") == [first + 99]
    assert mine.encode("<extra_id_99>") == [first]


def charsmap(key, value):
    """A precompiled map of one entry. Source: darts-clone's double array, sentencepiece."""
    units, node = {}, 0
    units[0] = 256 << 10
    for i, byte in enumerate(key.encode()):
        at = node ^ (units[node] >> 10) ^ byte
        last = i == len(key.encode()) - 1
        units[at] = byte | (256 * (i + 2) << 10) | (last << 8)
        node = at
    units[node ^ (units[node] >> 10)] = 1 << 31  # a value: where the entry's text begins, 0
    size = max(units) + 256
    array = struct.pack(f"<{size}I", *(units.get(i, 0) for i in range(size)))
    return struct.pack("<I", len(array)) + array + value.encode() + b"\0"


def test_characters_are_mapped_before_they_are_cut(tmp_path):
    # Breaks if: precompiled_charsmap is not read.
    from transformers import T5Tokenizer

    spelling = charsmap("ﬁ", "fi")
    fields = unigram(spelling)
    mine = ours(tmp_path, fields, "t5")
    assert mine.encode("a ﬁlm") == mine.encode("a film")
    assert mine.encode("a ﬁlm") != ours(tmp_path, unigram(), "t5").encode("a ﬁlm")
    pieces = list(zip(fields["tokens"], fields["scores"], strict=True))
    reference = T5Tokenizer(vocab=pieces, _spm_precompiled_charsmap=spelling, extra_ids=0)
    compare(mine, reference.backend_tokenizer, SENTENCES + ("a ﬁlm, the ﬁﬁ",))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"scores": None}, "metadata has no tokenizer.ggml.scores"),
        ({"merges": ["a bbbb"]}, "tokenizer.ggml fields do not fit together"),
    ],
)
def test_fields_that_do_not_fit_are_one_line(tmp_path, spoil, message):
    fields = {k: v for k, v in (sentencepiece() | spoil).items() if v is not None}
    with pytest.raises(UserError, match=message) as error:
        ours(tmp_path, fields)
    assert "\n" not in str(error.value)
