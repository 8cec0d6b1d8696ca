"""Tokenizers from GGUF metadata and from folders. Equality with transformers is in tests/parity."""

import json
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from softprompt.errors import UserError
from softprompt.pretrained.gguf import File, read_tokenizer
from softprompt.pretrained.tokenizer import Tokenizer, from_folder
from tests.pretrained.ggufs import write_gguf
from tests.tiny import write_llama_folder

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "llama.json").read_text())

TEXTS = (
    "Review: a warm, funny and moving film.\nSentiment: positive",
    "  runs   of\t\tspaces \n\n",
    "digits 1234 and 5,6.7",
    "crème 日本語 🙂👩‍👧 \u200b½",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama_folder(tmp_path_factory.mktemp("tiny"))


@pytest.mark.real
def test_the_real_vocabulary_gives_the_ids_of_transformers(smollm2):
    # Breaks if: add_prefix_space, the split or the special tokens change.
    tokenizer = smollm2.tokenizer
    for case in GOLDEN["smollm2-135m-instruct-q4"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
    assert not tokenizer.add_bos
    assert tokenizer.token(2) == "<|im_end|>"


def test_gguf_and_folder_give_the_same_tokenizer(folder, tmp_path):
    ours, theirs = from_folder(folder), read_tokenizer(File(write_gguf(tmp_path / "a.gguf")))
    for text in (*TEXTS, "<|bos|>x<|eos|>"):
        assert ours.encode(text) == theirs.encode(text)
    assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (0, 1, 320)
    assert (theirs.bos_id, theirs.eos_id, theirs.vocab_size) == (0, 1, 320)


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(folder, text):
    # Breaks if: the decoder drops or adds spaces.
    tokenizer = from_folder(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_batch_has_the_ids_of_its_texts(folder):
    """Mutation: `encode_batch` adds special tokens."""
    tokenizer = from_folder(folder)
    wanted = [tokenizer.encode(text) for text in TEXTS]
    tokenizer.backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    assert tokenizer.encode_batch(TEXTS) == wanted


SPACE = "\u2581"  # how SentencePiece spells a space


def sentencepiece(kind: str) -> Tokenizer:
    """A SentencePiece-like tokenizer of letters and bytes that begins a text with a space.

    As Llama 2's `tokenizer.json` does it ("prepend"), as newer ones do ("metaspace"), or as T5's,
    which drops line breaks ("words").
    """
    letters = [SPACE, *"Paiostve", f"{SPACE}{SPACE}", f"{SPACE}p", f"{SPACE}po"]
    tokens = ["<unk>", *letters, *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [(SPACE, SPACE), (SPACE, "p"), (f"{SPACE}p", "o")]
    vocabulary = {token: i for i, token in enumerate([*tokens, "p"])}
    backend = Backend(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    elif kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        )
    backend.decoder = decoders.ByteFallback()
    return Tokenizer(backend, None, None, add_bos=False)


@pytest.mark.parametrize("text", [" positive", "Paris", "\n\n", "\nto", "  a", ""])
@pytest.mark.parametrize("kind", ["prepend", "metaspace", "words"])
def test_a_continuation_has_no_space_that_its_text_has_not(kind, text):
    """Breaks when a target, or the blank line between two examples, is encoded as a text's start:
    sentencepiece spells "\n\n" as a space and two line breaks then."""
    tokenizer = sentencepiece(kind)
    before, both = tokenizer.encode("ives."), tokenizer.encode(f"ives.{text}")
    if kind != "words":
        assert tokenizer.encode_continuation(text) == both[len(before) :]
    else:
        assert tokenizer.encode_continuation(text) == tokenizer.encode(text)


@pytest.mark.parametrize("text", [*TEXTS, " positive", "\n\n", "\n\n ", "  a", "Paris"])
def test_a_byte_level_continuation_is_the_text_alone(folder, text):
    """Breaks when the line break before a continuation is left in it, or merges with it."""
    tokenizer = from_folder(folder)
    assert tokenizer.encode_continuation(text) == tokenizer.encode(text)


def test_a_folder_that_adds_bos_says_so_and_encode_still_does_not(folder, tmp_path):
    from tokenizers import Tokenizer, processors

    write_llama_folder(tmp_path)
    backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = from_folder(tmp_path)
    assert tokenizer.add_bos
    assert tokenizer.encode(TEXTS[0]) == from_folder(folder).encode(TEXTS[0])


def test_special_tokens_are_whole_and_user_defined_ones_too(tmp_path):
    kinds = {"<|bos|>": gguf.TokenType.CONTROL, "<|eos|>": gguf.TokenType.USER_DEFINED}
    tokenizer = read_tokenizer(File(write_gguf(tmp_path / "a.gguf", kinds=kinds)))
    assert tokenizer.encode("<|bos|><|eos|>") == [0, 1]
    assert tokenizer.decode([0, 1]) == "<|bos|><|eos|>"


def test_unknown_token_id_is_an_error(folder):
    with pytest.raises(UserError, match="token id 320 is not in the vocabulary of 320"):
        from_folder(folder).token(320)


def test_unknown_pre_tokenizer_lists_the_known(tmp_path):
    with pytest.raises(UserError, match=r"a\.gguf: tokenizer.ggml.pre 'falcon' .*known: smollm"):
        read_tokenizer(File(write_gguf(tmp_path / "a.gguf", pre="falcon")))


def test_other_kinds_of_tokenizer_are_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.gguf: tokenizer.ggml.model 'bert' .*known: gpt2, llama, t5"
    ):
        read_tokenizer(File(write_gguf(tmp_path / "a.gguf", tokenizer_model="bert")))


def test_merges_outside_the_vocabulary_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"a\.gguf: tokenizer.ggml fields do not fit together"):
        read_tokenizer(File(write_gguf(tmp_path / "a.gguf", extra_merge="zq qz")))


def test_a_folder_without_tokenizer_is_one_line(tmp_path):
    write_llama_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="no readable tokenizer") as error:
        from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
