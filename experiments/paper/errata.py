"""Errata of the paper: what it prints, and what its own numbers or the released code give."""

import pandas as pd

from experiments.paper import parameters

COLUMNS = ("where", "printed", "instead", "from")
OTHERS = (
    (
        "Table 7, sizes of MRQA's other domains",
        "these counts, at other names",
        "BioASQ 1,504, DROP 1,503, DuoRC 1,501, RACE 674, RE 2,948, TextbookQA 1,503",
        "the sets of MRQA",
    ),
    (
        "The random uniform start of a prompt",
        "uniform in [-0.5, 0.5]",
        "uniform in [0, 0.5)",
        "the released configuration",
    ),
    (
        "Table 3, SuperGLUE of prompts at XXL",
        "90.5, the average of five prompts",
        "88.8",
        "Vu et al. 2022, who print the numbers of Figure 1; the two are not reconciled",
    ),
)


def table() -> pd.DataFrame:
    """A line an erratum: those of Table 4, as `parameters` computes them, and others."""
    counts, lines = parameters.table().set_index(["size", "P"]), []
    for (size, length), erratum in parameters.ERRATA.items():
        where = f"Table 4, {size}, P = {length}, {erratum.column}"
        right = counts.loc[(size, length), erratum.column]
        lines.append((where, erratum.printed, right, "the definition of T5 1.1"))
    return pd.DataFrame([*lines, *OTHERS], columns=COLUMNS)
