"""The results store of a sweep: a folder, or a bucket's folder at gs://.

Names are relative paths with "/". Every write is whole: a reader finds the old content or the new
one. Listings are never cached.
"""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from softprompt.errors import UserError, one_line
from softprompt.files import check_writable


class Store(Protocol):
    """What a store does. Every method raises `StoreError` if the store cannot be reached."""

    def list(self, prefix: str) -> dict[str, str]:
        """Returns the names below a folder, each with a text that changes with every write."""

    def read(self, name: str) -> bytes | None:
        """Returns a file's content; None if there is no such file."""

    def write(self, name: str, content: bytes) -> None:
        """Writes a file, or replaces it."""

    def create(self, name: str, content: bytes) -> bool:
        """Writes a file unless there is one, and returns whether it wrote it.

        If the answer of a write was lost, the file is read: it is ours if it has our content.
        Contents of different writers must therefore differ, by a random token.
        """

    def delete(self, name: str) -> None:
        """Deletes a file; nothing happens if there is none."""


class StoreError(UserError):
    """A store cannot be read or written."""


def open_store(workdir: os.PathLike[str] | str) -> Store:
    """Returns the store of a sweep's folder, local or gs://.

    Raises:
        UserError: it cannot be written to, or gcsfs is not installed.
    """
    check_writable(workdir)
    path = os.fspath(workdir)
    return BucketStore(path) if "://" in path else FolderStore(path)


class FolderStore:
    """A store in a folder, which several hosts may mount."""

    def __init__(self, folder: str) -> None:
        self._root = Path(folder).absolute()

    def list(self, prefix: str) -> dict[str, str]:
        """See `Store`."""
        found: dict[str, str] = {}
        with self._errors("list", prefix):
            self._scan(prefix, found)
        return found

    def _scan(self, folder: str, found: dict[str, str]) -> None:
        """Adds the files below a folder; hidden ones are temporary."""
        try:
            entries = list(os.scandir(self._root / folder))
        except FileNotFoundError:
            return
        for entry in entries:
            name = f"{folder}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                self._scan(name, found)
                continue
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                facts = os.stat(entry.path)
                found[name] = f"{facts.st_mtime_ns}-{facts.st_ino}"

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        with self._errors("read", name):
            try:
                return (self._root / name).read_bytes()
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """See `Store`."""
        with self._errors("write", name), self._temporary(name, content) as temporary:
            os.replace(temporary, self._root / name)

    def create(self, name: str, content: bytes) -> bool:
        """See `Store`. A finished temporary file gets a second name, which must be new."""
        with self._errors("create", name), self._temporary(name, content) as temporary:
            try:
                os.link(temporary, self._root / name)
            except FileExistsError:
                return self.read(name) == content
        return True

    def delete(self, name: str) -> None:
        """See `Store`."""
        with self._errors("delete", name):
            (self._root / name).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, name: str, content: bytes) -> Iterator[Path]:
        """A hidden file with this content, beside the one that it becomes."""
        file = self._root / name
        temporary = file.parent / f".{file.name}.{secrets.token_hex(8)}.tmp"
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            yield temporary
        finally:
            temporary.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(f"cannot {what} {self._root / name}: {error.strerror}") from error


class BucketStore:
    """A store in a bucket of Google Cloud Storage, or of the emulator that gcsfs is pointed to."""

    def __init__(self, url: str) -> None:
        from gcsfs.core import GCSFileSystem  # slow to import, and only in the extra gcs

        # The class of gcsfs.core: the other one first asks what kind of bucket it is.
        self._fs = GCSFileSystem(use_listings_cache=False, requests_timeout=60)
        self._root = url.partition("://")[2].rstrip("/")

    def list(self, prefix: str) -> dict[str, str]:
        """See `Store`."""
        with self._errors("list", prefix):
            bucket, _, folder = f"{self._root}/{prefix}/".partition("/")
            found = self._fs.find(bucket, prefix=folder, detail=True, update_cache=False)
        return {
            name.removeprefix(f"{self._root}/"): f"{facts['generation']} {facts['updated']}"
            for name, facts in found.items()
        }

    def read(self, name: str) -> bytes | None:
        """See `Store`."""
        with self._errors("read", name):
            try:
                content: bytes = self._fs.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, content: bytes) -> None:
        """See `Store`."""
        with self._errors("write", name):
            self._fs.pipe_file(f"{self._root}/{name}", content)

    def create(self, name: str, content: bytes) -> bool:
        """See `Store`. The upload has the condition that the object's generation is 0."""
        with self._errors("create", name):
            try:
                self._fs.pipe_file(f"{self._root}/{name}", content, mode="create")
            except Exception as error:  # also after a retry of a write whose answer was lost
                found = self.read(name)
                if found is None:
                    raise error
                return found == content
        return True

    def delete(self, name: str) -> None:
        """See `Store`."""
        with self._errors("delete", name), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def _errors(self, what: str, name: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except Exception as error:  # of gcsfs, aiohttp, google.auth and others
            reason = one_line(error)
            raise StoreError(f"cannot {what} gs://{self._root}/{name}: {reason}") from error
