"""The code itself: its commit, and an archive of it for other machines."""

import functools
import gzip
import io
import subprocess
import tarfile
from pathlib import Path

from softprompt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "softprompt/COMMIT"  # in an archive, which is no git repository


def commit_now() -> str:
    """Returns the repository's commit, plus "-dirty" if files differ; "unknown" outside git.

    Code from an archive has the commit of the archive.
    """
    if (ROOT / COMMIT).exists():
        return (ROOT / COMMIT).read_text().strip()
    try:
        if Path(_git("rev-parse", "--show-toplevel").decode().strip()).resolve() != ROOT:
            return "unknown"
        dirty = _git("status", "--porcelain", "--untracked-files=no").strip()
        return _git("rev-parse", "HEAD").decode().strip() + ("-dirty" if dirty else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


commit = functools.cache(commit_now)  # as it was at the first call in the process


def is_clean(commit: str) -> bool:
    """Whether a commit says everything about the code."""
    return commit != "unknown" and not commit.endswith("-dirty")


def archive(commit: str) -> bytes:
    """Returns the files of a clean commit and its name, as a .tar.gz.

    Raises:
        UserError: the code is not a clone of the repository.
    """
    try:
        buffer = io.BytesIO(_git("archive", "--format=tar", commit))
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"{ROOT} is not a clone that has commit {commit}; plan the sweep in one"
        ) from error
    with tarfile.open(fileobj=buffer, mode="a") as tar:
        name = tarfile.TarInfo(COMMIT)
        name.size = len(commit)
        tar.addfile(name, io.BytesIO(commit.encode()))
    return gzip.compress(buffer.getvalue(), mtime=0)


def _git(*command: str) -> bytes:
    """The output of a git command in the repository."""
    return subprocess.run(
        ["git", "-C", str(ROOT), *command], capture_output=True, check=True, timeout=30
    ).stdout
