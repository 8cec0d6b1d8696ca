"""Tokenizers: text to token ids and back, without special tokens, and without PyTorch."""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from softprompt.errors import UserError, one_line


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, and the special tokens that the model expects around a text.

    Attributes:
        backend: the tokenizer of the library `tokenizers`.
        bos_id: id of BOS; None if the model has none.
        eos_id: id of EOS; None if the model has none.
        add_bos: the model was trained with BOS before every text. `encode` does not add it.
        add_eos: the model was trained with EOS after every text (T5). `encode` does not add it.
    """

    backend: Backend
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool = False

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, as `encode` gives them; other threads run meanwhile.

        The backend's `encode` holds Python's interpreter lock, and its `encode_batch` does not.
        """
        found = self.backend.encode_batch(list(texts), add_special_tokens=False)
        return [one.ids for one in found]

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of a text that follows another one, such as a target after its input.

        A SentencePiece tokenizer begins every text with a space, which a continuation must not
        have; so the text is encoded behind a line break, whose own tokens are then dropped. Where
        the tokenizer merges the two, or drops line breaks, this is `encode`.
        """
        before, both = self.encode("\n"), self.encode(f"\n{text}")
        return both[len(before) :] if both[: len(before)] == before else self.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @property
    def vocab_size(self) -> int:
        """Number of tokens. The embedding matrix may have more rows."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token(self, token_id: int) -> str:
        """A token as the vocabulary spells it: a byte-level vocabulary shows a space as "Ġ".

        Raises:
            UserError: no such id.
        """
        token = self.backend.id_to_token(token_id)
        if token is None:
            raise UserError(f"token id {token_id} is not in the vocabulary of {self.vocab_size}")
        return token

    def within(self, rows: int) -> "Tokenizer":
        """The same tokenizer without the added tokens that the embedding matrix has no row for.

        Gemma 3's text models are published with the tokenizer of its image models.

        Raises:
            UserError: the matrix also lacks rows for tokens that were not added.
        """
        if max(self.backend.get_vocab(with_added_tokens=True).values(), default=0) < rows:
            return self
        state = json.loads(self.backend.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < rows]
        backend = Backend.from_str(json.dumps(state))
        if max(backend.get_vocab(with_added_tokens=True).values(), default=0) >= rows:
            raise UserError(f"the tokenizer has {self.vocab_size} tokens, the model embeds {rows}")
        return dataclasses.replace(self, backend=backend)


def from_folder(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a Hugging Face folder, as transformers reads it.

    Raises:
        UserError: transformers cannot read a tokenizer, or it has no fast backend.
    """
    path = Path(path)
    # Otherwise transformers warns at import that PyTorch is absent, which is not needed here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer  # imported here because it takes seconds

    try:
        fast = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as e:  # a broken folder raises errors of any type
        raise UserError(f"{path}: no readable tokenizer ({one_line(e)})") from e
    backend = getattr(fast, "backend_tokenizer", None)
    if type(fast).__name__ == "ByT5Tokenizer":
        backend = byte_backend(sentinels=len(fast) - 259)
    if backend is None:
        raise UserError(f"{path}: {type(fast).__name__} has no fast backend (no tokenizer.json)")
    ids = fast("a")["input_ids"]
    add_bos = fast.bos_token_id is not None and ids[:1] == [fast.bos_token_id]
    add_eos = fast.eos_token_id is not None and ids[-1:] == [fast.eos_token_id]
    backend.post_processor = None  # it adds special tokens
    backend.no_truncation()
    backend.no_padding()
    return Tokenizer(backend, fast.bos_token_id, fast.eos_token_id, add_bos, add_eos)


def byte_backend(*, sentinels: int = 125) -> Backend:
    """ByT5's tokenizer, which transformers has only in Python: one token for each byte.

    Token 0 is padding, 1 EOS, 2 unknown, 3 to 258 the bytes, and the rest sentinels.
    Source: arXiv 2105.13626, section 3.1.
    """
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: i for i, token in enumerate([*special, *byte_letters()])}
    backend = Backend(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*special, *(f"<extra_id_{i}>" for i in range(sentinels))])
    return backend


def byte_letters() -> list[str]:
    """The character that stands for each byte: itself if it is printable, else one from U+0100 on.

    Source: `bytes_to_unicode` of GPT-2's `encoder.py`.
    """
    printed = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printed)
    spelt = {byte: 256 + nth for nth, byte in enumerate(others)}
    return [chr(spelt.get(byte, byte)) for byte in range(256)]
