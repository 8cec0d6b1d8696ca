"""Texts on which tokenizers are compared with transformers'."""

import random
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

AWKWARD = (
    "",
    " ",
    "\n",
    "  two leading spaces",
    "trailing spaces   ",
    "tabs\t\tand\r\nline ends\r\n\r\n",
    "1 12 123 1234 12345.67 1,000,000 ½ ² ① Ⅳ",
    "crème brûlée naïve façade ﬁ",
    "Ελληνικά русский 日本語 한국어 العربية हिन्दी",
    "🙂 👩‍👩‍👧 🇬🇧 \u200b\u00a0\ufeff\u2028",
    "it's isn't they've I'll we'd YOU'RE o'clock 'tis",
    "<|im_start|>user\nhello<|im_end|>\n<|endoftext|>",
    "https://example.org/a_b?c=d&e=%20#f",
    "\x00\x01\x7f",
)


def as_published(tokenizer: Any) -> Any:
    """SmolLM2's tokenizer as transformers reads it from a GGUF file, with its published cuts.

    The file names the pre-tokenizer "smollm", which is digits apart and then GPT-2's, as in the
    model's `tokenizer.json` and in llama.cpp; transformers takes GPT-2's alone.
    """
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


FILES = (
    "sst2/stsa.binary.test",
    "wikitext2/test.txt",
    "superglue/BoolQ/val.jsonl",
    "gsm8k/test.jsonl",
    "xquad_en/xquad.en.json",
    "tinyshakespeare/input.txt",
    "sms_spam/sms.tsv",
    "mrpc/msr_paraphrase_test.txt",
    "banking77/test.csv",
    "trec/TREC.train.all",
)


def real_lines(shared_data: Path, count: int) -> list[str]:
    """Lines drawn evenly from `FILES`, their line ends kept."""
    rng = random.Random(0)
    lines: list[str] = []
    for file in FILES:
        text = (shared_data / file).read_bytes().decode(errors="replace")
        whole = [line for line in text.splitlines(keepends=True) if len(line) < 4000]
        lines += rng.sample(whole, count // len(FILES))
    return lines
