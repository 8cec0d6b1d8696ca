"""The store, in a folder and in a bucket of an emulator."""

import os
import threading
from pathlib import Path

import pytest
from etils import epath

from softprompt.trials.engine import store as stores
from softprompt.trials.engine.store import FolderStore, StoreError, open_store
from tests.engine.emulator import BUCKET, emulator


@pytest.fixture(scope="module", params=["folder", "bucket"])
def workdir(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    if request.param == "folder":
        yield str(folder / "w")
        return
    with pytest.MonkeyPatch.context() as patch, emulator(folder, patch):
        yield f"gs://{BUCKET}/w"


def test_a_file_is_written_read_listed_and_deleted(workdir):
    """Mutations: a listing has the folder's neighbours; a version that stays after a write."""
    store = open_store(workdir)
    assert (store.list("queue"), store.read("queue/a/b")) == ({}, None)
    store.write("queue/a/b", b"1")
    store.write("queues", b"")
    first = store.list("queue")
    assert list(first) == ["queue/a/b"] and store.read("queue/a/b") == b"1"
    store.write("queue/a/b", b"2")
    assert store.list("queue").keys() == first.keys()
    assert store.list("queue") != first and store.read("queue/a/b") == b"2"
    for _ in range(2):
        store.delete("queue/a/b")
    assert store.list("queue") == {}


def test_a_listing_is_never_older_than_the_other_writers_files(workdir):
    """Mutation: gcsfs's cache of listings, on by default, in the store or in `epath`."""
    mine, theirs = open_store(workdir), open_store(workdir)
    mine.write("cached/a", b"")
    path = epath.Path(workdir) / "cached"
    assert list(mine.list("cached")) == ["cached/a"]
    assert [one.name for one in path.iterdir()] == ["a"]
    theirs.write("cached/b", b"")
    assert sorted(mine.list("cached")) == ["cached/a", "cached/b"]
    assert sorted(one.name for one in path.iterdir()) == ["a", "b"]


def test_of_eight_writers_one_creates_a_file(workdir):
    """Mutation: in a folder `os.replace`, in a bucket an upload without its condition."""
    made = [open_store(workdir) for _ in range(8)]
    barrier, races = threading.Barrier(8), 40
    won: list[list[bool]] = [[] for _ in made]

    def write(number: int) -> None:
        for race in range(races):
            barrier.wait()
            content = f"{number} {race}".encode()
            won[number].append(made[number].create(f"races/{race}", content))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for race, winners in enumerate(zip(*won, strict=True)):
        assert sum(winners) == 1
        assert made[0].read(f"races/{race}") == f"{winners.index(True)} {race}".encode()


def test_a_create_whose_answer_was_lost_is_settled_by_reading(workdir, monkeypatch):
    """Mutation: any error of a create means that another writer was first."""
    store = open_store(workdir)
    if workdir.startswith("gs://"):
        real = store._fs.pipe_file

        def lossy(*words, **more):
            real(*words, **more)
            raise OSError("connection reset")

        monkeypatch.setattr(store._fs, "pipe_file", lossy)
    else:
        link = os.link

        def lossy_link(*words):
            link(*words)
            raise FileExistsError("retried by the file system")

        monkeypatch.setattr(os, "link", lossy_link)
    assert store.create("lost/a", b"mine")
    assert not store.create("lost/a", b"another's")


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch):
    """Mutation: create opens the final name exclusively, and is killed before it has written."""

    class Killed(BaseException):
        pass

    def stop(self, content):
        self.touch()
        raise Killed

    store = FolderStore(str(tmp_path))
    for act in (store.create, store.write):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "write_bytes", stop)
            act("queue/claims/a.1", b"whole")
        assert store.read("queue/claims/a.1") is None and store.list("queue") == {}


def test_a_store_that_cannot_be_written_is_one_line(tmp_path):
    """Mutation: the system's error passes."""
    (tmp_path / "queue").write_text("")
    with pytest.raises(StoreError, match="cannot write .*/queue/a"):
        FolderStore(str(tmp_path)).write("queue/a", b"")
    assert stores.StoreError.__mro__[1].__name__ == "UserError"
