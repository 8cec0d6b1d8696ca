"""How many parameters does each method train? The paper's Table 4 and Figure 4, to the digit.

Question: are the printed counts those of T5 1.1 as it is defined?

Prediction: all but three are; the table lists those. A prompt trains P * D numbers, which is the
least of all methods at every size.

Command:
    python -m experiments.paper.parameters --workdir runs/paper/parameters

Cost: seconds. No model is loaded: counts follow from the shapes of weights and deltas.

Expected: totals 76,961,152 to 11,135,332,352; three errata.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pandas as pd
from matplotlib.figure import Figure

from softprompt.analysis.plots import named_points
from softprompt.config import base_config
from softprompt.errors import UserError
from softprompt.models.shapes import parameter_count
from softprompt.models.t5_layers import T5Config
from softprompt.pretrained.catalog import CATALOG
from softprompt.results import Row
from softprompt.trials.delta_checks import trained_count
from softprompt.trials.outputs import experiment_name, write_outputs

SIZES = ("small", "base", "large", "xl", "xxl")
LENGTHS = (1, 20, 50, 100, 150)
METHODS: dict[str, dict[str, object]] = {
    "full fine-tuning": {"name": "full"},
    "prefix, P = 100": {"name": "prefix", "length": 100, "place": "both"},
    "LoRA, rank 8": {"name": "lora"},
    "prompt, P = 100": {"name": "prompt", "length": 100},
}

CAPTION = (
    "Trainable: vectors of the encoder's input. Total: with the frozen model. Share: trainable "
    "over total. Printed: what the paper's Table 4 has instead."
)


@dataclasses.dataclass(frozen=True)
class Erratum:
    """A number that the paper prints otherwise."""

    column: str
    printed: str


# (size, prompt length) -> what is printed; everything else in Table 4 is as computed here.
ERRATA = {
    ("small", 20): Erratum("trainable", "10,420"),
    ("large", 100): Erratum("share", "0.01907 %"),
    ("xxl", 50): Erratum("total", "11,137,380,352"),
}


def model(size: str) -> T5Config:
    """The architecture of T5 1.1 of a size."""
    config = CATALOG[f"google/t5-v1_1-{size}"].config
    assert isinstance(config, T5Config)
    return config


def trainable(size: str, method: dict[str, object]) -> int:
    """Numbers that a method trains, in its folded form."""
    config = base_config()
    for key, value in method.items():
        config.method[key] = value
    return trained_count(config, model(size))


def table(rows: Sequence[Row] = ()) -> pd.DataFrame:
    """Table 4: a line a size and prompt length; no trial's rows are needed."""
    lines = []
    for size in SIZES:
        alone = parameter_count(model(size))
        for length in LENGTHS:
            count = trainable(size, {"name": "prompt", "length": length})
            erratum = ERRATA.get((size, length))
            lines.append(
                {
                    "size": size,
                    "P": length,
                    "trainable": f"{count:,}",
                    "total": f"{alone + count:,}",
                    "share": f"{100 * count / (alone + count):.5f} %",
                    "printed": f"{erratum.column}: {erratum.printed}" if erratum else "",
                }
            )
    return pd.DataFrame(lines, dtype=object)


def figure(rows: Sequence[Row] = ()) -> Figure:
    """Figure 4: trained numbers by the size of the model, a line a method."""
    series = {
        name: [
            (float(parameter_count(model(size))), float(trainable(size, method)), size)
            for size in SIZES
        ]
        for name, method in METHODS.items()
    }
    plot = named_points(
        series,
        xlabel="Parameters of the model",
        ylabel="Trained parameters",
        title="What each method trains, on T5 1.1",
    )
    plot.axes[0].set_yscale("log")
    return plot


def write_tables(artefact: ModuleType, arguments: Sequence[str] | None) -> int:
    """Writes the table and the figure of an artefact without trials; returns the exit code."""
    name = experiment_name(artefact)
    parser = argparse.ArgumentParser(prog=f"experiments.paper.{name}")
    parser.add_argument("--workdir", type=Path, default=Path("runs/paper") / name)
    workdir = parser.parse_args(arguments).workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        names = write_outputs(artefact, (), workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {', '.join(str(workdir / name) for name in names)}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table and the figure."""
    return write_tables(sys.modules[__name__], arguments)


if __name__ == "__main__":
    sys.exit(main())
