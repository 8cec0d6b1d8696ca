"""Asks vLLM with a trained prompt before each text, tasks mixed in one batch.

    python client.py --model FOLDER < requests.jsonl > answers.jsonl

A request is a line {"task": NAME, "input": TEXT}; its answer is the same line with "output" and
"token_ids" added. tasks.json has the names of the tasks and the templates of their texts. FOLDER is
the Hugging Face folder of the model that the prompts were trained on. Needs vLLM only.

The prompts and tasks.json are read from this file's own folder. A prompt's vectors enter as
embeddings and the text as token ids, which vLLM embeds (tried with vLLM 0.32).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PROMPTS, TASKS = "prompts.safetensors", "tasks.json"


def mixed_input(vectors_PD: Any, text_ids: Sequence[int]) -> dict[str, Any]:
    """Returns vLLM's input of a prompt [P, D] (a tensor of PyTorch) and the token ids after it.

    `prompt_is_token_ids` says at which positions vLLM takes the id; at the others it takes the
    embedding. What it does not take is zero.
    """
    length, ids = len(vectors_PD), list(text_ids)
    embeds_TD = vectors_PD.new_zeros((length + len(ids), vectors_PD.shape[1]))
    embeds_TD[:length] = vectors_PD
    return {
        "prompt_embeds": embeds_TD,
        "prompt_token_ids": [0] * length + ids,
        "prompt_is_token_ids": [False] * length + [True] * len(ids),
    }


def read_inputs(requests: Sequence[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Returns vLLM's inputs of requests. The tokenizer is that of transformers."""
    from safetensors.torch import load_file

    prompts, tasks = load_file(HERE / PROMPTS), json.loads((HERE / TASKS).read_text())["tasks"]

    def ids(request: dict[str, Any]) -> list[int]:
        text_ids: list[int] = tokenizer(request["input"], add_special_tokens=False)["input_ids"]
        return tasks[request["task"]]["text_begins"] + text_ids

    return [mixed_input(prompts[request["task"]], ids(request)) for request in requests]


def main() -> None:
    """Answers the requests on standard input greedily."""
    parser = argparse.ArgumentParser(description="Trained prompts before texts, in vLLM.")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="of the model")
    parser.add_argument("--dtype", default="auto", help="of the computation, as vLLM has it")
    parser.add_argument("--max-tokens", type=int, default=32, help="of an answer")
    arguments = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # answers go to stdout
    from vllm import LLM, SamplingParams

    model = LLM(arguments.model, dtype=arguments.dtype, enable_prompt_embeds=True)
    requests = [json.loads(line) for line in sys.stdin]
    greedy = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
    inputs: Any = read_inputs(requests, model.get_tokenizer())
    for request, found in zip(requests, model.generate(inputs, greedy), strict=True):
        answer = {"output": found.outputs[0].text, "token_ids": list(found.outputs[0].token_ids)}
        print(json.dumps({**request, **answer}, ensure_ascii=False))


if __name__ == "__main__":
    main()
