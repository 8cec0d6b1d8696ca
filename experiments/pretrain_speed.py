"""How fast is pretraining here, against the same model in transformers on PyTorch?

Question: on a rung of the ladder, what does a training step of all weights take, in float32, beside
the step that users of transformers write: LlamaForCausalLM, AdamW, clipped gradients?

Prediction: at least 1.5 times as fast on two x86 cores. Both compute the same products; PyTorch
holds the logits of all positions and their gradient, and runs every operation by itself.

This is a measurement, not a sweep of trials: it has no `sweep`, `table` and `figure`. The two take
turns. PyTorch runs in a process of its own, with another Python, in float32 and in bfloat16
(autocast); the quicker one is compared.

Command, from the repository root, after `softprompt pretrain ladder/d3` and `make parity`:
    python -m experiments.pretrain_speed --torch-python .venv/parity-3.11/bin/python

Cost: 2 minutes on two x86 cores.

Expected: refuted. On cores with AMX a step of d3 took 0.65 s here and 0.65 s there in float32, and
0.47 s there in bfloat16, whose products use AMX; here float32 is the quicker dtype.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from softprompt.analysis.flops import machine_flops
from softprompt.models.shapes import leaf_shapes
from softprompt.pretrained.ladder import model_folder
from softprompt.pretrained.loading import load_model, make_model
from softprompt.pretraining import objectives
from softprompt.pretraining.recipe import recipe_of
from softprompt.pretraining.train import step_flops
from softprompt.training.optimizers import AdamW, OptimizerConfig, make_optimizer, set_rate
from softprompt.training.sharding import make_mesh, put_batch
from softprompt.training.step import StepConfig
from softprompt.trials.programs import compile_step

RATE = 1e-4

THEIRS = """
import json, sys, time
import numpy as np, torch, transformers

job = json.loads(sys.argv[1])
torch.set_num_threads(job["threads"])
model = transformers.LlamaForCausalLM.from_pretrained(job["folder"], dtype=torch.float32)
model.train()
decay = {"weight_decay": job["decay"], "betas": (0.9, job["b2"])}
optimizer = torch.optim.AdamW(model.parameters(), job["rate"], **decay)
rows = torch.from_numpy(np.load(job["rows"])).long()
seconds, losses = [], []
for tokens in rows:
    begun = time.perf_counter()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=job["dtype"] == "bfloat16"):
        loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), job["clip"])
    optimizer.step()
    losses.append(loss.item())
    seconds.append(time.perf_counter() - begun)
print(json.dumps({"seconds": seconds, "losses": losses}))
"""


def random_rows(vocab: int, steps: int, rows: int, row: int) -> np.ndarray:
    """Tokens [steps, rows, row + 1]."""
    shape = steps, rows, row + 1
    return np.random.default_rng(0).integers(2, vocab, shape).astype(np.int32)


class Ours:
    """The library's step from the model's weights."""

    def __init__(self, name: str, rows_NRT: np.ndarray):
        recipe, loaded = recipe_of(name), load_model(name, dtype="float32")
        mesh = make_mesh()
        on_cpu = mesh.devices.flat[0].platform == "cpu"
        model = make_model(recipe.config, "float32").clone(unroll=on_cpu)
        step = StepConfig(model, "full", None, loss_chunk=recipe.chunk)
        optimizer = OptimizerConfig(AdamW(b2=recipe.b2), recipe.weight_decay, recipe.clip)
        opt_state = make_optimizer(optimizer).init(loaded.weights)
        self.state = loaded.weights, set_rate(opt_state, np.float32(RATE))
        pieces = objectives.Pieces(
            rows_NRT.reshape(-1, rows_NRT.shape[-1]),
            functools.partial(objectives.causal, eos=0),
            rows=recipe.rows,
            each=1,
            seed=0,
            text=recipe.row,
        )
        self.batches = [put_batch(mesh, pieces[n]) for n in range(len(rows_NRT))]
        self.step = compile_step(step, optimizer, mesh, (*self.state, {}, self.batches[0], None))
        self.flops = step_flops(recipe, pieces)

    def run(self) -> dict[str, Any]:
        """Takes a step of each batch; the state goes on from run to run."""
        seconds, losses = [], []
        for batch in self.batches:
            begun = time.perf_counter()
            delta, opt_state, metrics = self.step(*self.state, {}, batch, None)
            self.state = delta, opt_state
            losses.append(float(metrics["loss"]))
            jax.block_until_ready(self.state)
            seconds.append(time.perf_counter() - begun)
        return {"seconds": seconds, "losses": losses}


def theirs(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """Runs PyTorch's side in a process of its own."""
    command = [python, "-c", THEIRS, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"PyTorch's process failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Prints seconds a step of each side, their ratio, and the share of the products' rate."""
    parser = argparse.ArgumentParser(description="How fast is pretraining?")
    parser.add_argument("--model", default="ladder/d3")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    said = parser.parse_args()
    recipe = recipe_of(said.model)
    rows_NRT = random_rows(recipe.config.vocab, said.steps, recipe.rows, recipe.row)
    parameters = sum(int(np.prod(shape)) for shape in leaf_shapes(recipe.config).values())
    print(f"{said.model}: {parameters:,} parameters, {recipe.rows} rows of {recipe.row} tokens")
    ours = Ours(said.model, rows_NRT)
    medians: dict[str, list[float]] = {"here": [], "float32": [], "bfloat16": []}
    with tempfile.TemporaryDirectory() as folder:
        np.save(file := Path(folder) / "rows.npy", rows_NRT)
        job = {
            "folder": str(model_folder(said.model)),
            "rows": str(file),
            "threads": os.cpu_count(),
            "rate": RATE,
            "decay": recipe.weight_decay,
            "b2": recipe.b2,
            "clip": recipe.clip,
        }
        for _ in range(said.turns):
            found = {"here": ours.run()}
            for dtype in ("float32", "bfloat16"):
                found[dtype] = theirs(said.torch_python, job | {"dtype": dtype})
            for name, one in found.items():
                medians[name].append(statistics.median(one["seconds"][1:]))
                print(f"{name}: {medians[name][-1]:.3f} s, first loss {one['losses'][0]:.5f}")
    middle = {name: statistics.median(some) for name, some in medians.items()}
    quicker = min(("float32", "bfloat16"), key=lambda name: middle[name])
    share = ours.flops / middle["here"] / (machine_flops("float32") or float("nan"))
    print(f"PyTorch in {quicker} takes {middle[quicker] / middle['here']:.2f} times as long")
    print(f"share of the products' rate here: {share:.2f}")


if __name__ == "__main__":
    main()
