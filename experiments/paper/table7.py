"""Table 7: are the paper's sets read at the sizes that the paper prints?

Question: how many examples do SuperGLUE, QQP, MRPC, SQuAD and MRQA's other domains have here, and
how many of them are used?

Prediction: as many as Table 7 prints, but for MRQA, whose counts it prints beside permuted names.

Command:
    python -m experiments.paper.table7 --workdir runs/paper/table7

Cost: seconds. No set is loaded: the counts are those that reading a set checks, and
`tests/data/test_paper_rows.py` reads every set at its size and compares with what is printed.

Found: all eleven sets with a training split have the printed sizes, 259 of WSC's 554 examples
counted, as the paper does; one erratum.
"""

import sys
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure

from experiments.paper.parameters import write_tables
from softprompt.analysis.plots import Point, category_plot
from softprompt.data.builtin_tasks import TASKS
from softprompt.results import Row

SETS = ("boolq", "cb", "copa", "multirc", "record", "rte", "wic", "wsc", "mrpc", "qqp", "squad")
MRQA = tuple(name for name in TASKS if name.startswith("mrqa_"))
# Of WSC's training examples only those whose referent is right have a target; as in T5.
USED = {"wsc": 259}
PERMUTED = "beside another name"

CAPTION = (
    "Examples of each set. Used: those that are trained on, where that is fewer: of WSC's only the "
    "positive ones have a target. MRQA's other domains are tested on only. Printed: how the "
    "paper's Table 7 differs."
)


def table(rows: Sequence[Row] = ()) -> pd.DataFrame:
    """Table 7: a line a set; no trial's rows are needed."""
    lines = []
    for name in (*SETS, *MRQA):
        train, development = TASKS[name].counts or (0, 0)
        lines.append(
            {
                "set": name,
                "train": f"{train:,}" if train else "",
                "used": f"{USED.get(name, train):,}" if train else "",
                "development or test": f"{development:,}",
                "printed": PERMUTED if name in MRQA else "",
            }
        )
    return pd.DataFrame(lines, dtype=object)


def figure(rows: Sequence[Row] = ()) -> Figure:
    """The examples of each set that are used, and of its development set."""
    series: dict[str, dict[str, Point]] = {"used to train": {}, "development or test": {}}
    for name in (*SETS, *MRQA):
        train, development = TASKS[name].counts or (0, 0)
        for points, count in zip(
            series.values(), (USED.get(name, train), development), strict=True
        ):
            if count:
                points[name.removeprefix("mrqa_")] = Point(0, count, count, count, ())
    plot = category_plot(series, {}, ylabel="Examples", title="Table 7: sizes")
    plot.axes[0].set_yscale("log")
    return plot


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the table and the figure."""
    return write_tables(sys.modules[__name__], arguments)


if __name__ == "__main__":
    sys.exit(main())
