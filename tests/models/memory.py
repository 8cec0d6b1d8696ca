"""Peak memory of loading a model, measured from outside; numbers go into experiments/LOG.md.

    python -m tests.models.memory            SmolLM2-135M, and a random Llama of 1.24 billion

Only anonymous memory counts (RssAnon of Linux): pages of a mapped file are the kernel's to drop.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MB = 1e6
SLACK = 200  # of what is neither weights nor a leaf, in MB
SMOLLM2 = "smollm2-135m-instruct-q4"
TENSORS = 30  # in a file of the random Llama


def anonymous(process: int) -> int:
    """Bytes of a process's anonymous memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(model: str, *, dtype: str, shards: int = 1) -> dict[str, float]:
    """Loads a model in a process of its own.

    Args:
        model: a name for `load_model`.
        dtype: of the weights.
        shards: CPU devices that each leaf is split over.

    Returns:
        In MB: `peak` above what the process held once all was imported, `final` size of the
        weights, `largest` of their leaves; `seconds` of the load.
    """
    command = [sys.executable, "-m", "tests.models.memory", model, dtype, str(shards)]
    child = subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdin and child.stdout
    assert child.stdout.readline() == "ready\n"
    before = peak = anonymous(child.pid)
    started = time.monotonic()
    child.stdin.write("\n")
    child.stdin.flush()
    os.set_blocking(child.stdout.fileno(), False)
    while not (line := child.stdout.readline()):
        assert child.poll() is None, "the load failed"
        peak = max(peak, anonymous(child.pid))
        time.sleep(0.002)
    seconds = time.monotonic() - started
    child.communicate("\n")
    return {"peak": (peak - before) / MB, "seconds": seconds, **json.loads(line)}


def child(model: str, dtype: str, shards: int) -> None:
    """Imports, says so, waits, loads, says what it holds, waits."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", shards)
    import functools

    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that PyTorch is absent
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    from softprompt.pretrained.loading import load_model
    from softprompt.training.sharding import make_mesh, put_weight

    put = functools.partial(put_weight, make_mesh(1, shards))
    put("layers/attn/q/kernel", jax.numpy.zeros((1, 8, 8, 8)))
    print("ready", flush=True)
    sys.stdin.readline()
    sizes = [
        x.nbytes / MB for x in jax.tree.leaves(load_model(model, dtype=dtype, put=put).weights)
    ]
    print(json.dumps({"final": sum(sizes), "largest": max(sizes)}), flush=True)
    sys.stdin.readline()


def write_smollm2(folder: Path) -> Path:
    """The real SmolLM2-135M as sharded safetensors."""
    from softprompt.pretrained.loading import load_model
    from softprompt.pretrained.save import save_folder

    loaded = load_model(SMOLLM2, dtype="bfloat16")
    parts = loaded.config, loaded.weights, loaded.tokenizer
    return save_folder(folder, *parts, shard_bytes=100_000_000)


def write_llama_1b(folder: Path) -> Path:
    """Random weights in the sizes of Llama 3.2 1B, in bfloat16, one safetensors file at a time."""
    import ml_dtypes
    import numpy as np
    from safetensors.numpy import save_file

    from softprompt.models.decoder import DecoderConfig
    from softprompt.pretrained.families.llama import LLAMA, table
    from softprompt.pretrained.name_tables import tensor_names
    from tests.tiny import tiny_config, write_tokenizer

    heads = {"heads": 32, "kv_heads": 8, "head_size": 64}
    sizes = {"vocab": 128256, "width": 2048, "layers": 16, "ffn": 8192, "context_length": 131072}
    config = DecoderConfig(**sizes, **heads, rope_base=5e5)
    shapes = {name: part.source for part in table(config).values() for name in tensor_names(part)}
    rng, names, where = np.random.default_rng(0), list(shapes), {}
    folder.mkdir()
    for first in range(0, len(names), TENSORS):
        file = f"model-{first:05}.safetensors"
        tensors = {
            name: (rng.random(shapes[name], np.float32) - 0.5).astype(ml_dtypes.bfloat16)
            for name in names[first : first + TENSORS]
        }
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    raw = {"architectures": ["LlamaForCausalLM"], **LLAMA.raw(config)}
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder, tiny_config())
    return folder


def main() -> None:
    """Prints a line for each model, dtype and number of devices."""
    with tempfile.TemporaryDirectory() as place:
        report("SmolLM2-135M, GGUF", SMOLLM2)
        report("SmolLM2-135M, safetensors", str(write_smollm2(Path(place) / "smollm2")))
        report("Llama 1B, safetensors", str(write_llama_1b(Path(place) / "llama")))


def report(title: str, model: str) -> None:
    """Prints what loading a model takes, and raises where that is more than allowed."""
    for dtype, shards in (("bfloat16", 1), ("float32", 1), ("float32", 2)):
        found = measure(model, dtype=dtype, shards=shards)
        allowed = found["final"] + found["largest"] + SLACK
        said = ", ".join(f"{key} {value:.0f}" for key, value in found.items())
        print(f"{title}, {dtype} on {shards}: {said}; allowed {allowed:.0f}", flush=True)
        assert found["peak"] <= allowed


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3])) if len(sys.argv) == 4 else main()
