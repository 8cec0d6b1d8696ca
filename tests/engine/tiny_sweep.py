"""An experiment of 24 tiny trials, of which the last one always fails.

`write(folder)` writes its model and data into a folder and returns the experiment's file.
"""

from pathlib import Path

from tests.own_task import write_task
from tests.tiny import write_llama_folder

EXPERIMENT = '''
"""Tiny trials of seeds and initialisers."""
import pandas as pd
from matplotlib.figure import Figure
from softprompt.config import base_config

CAPTION = "Tiny trials."


def sweep(subset):
    configs = []
    for seed in range(12):
        for init in ("vocabulary", "uniform"):
            config = base_config()
            config.update({"seed": seed})
            config.model.name = "FOLDER/model"
            config.model.dtype = "float32"
            config.task.name = "tiny"
            config.task.source = "jsonl:FOLDER/data/{split}.jsonl"
            config.task.template = "{text}"
            config.task.verbalizers = {"good": " good", "bad": " bad"}
            config.method.length = 4
            config.method.init = init
            config.train.steps = STEPS
            config.train.batch = 8
            configs.append(config)
    configs[-1].model.name = "FOLDER/nothing"
    return configs


def table(rows):
    return pd.DataFrame([{"name": row["name"]} for row in rows])


def figure(rows):
    return Figure()
'''


def write(folder: Path, steps: int = 60) -> Path:
    """Writes the experiment, its model and its data below a folder."""
    write_llama_folder(folder / "model")
    (folder / "data").mkdir()
    write_task(folder / "data")
    file = folder / "tiny_sweep.py"
    file.write_text(EXPERIMENT.replace("FOLDER", str(folder)).replace("STEPS", str(steps)))
    return file
