"""Compiled programs that hosts share, without compiling."""

import os
import time

from softprompt.trials.engine import compiled
from softprompt.trials.engine.compiled import Programs
from softprompt.trials.engine.store import open_store


def host(tmp_path, name, kind="tpu"):
    """The programs of a host, and their folder."""
    programs = Programs(open_store(tmp_path / "store"), tmp_path / name)
    programs.kind = kind
    (tmp_path / name / "programs").mkdir(parents=True)
    return programs, tmp_path / name / "programs"


def write(folder, name, content=b"", age=60.0):
    (folder / name).write_bytes(content)
    os.utime(folder / name, (time.time() - age,) * 2)


def test_what_one_host_compiles_the_others_take(tmp_path, monkeypatch):
    """Mutations: a file that JAX is writing is shared, or kept when its process has died; a program
    of other devices is taken; there is no limit."""
    (one, left), (two, right), (other, elsewhere) = (
        host(tmp_path, name, kind) for name, kind in (("a", "tpu"), ("b", "tpu"), ("c", "cpu"))
    )
    write(left, "step-cache", b"program")
    write(left, "step-atime")
    write(left, "young-cache", age=0.0)
    one.publish()
    one.forget_unfinished()
    assert {file.name for file in left.iterdir()} == {"step-cache", "step-atime"}
    two.fetch()
    other.fetch()
    assert {file.name: file.read_bytes() for file in right.iterdir()} == {"step-cache": b"program"}
    assert not list(elsewhere.iterdir())
    write(right, "young-cache", b"whole")
    write(right, "step-cache", b"not looked at")
    monkeypatch.setattr(compiled, "MOST_PROGRAMS", 2)
    write(right, "zero-cache")
    two.publish()
    one.fetch()
    assert len(open_store(tmp_path / "store").list("programs")) == 2
    assert (left / "step-cache").read_bytes() == b"program"


def test_a_host_that_compiles_nothing_shares_its_newest(tmp_path):
    """A trial may end soon after its step was compiled. Mutation: its age decides then too."""
    programs, folder = host(tmp_path, "a")
    write(folder, "young-cache", age=0.0)
    programs.publish()
    assert not open_store(tmp_path / "store").list("programs")
    programs.publish(idle=True)
    assert len(open_store(tmp_path / "store").list("programs")) == 1


def test_a_folder_of_the_users_is_left_alone(tmp_path, monkeypatch):
    """Mutation: the worker's own folder replaces it."""
    assert host(tmp_path, "a")[0].environment() == {compiled.CACHE: str(tmp_path / "a/programs")}
    monkeypatch.setenv(compiled.CACHE, "/theirs")
    programs, folder = host(tmp_path, "b")
    write(folder, "step-cache")
    programs.publish()
    assert programs.environment() == {}
    assert not open_store(tmp_path / "store").list("programs")
