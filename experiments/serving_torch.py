"""PEFT's side of `experiments.serving peft`: `python -m experiments.serving_torch job.json`.

Run by an interpreter that has torch, transformers and peft, and nothing of this library. It reads
lines from its input, each a JSON list [form, dtype, requests], and answers each with a JSON line:
"seconds" by the clock, "processors" and "tokens". The forms are what one writes without this
library:

    switching   for each request `set_adapter`, then `generate`
    batch       all requests as one batch of `inputs_embeds`: each row its prompt, then its input
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Job = dict[str, Any]


def forms(job: Job, dtype: str) -> dict[str, Callable[[int], list[list[int]]]]:
    """The forms by name; each returns the generated ids of the first requests.

    Args:
        job: "folders" of the model by dtype, "prompts" (files of vectors [P, D]), "inputs" (ids,
            all of one length) and "new", the tokens to generate.
        dtype: of the weights and the computation.
    """
    base = AutoModelForCausalLM.from_pretrained(
        job["folders"][dtype], dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    prompts_NPD = torch.stack([load_file(file)["prompt"] for file in job["prompts"]])
    inputs_NT = torch.tensor(job["inputs"])
    how = {"max_new_tokens": job["new"], "do_sample": False, "eos_token_id": None}
    how |= {"pad_token_id": 0}
    config = peft.PromptTuningConfig(
        task_type=peft.TaskType.CAUSAL_LM,
        num_virtual_tokens=prompts_NPD.shape[1],
        prompt_tuning_init="RANDOM",
    )

    def batch(count: int) -> list[list[int]]:
        words_NTD = base.get_input_embeddings()(inputs_NT[:count])
        embeds = torch.cat([prompts_NPD[:count].to(words_NTD.dtype), words_NTD], dim=1)
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        return base.generate(inputs_embeds=embeds, attention_mask=mask, **how).tolist()

    model = peft.get_peft_model(base, config, adapter_name="0")
    for n, prompt_PD in enumerate(prompts_NPD):
        if n:
            model.add_adapter(f"{n}", config)
        model.prompt_encoder[f"{n}"].embedding.weight.data.copy_(prompt_PD)

    def switching(count: int) -> list[list[int]]:
        made = []
        for n, ids_T in enumerate(inputs_NT[:count]):
            model.set_adapter(f"{n}")
            ids_1T = ids_T[None]
            out = model.generate(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), **how)
            made.append(out[0, len(ids_T) :].tolist())
        return made

    return {"batch": batch, "switching": switching}


def main() -> None:
    """Answers lines until the input ends."""
    job = json.loads(Path(sys.argv[1]).read_text())
    known = {dtype: forms(job, dtype) for dtype in job["folders"]}
    for line in sys.stdin:
        form, dtype, count = json.loads(line)
        began = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            tokens = known[dtype][form](count)
        taken = time.perf_counter() - began[0], time.process_time() - began[1]
        answer = {"seconds": taken[0], "processors": taken[1], "tokens": tokens}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
