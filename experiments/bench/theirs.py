"""PEFT's side: `python -m experiments.bench.theirs job.json` prints a JSON row.

Run by an interpreter that has torch, transformers and peft; nothing of this library is imported but
`experiments.bench.measure`. It is what PEFT's users write: the model of a Hugging Face folder in
the job's dtype, PEFT around it, AdamW, scaled-dot-product attention, examples padded on the right
to the longest of their batch, and labels of -100 where nothing is predicted.
"""

import statistics
import time
from typing import Any

import numpy as np

from experiments.bench.measure import Job, cores, main, peak_resident, resident, timed


def measure(job: Job) -> dict[str, Any]:
    """Trains some steps with each number of threads that the job names.

    Returns:
        As `experiments.bench.ours.measure`, less what only that has; "threads" is the quickest
        number of them, whose seconds are told, and "tried" has the median seconds of each.
    """
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    before, began = resident(), time.perf_counter()
    model = build(job).to(device)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, job["rate"], weight_decay=0.0)
    batches = read_batches(job, encoder_decoder=model.config.is_encoder_decoder)
    load = time.perf_counter() - began

    def step(n: int) -> float:
        batch = {name: torch.from_numpy(array).to(device) for name, array in batches[n].items()}
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        if cuda:
            torch.cuda.synchronize()
        return float(loss.detach())

    found: dict[int, tuple[list[float], list[float]]] = {}
    for threads in job["threads"]:
        torch.set_num_threads(threads)
        found[threads] = timed(step, warmup=job["warmup"], steps=job["steps"], limit=job["limit"])
    tried = {n: statistics.median(s[job["warmup"] :]) for n, (s, _) in found.items()}
    best = min(tried, key=lambda n: tried[n])
    seconds, losses = found[best]
    kind = torch.cuda.get_device_name() if cuda else "cpu"
    return {
        "seconds": seconds[job["warmup"] :],
        "losses": losses,
        "load": load,
        "first": found[job["threads"][0]][0][0],
        "memory": torch.cuda.max_memory_allocated() if cuda else peak_resident() - before,
        "actual_dtype": job["dtype"],
        "threads": best,
        "tried": {str(n): taken for n, taken in tried.items()},
        "shape": list(batches[0]["input_ids"].shape),
        "device": f"{kind} ({cores()} cores)",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }


def build(job: Job) -> Any:
    """The model, and what trains it around it."""
    import peft
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    folder, method = job["folders"][job["dtype"]], job["method"]
    if AutoConfig.from_pretrained(folder).is_encoder_decoder:
        model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=getattr(torch, job["dtype"]))
        config = peft.PromptTuningConfig(
            task_type=peft.TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=job["length"],
            num_transformer_submodules=1,  # before the encoder's input only
            prompt_tuning_init="RANDOM",
        )
        return peft.get_peft_model(model, config)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    )
    task = peft.TaskType.CAUSAL_LM
    model.config.use_cache = method == "prefix"  # which is one
    configs: dict[str, Any] = {
        "prompt": lambda: peft.PromptTuningConfig(
            task_type=task, num_virtual_tokens=job["length"], prompt_tuning_init="RANDOM"
        ),
        "prefix": lambda: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=job["length"]),
        "lora": lambda: peft.LoraConfig(
            task_type=task, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
        ),
    }
    return model if method == "full" else peft.get_peft_model(model, configs[method]())


def read_batches(job: Job, *, encoder_decoder: bool = False) -> list[dict[str, np.ndarray]]:
    """The arguments of the model at each step of the job.

    A decoder reads input and target in one row; an encoder-decoder reads the input.
    """
    with np.load(job["examples"]) as saved:
        tokens, lengths_SB, inputs_SB = (saved[n] for n in ("tokens", "lengths", "inputs"))
    ends = np.cumsum(lengths_SB).reshape(lengths_SB.shape)
    count, start = job["warmup"] + job["steps"], job["start"]
    batches = []
    for step in range(start, start + count):
        whole_B, inputs_B = lengths_SB[step], inputs_SB[step]
        read_B = inputs_B if encoder_decoder else whole_B
        targets_B = whole_B - inputs_B if encoder_decoder else whole_B
        shape = len(whole_B), int(read_B.max())
        batch = {
            "input_ids": np.zeros(shape, np.int64),
            "attention_mask": np.zeros(shape, np.int64),
            "labels": np.full((len(whole_B), int(targets_B.max())), -100, np.int64),
        }
        for row, (end, length, inputs) in enumerate(
            zip(ends[step], lengths_SB[step], inputs_SB[step], strict=True)
        ):
            own, read = tokens[end - length : end], int(read_B[row])
            batch["input_ids"][row, :read] = own[:read]
            batch["attention_mask"][row, :read] = 1
            first = 0 if encoder_decoder else inputs
            batch["labels"][row, first : first + length - inputs] = own[inputs:]
        batches.append(batch)
    return batches


if __name__ == "__main__":
    main(measure)
