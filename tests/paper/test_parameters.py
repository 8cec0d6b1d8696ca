"""The paper's numbers that follow from shapes alone."""

import pytest

from experiments.paper import parameters

# (D, F, H, L) of T5 1.1, for a second derivation of the counts.
SIZES = {
    "small": (512, 1024, 6, 8),
    "base": (768, 2048, 12, 12),
    "large": (1024, 2816, 16, 24),
    "xl": (2048, 5120, 32, 24),
    "xxl": (4096, 10240, 64, 24),
}
PREFIX = {"small": 1.23, "base": 3.69, "large": 9.83, "xl": 19.7, "xxl": 39.3}  # millions, printed


def test_table_4_to_the_digit():
    """Breaks when a matrix or scale is counted twice, or not, or an erratum is where none is."""
    lines = parameters.table().to_dict("records")
    assert len(lines) == 25
    for line in lines:
        d, f, h, layers = SIZES[line["size"]]
        a = 64 * h * d
        alone = 2 * 32128 * d + layers * (12 * a + 6 * d * f + 5 * d) + 64 * h + 2 * d
        count = line["P"] * d
        assert line["trainable"] == f"{count:,}" and line["total"] == f"{alone + count:,}"
        assert line["share"] == f"{100 * count / (alone + count):.5f} %"
    printed = {(line["size"], line["P"]): line["printed"] for line in lines if line["printed"]}
    assert printed == {
        ("small", 20): "trainable: 10,420",
        ("large", 100): "share: 0.01907 %",
        ("xxl", 50): "total: 11,137,380,352",
    }


@pytest.mark.parametrize("size", parameters.SIZES)
def test_figure_4_as_printed(size):
    """Breaks when prefix tuning has keys and values in one stack only, or in cross-attention."""
    methods = {name: parameters.trainable(size, keys) for name, keys in parameters.METHODS.items()}
    assert methods["prefix, P = 100"] / 1e6 == pytest.approx(PREFIX[size], rel=0.005)
    assert min(methods, key=methods.get) == "prompt, P = 100"
