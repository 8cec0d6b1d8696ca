"""The notebooks run, from any folder of the repository, and what is rendered is what they say."""

import json

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from experiments.paper import figure1, study
from notebooks.render import FOLDER, NAMES, execute, read_script
from softprompt.analysis.scaling import ScalingLaw
from softprompt.trials.records import write_records
from tests.paper.simulated import seeds

REPOSITORY = FOLDER.parent
LARGEST = 1_500_000  # bytes of all renderings


@pytest.fixture(autouse=True)
def programs(monkeypatch, pytestconfig):
    """Kernels share the compiled programs of the tests' own processes."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(pytestconfig.cache.mkdir("programs")))


def shown(notebook):
    """What the cells of a notebook show, as text; figures as "<figure>"."""
    lines = []
    for cell in notebook.cells:
        for one in cell.get("outputs", []):
            data = one.get("data", {})
            lines.append(
                "<figure>" if "image/png" in data else data.get("text/plain", one.get("text"))
            )
    return "\n".join(lines)


def test_renderings_are_current():
    """Breaks when a script is edited and `make notebooks` is not run, or a notebook has no test."""
    written = {path.stem: path for path in FOLDER.glob("*.ipynb")}
    assert written.keys() == set(NAMES)
    for name, path in written.items():
        rendered, script = nbformat.read(path, as_version=4), read_script(name)
        parts = [[(c.cell_type, c.source) for c in one.cells] for one in (rendered, script)]
        assert parts[0] == parts[1], f"{name}: run `make notebooks`"
        assert any(cell.get("outputs") for cell in rendered.cells), name
    assert sum(path.stat().st_size for path in written.values()) < LARGEST


def test_results_explorer(tmp_path):
    """Breaks when a cell fails, a gap is not the study's, or a record's curve is not drawn."""
    accuracies = {"prompt": (0.58, 0.6, 0.59), "full": (0.76, 0.77, 0.75)}
    rows = [row for name, some in accuracies.items() for row in seeds("ladder/d0", name, some)]
    rows = [row | {"curve": [[0, 0.5], [10, 0.7]]} for row in rows]
    write_records(tmp_path / "records.jsonl", rows)
    parameters = {"SOURCE": str(tmp_path / "records.jsonl")}
    text = shown(execute("results_explorer", parameters, cwd=FOLDER))
    assert study.shown(figure1.gaps(rows)["ladder/d0"]) in text
    assert text.count("<figure>") == 3


def test_results_explorer_refuses_to_mix_trials(tmp_path):
    """Breaks when trials that differ in a rate are pooled as one seed."""
    rates = (0.1, 0.5)
    rows = [row for r in rates for row in seeds("ladder/d0", "prompt", (0.6,), optimizer__rate=r)]
    write_records(tmp_path / "records.jsonl", rows)
    parameters = {"SOURCE": str(tmp_path / "records.jsonl"), "EXPERIMENT": ""}
    with pytest.raises(CellExecutionError, match="'optimizer.rate': ..0.1', '0.5'"):
        execute("results_explorer", parameters)


def test_scaling_laws(tmp_path):
    """Breaks when a cell fails, or the ladder's fit takes T5s or checkpoints for decoders."""
    law = ScalingLaw(2.0, 50.0, 0.4)
    sizes = [1e5, 3e5, 1e6, 3e6, 1e7]
    names = [f"ladder/d{n}" for n in range(5)]
    lines = [(name, size, float(law(size))) for name, size in zip(names, sizes, strict=True)]
    lines += [("ladder/t0", 2e6, 9.0), ("ladder/d1@1of2", 3e5, 9.0)]
    rows = [{"name": n, "parameters": size, "tokens": 1, "loss": x} for n, size, x in lines]
    (tmp_path / "ladder.json").write_text(json.dumps(rows))
    parameters = {"DRAWS": 20, "STUDIES": 2, "LADDER": str(tmp_path / "ladder.json")}
    text = shown(execute("scaling_laws", parameters, cwd=FOLDER))
    assert "E = 2.000, A = 50.0, a = 0.400" in text
    assert "three sizes: an exponent needs 4 different sizes at least; there are 3" in text
    assert text.count("<figure>") == 2


def test_scaling_laws_without_the_ladder(tmp_path):
    """Breaks when a missing file is an error."""
    parameters = {"DRAWS": 5, "STUDIES": 1, "LADDER": str(tmp_path / "none.json")}
    assert "none.json is missing" in shown(execute("scaling_laws", parameters))
