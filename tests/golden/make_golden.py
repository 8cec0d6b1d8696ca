"""Writes llama.json and families.json: ids and logits by transformers on PyTorch, for the tests
without PyTorch.

Run in the environment of `make parity`, from the repository root:

    python -m tests.golden.make_golden
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt.pretrained.loading import find
from tests.families import FAMILY_IDS, VARIANTS, golden_prompt, write_family_folder
from tests.texts import as_published
from tests.tiny import write_llama_folder

TEXTS = (
    "Review: a warm, funny film.\nSentiment: positive",
    "It's 1,234.50 dollars, isn't it? They've paid 99% by 2026-01-31.",
    "  two leading spaces,\ttabs\t\tand   runs of spaces   \n\n\nthree newlines\n",
    "Crème brûlée, naïve façade, Ελληνικά, русский, 日本語, العربية",
    "emoji 🙂👩‍👩‍👧 and zero\u200bwidth, ﬁ ligature, ½ ² ① Ⅳ",
    "def f(x):\n    return x ** 2  # squared\n",
    "<|im_start|>user\nhello<|im_end|>",
    "I'll, we'd, YOU'RE, o'clock, 'tis",
    "In  2023, or\n\n7 of   10",
)

TINY = {
    "tied": {},
    "untied": {"tied": False},
    "wide heads, one kv head": {"heads": 3, "kv_heads": 1, "head_size": 24},
}

TINY_IDS = [7, 300, 12, 45, 45, 2, 319, 81, 100, 263, 0, 64]


def reference(text: str, tokenizer: Any, model: Any) -> dict[str, Any]:
    """Ids of a text, and the five largest and first five logits after it."""
    ids = tokenizer(text)["input_ids"]
    last_V = model(torch.tensor([ids])).logits[0, -1]
    top = torch.topk(last_V, 5)
    return {
        "text": text,
        "ids": ids,
        "top_ids": top.indices.tolist(),
        "top_logits": rounded(top.values),
        "first_logits": rounded(last_V[:5]),
    }


def tiny_reference(sizes: dict[str, Any]) -> dict[str, Any]:
    """Logits of a tiny folder's model after `TINY_IDS`."""
    with tempfile.TemporaryDirectory() as folder:
        write_llama_folder(folder, seed=1, **sizes)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    last_V = model(torch.tensor([TINY_IDS])).logits[0, -1]
    return {"sizes": sizes, "ids": TINY_IDS, "first_logits": rounded(last_V[:16])}


def family_reference(name: str) -> list[float]:
    """Logits of a family's tiny variant after a soft prompt and `FAMILY_IDS`."""
    with tempfile.TemporaryDirectory() as folder:
        write_family_folder(Path(folder), name)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    x_1TD = model.get_input_embeddings()(torch.tensor([FAMILY_IDS]))
    prompt_PD = torch.tensor(golden_prompt(x_1TD.shape[-1]))
    logits_1TV = model(inputs_embeds=torch.cat([prompt_PD[None], x_1TD], 1)).logits
    return rounded(logits_1TV[0, -1, :16])


def rounded(values: torch.Tensor) -> list[float]:
    """Six decimals: below every tolerance that reads them."""
    return [round(float(v), 6) for v in values]


def write(name: str, golden: dict[str, Any]) -> None:
    """Writes a file beside this one, with the versions that it was made with."""
    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    text = json.dumps({"made_with": versions, **golden}, ensure_ascii=True, indent=1)
    Path(__file__).with_name(name).write_text(text + "\n")


def main() -> None:
    """Writes llama.json and families.json beside this file."""
    path = find("smollm2-135m-instruct-q4")
    tokenizer = as_published(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name))
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    with torch.no_grad():
        write("families.json", {name: family_reference(name) for name in VARIANTS})
        golden = {
            "smollm2-135m-instruct-q4": [reference(t, tokenizer, model) for t in TEXTS],
            "tiny": {name: tiny_reference(sizes) for name, sizes in TINY.items()},
        }
        write("llama.json", golden)


if __name__ == "__main__":
    main()
