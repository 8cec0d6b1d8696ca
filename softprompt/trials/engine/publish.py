"""Moves a trial between local scratch and the results store.

During training, a trial's newest complete checkpoint and its other files are uploaded as one tar
file, a publication. A trial that trains in the store itself uploads nothing: its publication is an
empty file. At the end its files are copied one by one, result.json last.
"""

import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from softprompt.files import write_bytes
from softprompt.trials.engine.store import Store

CHECKPOINTS, DELTA, RESULT = "checkpoints", "delta.safetensors", "result.json"
WHOLE = "commit_success.txt"  # the file that Orbax writes last into a checkpoint's folder


def newest_step(folder: epath.PathLike) -> int:
    """The step of a trial's newest whole checkpoint; 0 if there is none."""
    root = epath.Path(folder) / CHECKPOINTS
    there = root.iterdir() if root.is_dir() else ()
    whole = [path.name for path in there if path.name.isdigit() and (path / WHOLE).exists()]
    return max(map(int, whole), default=0)


def pack(folder: Path) -> bytes:
    """Returns a trial's files as a tar file, with the newest checkpoint only."""
    while True:
        step, buffer = newest_step(folder), io.BytesIO()
        try:
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for path in [*_files(folder), folder / CHECKPOINTS / str(step)]:
                    if path.exists():
                        tar.add(path, path.relative_to(folder))
            return buffer.getvalue()
        except FileNotFoundError:  # a newer checkpoint has replaced it
            continue


def bring_to_scratch(store: Store, publication: str, name: str, folder: Path) -> None:
    """Replaces a trial's folder by a published one, unless its own checkpoint is as new.

    Args:
        store: the sweep's.
        publication: the name of the publication in it.
        name: of the trial's folder in it.
        folder: of the trial in scratch.
    """
    content = store.read(publication)
    temporary = folder.parent / f".{folder.name}.unpacked"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    if content:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(temporary, filter="data")
    elif content is not None:
        for file in _newest_files(list(store.list(name)), name):
            write_bytes(temporary / file, store.read(f"{name}/{file}") or b"")
    if newest_step(temporary) > newest_step(folder):
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    else:
        shutil.rmtree(temporary)


def bring_to_store(store: Store, publication: str, name: str) -> None:
    """Writes a published trial into its folder in the store, unless the checkpoint there is as new.

    For the arguments see `bring_to_scratch`.
    """
    content = store.read(publication)
    if not content:
        return
    there = max(map(_whole_step, store.list(name)), default=0)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        files = [member for member in tar.getmembers() if member.isfile()]
        if max((_step(f"{name}/{file.name}") for file in files), default=0) > there:
            for file in sorted(files, key=lambda file: file.name.endswith(WHOLE)):
                source = tar.extractfile(file)
                assert source is not None, f"{file.name} is a file"
                store.write(f"{name}/{file.name}", source.read())


def _step(name: str) -> int:
    """The step of the checkpoint of which NAME/checkpoints/STEP/... is a file, else 0."""
    parts = name.split("/")
    step = parts[2] if len(parts) > 3 and parts[1] == CHECKPOINTS else ""
    return int(step) if step.isdigit() else 0


def _whole_step(name: str) -> int:
    """The step of the checkpoint of which NAME/checkpoints/STEP/... is the last file, else 0."""
    return _step(name) if name.split("/")[3:] == [WHOLE] else 0


def _newest_files(names: Sequence[str], folder: str) -> list[str]:
    """The files of a trial's folder in the store, of its checkpoints the newest whole one's."""
    newest = max(map(_whole_step, names), default=0)
    files = [n for n in names if f"/{CHECKPOINTS}/" not in n or 0 < _step(n) == newest]
    return [name.removeprefix(f"{folder}/") for name in files]


def fetch_start(store: Store, name: str, to: Path) -> None:
    """Copies what a trial reads of the trial in the folder `name`, to start from its prompt."""
    for file in (DELTA, RESULT):
        content = store.read(f"{name}/{file}")
        if content is not None:
            write_bytes(to / name / file, content)


def publish_files(store: Store, folder: Path, name: str) -> None:
    """Copies a trial's files, without checkpoints and result.json, into its folder `name`."""
    for path in _files(folder):
        if path.name != RESULT:
            store.write(f"{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())


def publish_row(store: Store, folder: epath.PathLike, name: str, facts: Mapping[str, Any]) -> None:
    """Copies a trial's result.json with these facts, unless the store has one that is done."""
    there = store.read(f"{name}/{RESULT}")
    row = json.loads((epath.Path(folder) / RESULT).read_text())
    if there is None or json.loads(there)["status"] != "done" or json.loads(there) == row:
        row |= dict(facts)
        store.write(f"{name}/{RESULT}", (json.dumps(row, indent=2) + "\n").encode())


def _files(folder: Path) -> Iterator[Path]:
    """The files below a trial's folder, without checkpoints and temporary ones."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and parts[0] != CHECKPOINTS and path.is_file():
            yield path
