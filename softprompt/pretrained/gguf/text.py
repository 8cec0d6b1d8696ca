"""Tokenizers from the metadata of a GGUF file: byte-level BPE, sentencepiece's BPE, and unigrams.

Each is built as the converter of transformers builds it; tests compare the two.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from softprompt.errors import UserError, one_line
from softprompt.pretrained.gguf.file import File
from softprompt.pretrained.tokenizer import Tokenizer, byte_letters

CONTROL, USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`
SPACE = "▁"  # how sentencepiece spells it

# How a text is split before merging. Source: the `tokenizer.json` of Llama 3 and of Qwen 2.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3, _QWEN2 = _WORDS.format(r"\p{N}{1,3}"), _WORDS.format(r"\p{N}")

# SmolLM 1 and 2 split off each digit and then split as GPT-2 does (their `tokenizer.json`).
# transformers does not split off digits when it reads a GGUF file, and merges spaces across them.
_SMOLLM = r"\p{N}"

# `tokenizer.ggml.pre` -> the pattern to split by; None for GPT-2's.
CUTS: Mapping[str, str | None] = {
    "smollm": _SMOLLM,
    "gpt-2": None,
    "default": None,
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "smaug-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def read_tokenizer(file: File) -> Tokenizer:
    """The tokenizer that a file's metadata describes.

    Raises:
        UserError: another kind of tokenizer, an unknown pre-tokenizer, or a missing or broken
            field.
    """
    model = file.need("tokenizer.ggml.model", str)
    if model not in BUILDERS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model {model!r} is not supported; "
            f"known: {', '.join(BUILDERS)}"
        )
    tokens: list[str] = file.need("tokenizer.ggml.tokens", list)
    backend = BUILDERS[model](file, tokens)
    types = file.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens(_added(backend, tokens, types, CONTROL))
    backend.add_tokens(_added(backend, tokens, types, USER_DEFINED))
    # The default of llama.cpp.
    begins = model == "llama" or CUTS.get(file.get("tokenizer.ggml.pre")) == _LLAMA3
    return Tokenizer(
        backend=backend,
        bos_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_id=file.get("tokenizer.ggml.eos_token_id"),
        add_bos=bool(file.get("tokenizer.ggml.add_bos_token", begins)),
        add_eos=bool(file.get("tokenizer.ggml.add_eos_token", model == "t5")),
    )


def _byte_level(file: File, tokens: list[str]) -> Backend:
    """GPT-2's kind: characters stand for bytes; merges are in the order of learning."""
    cut = file.need("tokenizer.ggml.pre", str)
    if cut not in CUTS:
        known = ", ".join(CUTS)
        raise UserError(f"{file.path}: tokenizer.ggml.pre {cut!r} is not supported; known: {known}")
    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges", list)]
    pattern = CUTS[cut]
    whole = pattern == _LLAMA3  # a word that is a token is taken whole, without merges
    vocabulary = {_spelt_in_bytes(token): i for i, token in enumerate(tokens)}
    backend = _build(file, lambda: models.BPE(vocabulary, merges, ignore_merges=whole))
    cuts: list[Any] = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")] if pattern else []
    as_gpt2 = pattern in (None, _SMOLLM)
    cuts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=as_gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    if pattern == _QWEN2:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    return backend


_LETTERS = byte_letters()
_ALPHABET = frozenset(_LETTERS)


def _spelt_in_bytes(token: str) -> str:
    """A token in the byte alphabet; added tokens are stored in plain text."""
    if _ALPHABET.issuperset(token):
        return token
    return "".join(_LETTERS[byte] for byte in token.encode())


def _sentencepiece(file: File, tokens: list[str]) -> Backend:
    """Llama 2's and Gemma's kind: characters merge by score; unknown characters become bytes.

    A Gemma file stores runs of spaces as spaces. Its merges follow the order of its tokens, not
    their scores.
    """
    scores: Sequence[float] = file.need("tokenizer.ggml.scores", list)
    if file.architecture.startswith("gemma"):
        tokens = [SPACE * len(token) if token.strip(" ") == "" else token for token in tokens]
        scores = range(0, -len(tokens), -1)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if stored := file.get("tokenizer.ggml.merges"):
        merges = [tuple(merge.split(" ")) for merge in stored]
    else:
        merges = _merges(vocabulary, scores)
    unknown = _token(file, tokens, "unknown")
    backend = _build(
        file,
        lambda: models.BPE(
            vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
        ),
    )
    read: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        backend.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
        read.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = normalizers.Replace(" ", SPACE)
    backend.decoder = decoders.Sequence(read)
    return backend


def _merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, ...]]:
    """Every pair of tokens that makes a third, best score first; ties as in transformers."""
    found: list[tuple[float, int, int, int, str, str]] = []
    for (token, i), score in zip(vocabulary.items(), scores, strict=False):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, -cut, cut - len(token), i, left, right))
    found.sort(key=lambda merge: merge[:3])
    return [merge[4:] for merge in found]


def _unigram(file: File, tokens: list[str]) -> Backend:
    """T5's kind: the likeliest split of a word. A file stores its sentinels as padding."""
    blanks = [i for i, token in enumerate(tokens) if re.fullmatch(r"\[PAD\d+\]", token)]
    sentinels = {i: f"<extra_id_{99 - nth}>" for nth, i in enumerate(blanks[:100])}
    names = [sentinels.get(i, token) for i, token in enumerate(tokens)]
    scores = file.need("tokenizer.ggml.scores", list)
    unknown = file.get("tokenizer.ggml.unknown_token_id", 2)
    pieces = list(zip(names, scores, strict=False))
    backend = _build(file, lambda: models.Unigram(pieces, unknown, byte_fallback=False))
    if charsmap := file.get("tokenizer.ggml.precompiled_charsmap"):
        backend.normalizer = normalizers.Precompiled(bytes(byte % 256 for byte in charsmap))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True),
        ]
    )
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.add_special_tokens(list(sentinels.values()))
    return backend


BUILDERS: Mapping[str, Callable[[File, list[str]], Backend]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
    "t5": _unigram,
}


def _build(file: File, make: Callable[[], Any]) -> Backend:
    try:
        return Backend(make())
    except Exception as e:  # tokenizers raises plain Exception
        reason = one_line(e)
        raise UserError(f"{file.path}: tokenizer.ggml fields do not fit together ({reason})") from e


def _token(file: File, tokens: list[str], role: str) -> str | None:
    """The token of a role, such as "unknown", if there is one."""
    token_id = file.get(f"tokenizer.ggml.{role}_token_id")
    return tokens[token_id] if token_id is not None and 0 <= token_id < len(tokens) else None


def _added(backend: Backend, tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    """The tokens of one type that the vocabulary holds verbatim; texts are searched for them."""
    special = kind == CONTROL
    return [
        AddedToken(token, normalized=False, special=special)
        for token, t in zip(tokens, types, strict=False)
        if t == kind and backend.token_to_id(token) is not None
    ]
