"""Tokenizers trained on a corpus. The same corpus gives the same tokenizer.

The trainer of unigram models in `tokenizers` does not: it sums over a hash table in a random order,
and its scores differ from run to run. The one here counts instead, with the library's own
segmentation.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from softprompt.pretrained.tokenizer import Tokenizer

END = "<|endoftext|>"
T5_SPECIAL = ("<pad>", "</s>", "<unk>")
SENTINELS = 100
LONGEST = 16  # characters of a unigram piece
SEEDS = 4  # candidates for each piece of the vocabulary at first
SHRINK = 0.75  # share of the pieces that a round keeps


def train_bpe(documents: list[str], *, vocab: int) -> Tokenizer:
    """A byte-level BPE; token 0 ends a document.

    Args:
        documents: the corpus.
        vocab: number of tokens.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(documents, trainer)
    return Tokenizer(backend, bos_id=0, eos_id=0, add_bos=False)


def train_unigram(documents: list[str], *, vocab: int) -> Tokenizer:
    """A unigram tokenizer with T5's special tokens: 0 pads, 1 ends a text, 2 is unknown.

    The last `SENTINELS` ids are sentinels, `<extra_id_0>` the last of all. Pieces are those that
    the most probable segmentation of the corpus uses most; in each round the rarest are dropped.

    Args:
        documents: the corpus.
        vocab: number of tokens, sentinels included.

    Source: Kudo 2018 (arXiv 1804.10959), with counts of the best segmentation for expected counts.
    """
    outer = _unigram({})
    words: Counter[str] = Counter()
    for text in documents:
        pieces = outer.pre_tokenizer.pre_tokenize_str(outer.normalizer.normalize_str(text))
        words.update(piece for piece, _ in pieces)
    letters = Counter({c: 0 for word in words for c in word})
    size = vocab - len(T5_SPECIAL) - SENTINELS
    counts = _most(_substrings(words), letters, SEEDS * size)
    while True:
        counts = _most(_segmented(words, counts), letters, max(size, int(SHRINK * len(counts))))
        if len(counts) <= size:
            break
    backend = _unigram(_segmented(words, counts) | letters | counts)
    backend.add_special_tokens(
        [*T5_SPECIAL, *(f"<extra_id_{n}>" for n in reversed(range(SENTINELS)))]
    )
    return Tokenizer(backend, bos_id=None, eos_id=1, add_bos=False, add_eos=True)


def sentinel_ids(vocab: int) -> list[int]:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, ..."""
    return [vocab - 1 - n for n in range(SENTINELS)]


def _unigram(counts: Mapping[str, int]) -> Backend:
    """The tokenizer whose pieces have these counts, most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    total = math.log(sum(counts.values()) or 1)
    scores = [(piece, round(math.log(max(n, 0.5)) - total, 6)) for piece, n in ordered]
    special = [(token, 0.0) for token in T5_SPECIAL]
    backend = Backend(models.Unigram([*special, *scores], unk_id=2))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), spaces, normalizers.Strip()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def _substrings(words: Mapping[str, int]) -> Counter[str]:
    """How often each substring of two to `LONGEST` characters occurs, times its length."""
    found: Counter[str] = Counter()
    for word, count in words.items():
        for begin in range(len(word)):
            for end in range(begin + 2, min(len(word), begin + LONGEST) + 1):
                found[word[begin:end]] += count * (end - begin)
    return found


def _segmented(words: Mapping[str, int], counts: Mapping[str, int]) -> Counter[str]:
    """How often each piece is used in the most probable segmentation of the words."""
    model = _unigram(counts).model
    used: Counter[str] = Counter()
    for word, count in words.items():
        for token in model.tokenize(word):
            used[token.value] += count
    return used


def _most(counts: Mapping[str, int], letters: Counter[str], size: int) -> Counter[str]:
    """All letters, and the most frequent other pieces: `size` in all."""
    others = [(piece, n) for piece, n in counts.items() if piece not in letters]
    others.sort(key=lambda item: (-item[1], item[0]))
    kept = dict(others[: max(0, size - len(letters))])
    return Counter({**{one: counts.get(one, 0) for one in letters}, **kept})


def train_tokenizer(documents: Iterable[str], *, vocab: int, encoder_decoder: bool) -> Tokenizer:
    """The tokenizer of a decoder (BPE), or of an encoder-decoder (unigram)."""
    train = train_unigram if encoder_decoder else train_bpe
    return train(list(documents), vocab=vocab)
