"""One process of several that train one trial together: what a user's own launch script does.

Arguments: process id, number of processes, port, devices of each, trial's folder, config as JSON.
Prints the files below the trial's folder that the process opened to write, moved or removed,
checkpoints left out (orbax lets every process write its shards).
"""

import json
import os
import sys
from typing import Any

import jax

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
    number, count, port, devices = map(int, sys.argv[1:5])
    folder, config = sys.argv[5:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_default_matmul_precision", "highest")
    jax.distributed.initialize(f"localhost:{port}", num_processes=count, process_id=number)
    written = watch_writes(folder)
    from softprompt.config import from_dict
    from softprompt.progress import Progress
    from softprompt.training.session import Session
    from softprompt.training.trial import run_trial

    with Progress() as progress:
        run_trial(from_dict(json.loads(config)), folder, session=Session(progress))
    print(json.dumps(sorted(written - {"checkpoints"})))


if __name__ == "__main__":
    main()
