"""A trial's way between scratch and the store."""

import pytest

from softprompt.trials.engine.publish import (
    WHOLE,
    bring_to_scratch,
    bring_to_store,
    newest_step,
    pack,
)
from softprompt.trials.engine.store import open_store

SAVED = "queue/saved/a.1"


def write(folder, *steps):
    """A trial's folder with checkpoints after these steps, and two that are not whole."""
    for step in (*steps, "900.tmp", 901):  # as written to a disk, and to a bucket
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
        (folder / "checkpoints" / str(step) / "state").write_text(str(step))
        if step in steps:
            (folder / "checkpoints" / str(step) / WHOLE).write_text("")
    (folder / "metrics.jsonl").write_text(f"{steps}\n")
    return folder


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("packed", [True, False])
def test_a_publication_replaces_an_older_trial_in_scratch(tmp_path, packed):
    """Mutations: a trial that runs in the store starts anew on a worker; older checkpoints travel
    too, or unfinished ones; what is in scratch is replaced though it is newer."""
    store, scratch = open_store(tmp_path / "store"), tmp_path / "scratch"
    published = write(tmp_path / ("other" if packed else "store/t"), 5, 9)
    store.write(SAVED, pack(published) if packed else b"")
    for ours, expected in [((), 9), ((7,), 9), ((11,), 11)]:
        folder = write(scratch / f"{ours}", *ours)
        bring_to_scratch(store, SAVED, "t", folder)
        assert newest_step(folder) == expected
        if expected == 9:
            assert files(folder) == [
                f"checkpoints/9/{WHOLE}",
                "checkpoints/9/state",
                "metrics.jsonl",
            ]
    assert len(list(scratch.iterdir())) == 3, "no temporary folder is left"
    bring_to_scratch(store, "queue/saved/gone", "t", scratch / "new")
    assert newest_step(scratch / "new") == 0


def test_a_publication_replaces_an_older_trial_in_the_store(tmp_path):
    """Mutations: a plain sweep, or several hosts, start a worker's trial anew; a checkpoint in the
    store is replaced by an older one."""
    store = open_store(tmp_path / "store")
    store.write(SAVED, pack(write(tmp_path / "other", 9)))
    for name, ours, expected in [("new", (), 9), ("old", (7,), 9), ("newer", (11,), 11)]:
        folder = write(tmp_path / "store" / name, *ours)
        bring_to_store(store, SAVED, name)
        assert newest_step(folder) == expected
        log = (folder / "metrics.jsonl").read_text()
        assert log == ("(9,)\n" if expected == 9 else "(11,)\n")
    store.write(SAVED, b"")
    bring_to_store(store, SAVED, "empty")
    assert not (tmp_path / "store/empty").exists()
