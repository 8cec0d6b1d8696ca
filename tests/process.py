"""One process of several that train one trial together, by the command line.

Arguments: its devices, the trial's folder, and those of `softprompt train`. Prints the files below
the trial's folder that the process opened to write, moved or removed, checkpoints left out (orbax
lets every process write its shards), and what the processes agree on where only the first says yes.
"""

import json
import os
import sys
from typing import Any

import jax

from softprompt import cli
from softprompt.distributed import agreed

FILE_EVENTS = ("os.rename", "os.remove", "os.mkdir")


def watch_writes(folder: str) -> set[str]:
    """The set that every write below a folder is put into from now on."""
    written: set[str] = set()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(path, str | os.PathLike) and flags & (os.O_WRONLY | os.O_RDWR)
        else:
            path, writes = arguments[0] if arguments else None, event in FILE_EVENTS
        if writes and os.fspath(path).startswith(f"{folder}/"):
            written.add(os.path.relpath(os.fspath(path), folder).split("/")[0])

    sys.addaudithook(hook)
    return written


def main() -> None:
    devices, folder, *arguments = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices))
    jax.config.update("jax_default_matmul_precision", "highest")
    written = watch_writes(folder)
    code = cli.main(["train", "--workdir", folder, *arguments])
    first = agreed(jax.process_index() == 0)
    print(json.dumps({"written": sorted(written - {"checkpoints"}), "agreed": first}))
    sys.exit(code)


if __name__ == "__main__":
    main()
