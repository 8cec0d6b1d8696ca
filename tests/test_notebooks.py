"""The notebooks run, from any folder of the repository, and what is rendered is what they say."""

import json
import re

import nbformat
import numpy as np
import pytest
from nbclient.exceptions import CellExecutionError

from experiments.paper import figure1, study
from notebooks.render import FOLDER, NAMES, execute, read_script
from softprompt.analysis.scaling import ScalingLaw
from softprompt.api import load_trial
from softprompt.methods.delta_file import save_delta
from softprompt.models.quantize import embedding
from softprompt.trials.records import write_records
from tests.paper import simulated

LARGEST = 1_500_000  # bytes of all renderings


@pytest.fixture(autouse=True)
def kernels(monkeypatch, pytestconfig):
    """Kernels import this repository, and share and compile programs as the tests do."""
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(pytestconfig.cache.mkdir("programs")))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


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


@pytest.mark.long
@pytest.mark.parametrize("name", ["results_explorer", "scaling_laws"])
def test_renderings_have_the_committed_numbers(name):
    """Breaks when records or losses are replaced and `make notebooks` is not run."""
    rendered = shown(nbformat.read(FOLDER / f"{name}.ipynb", as_version=4))
    assert shown(execute(name)).splitlines() == rendered.splitlines(), "run `make notebooks`"


def test_results_explorer(tmp_path):
    """Breaks when a cell fails, a gap is not the study's, or a record's curve is not drawn."""
    accuracies = {"prompt": (0.58, 0.6, 0.59), "full": (0.76, 0.77, 0.75)}
    rows = [
        row for name, some in accuracies.items() for row in simulated.seeds("ladder/d0", name, some)
    ]
    rows = [row | {"curve": [[0, 0.0, 0.5], [10, 3.0, 0.7]]} for row in rows]
    write_records(tmp_path / "records.jsonl", rows)
    parameters = {"SOURCE": str(tmp_path / "records.jsonl")}
    text = shown(execute("results_explorer", parameters, cwd=FOLDER))
    assert study.shown(figure1.gaps(rows)["ladder/d0"]) in text
    assert text.count("<figure>") == 3


def test_results_explorer_refuses_to_mix_trials(tmp_path):
    """Breaks when trials that differ in a rate are pooled as one seed."""
    rates = (0.1, 0.5)
    rows = [
        row
        for r in rates
        for row in simulated.seeds("ladder/d0", "prompt", (0.6,), optimizer__rate=r)
    ]
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


def run_first_prompt(folder, **parameters):
    """The first prompt's text and the trained lengths; the notebook needs no repository."""
    text = shown(execute("first_prompt", parameters, cwd=folder))
    trials = folder / "runs/first_prompt/prompts"
    return text, sorted(load_trial(path).config.method.length for path in trials.iterdir())


def test_first_prompt(tmp_path, tiny_folder):
    """Breaks when a cell fails outside of the repository, or the parameters do not reach it."""
    model = {"MODEL": str(tiny_folder), "STEPS": 3, "LENGTHS": (4,)}
    text, lengths = run_first_prompt(tmp_path, **model)
    assert lengths == [4]
    assert text.count("<figure>") == 2
    assert re.search(r"(complaint|question|praise) 0\.\d\d  Do you deliver on Saturdays\?", text)


@pytest.mark.real
@pytest.mark.long
def test_first_prompt_on_smollm2(tmp_path):
    """Breaks when the default model cannot be trained on the notebook's messages."""
    text, lengths = run_first_prompt(tmp_path, STEPS=2, LENGTHS=(1,))
    assert lengths == [1]
    assert text.count("<figure>") == 2


@pytest.mark.real
def test_prompt_geometry(tmp_path, smollm2):
    """Breaks when a cell fails, or the embeddings, the start or the labels are another task's."""
    record = simulated.record(study.SMOLLM2, "prompt", 0, 0.8)
    write_records(tmp_path / "records.jsonl", [record])
    (planted,) = smollm2.tokenizer.encode(" film")
    rows_PD = np.array(embedding(smollm2.weights["embed"])[planted : planted + 20])
    rows_PD[1] = rows_PD[0]  # a duplicate; neither is a label
    origin = {"model": study.SMOLLM2, "trial": record["trial"]}
    (tmp_path / "prompts").mkdir()
    save_delta(tmp_path / "prompts/one.safetensors", {"prompt": rows_PD}, origin)
    strange = {"model": study.SMOLLM2, "trial": "unknown"}
    save_delta(tmp_path / "prompts/two.safetensors", {"prompt": rows_PD}, strange)
    names = {"PROMPTS": "prompts", "RECORDS": "records.jsonl"}
    parameters = {key: str(tmp_path / name) for key, name in names.items()}
    text = shown(execute("prompt_geometry", parameters, cwd=FOLDER))
    assert "1 trained prompts; 1 other files" in text
    assert re.search(r"^0 +' negative' ", text, re.MULTILINE)
    assert re.search(r"^0 +' film', ", text, re.MULTILINE)
    for numbers in (r"1\.0\d* +0\.\d+", r"0\.0 +0\.05 "):  # the table is shown in two parts
        assert re.search(f"trained movie_sentiment, seed 0 +{numbers}", text)
    assert text.count("<figure>") == 2
