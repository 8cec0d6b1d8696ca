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


def anonymous(process: int) -> int:
    """Bytes of a process's anonymous memory."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(status.split("RssAnon:")[1].split()[0])


def measure(folder: Path, *, dtype: str, shards: int = 1) -> dict[str, float]:
    """Loads a folder in a process of its own.

    Args:
        folder: a name for `load_model`.
        dtype: of the weights.
        shards: CPU devices that each leaf is split over.

    Returns:
        In MB: `peak` above what the process held once all was imported, `final` size of the
        weights, `largest` of their leaves; `seconds` of the load.
    """
    command = [sys.executable, "-m", "tests.models.memory", str(folder), dtype, str(shards)]
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


def child(folder: str, dtype: str, shards: int) -> None:
    """Imports, says so, waits, loads, says what it holds, waits."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", shards)
    import functools

    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    from softprompt.models.loading import load_model
    from softprompt.training.sharding import make_mesh, put_weight

    put = functools.partial(put_weight, make_mesh(1, shards))
    put("layers/attn/q/kernel", jax.numpy.zeros((1, 8, 8, 8)))
    print("ready", flush=True)
    sys.stdin.readline()
    sizes = [
        x.nbytes / MB for x in jax.tree.leaves(load_model(folder, dtype=dtype, put=put).weights)
    ]
    print(json.dumps({"final": sum(sizes), "largest": max(sizes)}), flush=True)
    sys.stdin.readline()


def write_smollm2(folder: Path) -> Path:
    """The real SmolLM2-135M as sharded safetensors."""
    from softprompt.models.loading import load_model
    from softprompt.models.save import save_folder

    loaded = load_model("smollm2-135m-instruct-q4", dtype="bfloat16")
    parts = loaded.config, loaded.weights, loaded.tokenizer
    return save_folder(folder, *parts, shard_bytes=100_000_000)


def write_llama_1b(folder: Path) -> Path:
    """Random weights in the sizes of Llama 3.2 1B, as sharded safetensors in bfloat16."""
    import ml_dtypes
    import numpy as np
    from flax.traverse_util import unflatten_dict

    from softprompt.models.decoder import DecoderConfig
    from softprompt.models.families.llama import table
    from softprompt.models.loading import load_model
    from softprompt.models.save import save_folder

    heads = {"heads": 32, "kv_heads": 8, "head_size": 64}
    sizes = {"vocab": 128256, "width": 2048, "layers": 16, "ffn": 8192, "context_length": 131072}
    config = DecoderConfig(**sizes, **heads, rope_base=5e5)
    rng = np.random.default_rng(0)
    leaves = {
        path: (rng.random(part.shape, np.float32) - 0.5).astype(ml_dtypes.bfloat16)
        for path, part in table(config).items()
    }
    text = load_model("smollm2-135m-instruct-q4", dtype="bfloat16").tokenizer
    return save_folder(folder, config, unflatten_dict(leaves, sep="/"), text, shard_bytes=10**9)


def main() -> None:
    """Prints a line for each model, dtype and number of shards."""
    with tempfile.TemporaryDirectory() as place:
        for write in (write_smollm2, write_llama_1b):
            folder = write(Path(place) / write.__name__)
            for dtype, shards in (("bfloat16", 1), ("float32", 1), ("float32", 2)):
                found = measure(folder, dtype=dtype, shards=shards)
                allowed = found["final"] + found["largest"] + 200
                print(
                    f"{write.__name__.removeprefix('write_')} {dtype} on {shards}: "
                    + ", ".join(f"{key} {value:.0f}" for key, value in found.items())
                    + f"; allowed {allowed:.0f}"
                )
                assert found["peak"] <= allowed


if __name__ == "__main__":
    child(sys.argv[1], sys.argv[2], int(sys.argv[3])) if len(sys.argv) == 4 else main()
