"""The whole study on tiny models and texts: every artefact trains, is measured and is drawn."""

import dataclasses
import json

import jax
import pytest

from experiments.paper import (
    continual,
    data_size,
    domain,
    everything,
    figure1,
    figure2,
    report,
    spot,
    steps,
    study,
    style,
    table2,
    table6,
)
from softprompt import cli
from softprompt.data.builtin_tasks import TASKS
from softprompt.pretrained.catalog import CATALOG
from softprompt.pretrained.ladder import PROVENANCE, RUNGS
from softprompt.results import read_rows
from tests.own_task import BAD, GOOD
from tests.test_docs import tiny_task
from tests.tiny import write_llama_folder
from tests.tiny_t5 import write_complete_t5

MODEL = study.SMOLLM2


FACTS = {
    "trained_tokens": 1000,
    "loss": 4.5,
    "peak_share": 0.5,
    "seconds": 60.0,
    "recipe_hash": "0" * 12,
    "corpus": {"digest": "1" * 16},
    "commit": "2" * 40,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which the study's models and tasks are tiny, with two seeds and few steps."""
    sizes = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "context": 1024}
    write_llama_folder(tmp_path / MODEL, **sizes)
    for name in (*RUNGS, *(f"ladder/t0@lm{share}" for share in (10, 50, 100))):
        write = write_complete_t5 if "/t" in name else write_llama_folder
        folder = write(tmp_path / "cache" / name, **({} if "/t" in name else sizes))
        (folder / PROVENANCE).write_text(json.dumps(FACTS))
    device = jax.devices()[:1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOFTPROMPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(jax, "devices", lambda: device)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    for name in (study.TASK, *study.SHIFTED, *continual.LATER):
        monkeypatch.setitem(TASKS, name, tiny_task(tmp_path / "data", TASKS[name]))
    for name in domain.SOURCES:
        monkeypatch.setitem(domain.SOURCES, name, tiny_texts(tmp_path / "data", name))
    addresses = tmp_path / "data" / "addresses.txt"
    addresses.write_text("We will make it a film. " * 200)
    monkeypatch.setattr(domain, "OTHER", str(addresses))
    monkeypatch.setattr(domain, "TEXTS", {domain.VERSES: "verses", str(addresses): "addresses"})
    monkeypatch.setattr(style, "OTHERS", (study.TASK,))
    monkeypatch.setattr(style, "COUNT", 4)
    for name in table2.OTHER:
        monkeypatch.setitem(TASKS, name, tiny_verses(tmp_path / "data", TASKS[name]))
    monkeypatch.setattr(study, "SEEDS", (0, 1))
    monkeypatch.setattr(study, "LADDER_STEPS", (4, 2))
    monkeypatch.setattr(study, "SMOLLM2_STEPS", (4, 2))
    monkeypatch.setattr(steps, "USUAL", 4)
    monkeypatch.setattr(steps, "MORE", 8)
    monkeypatch.setattr(data_size, "SIZES", (4, 8, 12))
    monkeypatch.setitem(figure1.MODELS, "full", ("ladder/d0", "ladder/d1", MODEL))
    monkeypatch.setattr(spot, "EXAMPLES", 6)
    monkeypatch.setattr(figure2, "COUNT", 12)
    monkeypatch.setattr(table6, "COUNT", 3)
    monkeypatch.setattr(table6, "LEAST", 3)
    return tmp_path


def tiny_verses(folder, task):
    """The same task over a few pairs of lines."""
    lines = [
        {"id": n, "sentence1": f"a {GOOD[n % 6]} film", "sentence2": BAD[n % 5], "label": label}
        for n, label in enumerate(("same", "different") * 10)
    ]
    for split in ("train", "validation", "test"):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{task.name}-{split}.jsonl").write_text(text)
    return dataclasses.replace(task, source=f"jsonl:{folder}/{task.name}-{{split}}.jsonl")


def tiny_texts(folder, name):
    """The source of a few texts that have a word of their own."""
    for split in ("train", "validation", "test"):
        lines = [{"text": f"{name} {one} {n}"} for n, one in enumerate((*GOOD, *BAD))]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / f"{name}-{split}.jsonl").write_text(text)
    return f"jsonl:{folder}/{name}-{{split}}.jsonl"


@pytest.mark.long
def test_the_study(place, monkeypatch, capsys):
    """Breaks when an artefact cannot train, finds none of its trials, or trains them again."""
    entry, size = CATALOG[MODEL], study.size
    monkeypatch.setattr(study, "size", lambda model: 1e8 if model == MODEL else size(model))
    command = ["sweep", "paper/everything", "--workdir", "runs"]
    with monkeypatch.context() as patch:
        patch.delitem(CATALOG, MODEL)  # so that the name is the folder's
        assert cli.main([*command, "--minutes", "0.001"]) == 0
        some = len(read_rows("runs"))
        assert cli.main(command) == 0
        rows = read_rows("runs")
        assert some < len(rows) == len(everything.sweep())
        assert {row["status"] for row in rows} == {"done"}
        times = {path: path.stat().st_mtime_ns for path in place.glob("runs/*/result.json")}
        assert cli.main(command) == 0
        assert all(path.stat().st_mtime_ns == time for path, time in times.items())
        assert continual.main(["--workdir", "runs"]) == 0
        assert style.main(["--workdir", "runs"]) == 0
        assert figure2.main(["--workdir", "runs"]) == 0
        (mixed,) = (json.loads(path.read_text()) for path in place.glob("runs/*/mixed.json"))
        assert mixed["mixed rows"] > 0 and len(mixed["tasks"]) == 3
        for one in mixed["tasks"].values():
            assert one["difference"] < 1e-4 and one["changed"] == 0
        rows = read_rows("runs")
        for name in ("PROMPTS", "DOCS"):
            patch.setattr(report, name, place / name)
        for name in ("RECORDS", "LADDER"):
            patch.setattr(report, name, place / f"{name}.json")
        assert report.main(["--workdir", "runs", "--keep", "--to", "report"]) == 0
        assert report.main(["--to", "again"]) == 0
    assert CATALOG[MODEL] is entry
    assert len(list((place / "PROMPTS").iterdir())) == len(study.SEEDS)
    text = (place / "report/report.md").read_text()
    assert text == (place / "again/report.md").read_text() == (place / "DOCS/report.md").read_text()
    assert "| ladder/d4 " in text and "4.500" in text
    assert f"{len(rows)} of {len(rows)} trials of the whole study" in text
    assert ", 2 not run." in text  # the scaling law's, which needs five models
    assert "\n\nNot run." not in text
