"""Compiled programs: kept in a folder of the host, and shared with other hosts through the store.

    programs/KIND/NAME   a program; NAME is its file's in JAX's compilation cache, a hash of the
                         program, of what compiled it and how

KIND says the version of JAX and the devices. Programs for a CPU run on processors with the same
features only, which are part of it.

Source: https://docs.jax.dev/en/latest/persistent_compilation_cache.html
"""

import hashlib
import os
import platform
import time
from pathlib import Path

from softprompt.files import write_bytes
from softprompt.trials.engine.store import Store

CACHE = "JAX_COMPILATION_CACHE_DIR"
SUFFIX = "-cache"
WRITTEN = 2.0  # seconds since the last write of a file that JAX has written whole
MOST_BYTES = 2**28  # of a program that is shared
MOST_PROGRAMS = 512  # of a kind in the store


class Programs:
    """The compiled programs of a sweep.

    A folder that the user has named in the environment is used as it is, and not shared.

    Args:
        store: the sweep's.
        scratch: a folder of this host.

    Attributes:
        kind: of the programs that this host can run; "" until it is known.
    """

    def __init__(self, store: Store, scratch: Path) -> None:
        self._store, self._folder, self.kind = store, scratch / "programs", ""
        self._own = CACHE in os.environ
        self._shared: set[str] = set()

    def environment(self) -> dict[str, str]:
        """The environment of a process that compiles."""
        return {} if self._own else {CACHE: str(self._folder)}

    def fetch(self) -> None:
        """Copies the programs that others have shared to this host."""
        if self._own or not self.kind:
            return
        self._look()
        for name in self._shared - {file.name for file in self._folder.glob(f"*{SUFFIX}")}:
            content = self._store.read(f"programs/{self.kind}/{name}")
            if content is not None:
                write_bytes(self._folder / name, content)

    def publish(self, *, idle: bool = False) -> None:
        """Shares the programs of this host that nobody has shared.

        Args:
            idle: nothing is being compiled, so no file is being written.
        """
        if self._own or not self.kind:
            return
        files = self._folder.glob(f"*{SUFFIX}")
        new = [file for file in files if file.name not in self._shared]
        new = [file for file in new if idle or _is_whole(file)]
        new = [file for file in new if file.stat().st_size <= MOST_BYTES]
        if new:
            self._look()
        for file in new:
            if file.name not in self._shared and len(self._shared) < MOST_PROGRAMS:
                self._store.create(f"programs/{self.kind}/{file.name}", file.read_bytes())
                self._shared.add(file.name)

    def forget_unfinished(self) -> None:
        """Deletes files that a dead process may have left incomplete; JAX never rewrites them."""
        for file in () if self._own else self._folder.glob(f"*{SUFFIX}"):
            if not _is_whole(file):
                file.unlink(missing_ok=True)

    def _look(self) -> None:
        """Finds out which programs are shared."""
        names = self._store.list(f"programs/{self.kind}")
        self._shared = {name.rpartition("/")[2] for name in names}


def _is_whole(file: Path) -> bool:
    """Whether JAX, which writes a file in pieces, has finished it."""
    return time.time() - file.stat().st_mtime >= WRITTEN


def kind_of_programs() -> str:
    """The kind of the programs that this process compiles. Opens JAX's devices."""
    import jax

    backend, device = jax.default_backend(), jax.devices()[0].device_kind
    features = _processor() if backend == "cpu" else ""
    digest = hashlib.sha256(f"{device} {features}".encode()).hexdigest()[:10]
    return f"jax-{jax.__version__}-{backend}-{digest}"


def _processor() -> str:
    """What a processor can do, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    said = [line for line in lines if line.lower().startswith(("flags", "features"))]
    return f"{platform.machine()} {said[0] if said else ''}"
