"""Text to token ids and back, without special tokens and without PyTorch."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel

from softprompt.errors import UserError
from softprompt.models.gguf import File

# `tokenizer.ggml.pre` -> how text is cut before merging, as transformers reads it from a GGUF file.
PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
}

CONTROL, USER_DEFINED = 3, 4  # values of `tokenizer.ggml.token_type`


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, with what the model expects around a text.

    `bos_id` and `eos_id` are None where the model has none. `add_bos`: the model was trained with a
    BOS before every text; `add_eos`: with an EOS after it (T5). `encode` never adds either.
    """

    backend: Backend
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool = False

    def encode(self, text: str) -> list[int]:
        """Token ids of the text alone."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each the span [start, end) of characters it covers.

        A space that a token begins with belongs to its span. Tokens that are bytes of one character
        all have that character's span.
        """
        encoding = self.backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some token ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; the model's embedding may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it (a byte-level one shows a space as "Ġ").

        Raises:
            UserError: no such id.
        """
        token = self.backend.id_to_token(token_id)
        if token is None:
            raise UserError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return token


def from_gguf(file: File) -> Tokenizer:
    """The tokenizer described by a GGUF file's metadata (byte-level BPE).

    Raises:
        UserError: another kind of tokenizer, an unknown pre-tokenizer, or a missing or broken
            field.
    """
    model = file.need("tokenizer.ggml.model")
    if model != "gpt2":
        raise UserError(
            f"{file.path}: tokenizer.ggml.model {model!r} is not supported; known: gpt2"
        )
    cut = file.need("tokenizer.ggml.pre")
    if cut not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UserError(f"{file.path}: tokenizer.ggml.pre {cut!r} is not supported; known: {known}")
    tokens: list[str] = file.need("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in file.need("tokenizer.ggml.merges")]
    try:
        backend = Backend(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    except Exception as e:  # tokenizers raises plain Exception
        raise UserError(f"{file.path}: tokenizer.ggml.merges do not fit the tokens ({e})") from e
    backend.pre_tokenizer = PRE_TOKENIZERS[cut]()
    backend.decoder = ByteLevel()
    types = file.get("tokenizer.ggml.token_type", [])
    backend.add_special_tokens(_added(tokens, types, CONTROL))
    backend.add_tokens(_added(tokens, types, USER_DEFINED))
    return Tokenizer(
        backend=backend,
        bos_id=file.get("tokenizer.ggml.bos_token_id"),
        eos_id=file.get("tokenizer.ggml.eos_token_id"),
        add_bos=bool(file.get("tokenizer.ggml.add_bos_token", False)),
    )


def from_folder(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, read by transformers.

    Raises:
        UserError: no tokenizer that transformers can read, or none with a fast backend.
    """
    path = Path(path)
    # Without it, transformers warns at import that PyTorch, which nothing here needs, is absent.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # seconds to import: only when a folder is read

    try:
        fast = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as e:  # whatever the folder makes transformers raise
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UserError(f"{path}: no readable tokenizer ({reason[:200]})") from e
    backend = getattr(fast, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{path}: {type(fast).__name__} has no fast backend (no tokenizer.json)")
    ids = fast("a")["input_ids"]
    add_bos = fast.bos_token_id is not None and ids[:1] == [fast.bos_token_id]
    add_eos = fast.eos_token_id is not None and ids[-1:] == [fast.eos_token_id]
    backend.post_processor = None  # it only adds special tokens, and trims spaces off the offsets
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, fast.bos_token_id, fast.eos_token_id, add_bos, add_eos)


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    special = kind == CONTROL
    chosen = [token for token, t in zip(tokens, types, strict=False) if t == kind]
    return [AddedToken(token, normalized=False, special=special) for token in chosen]
