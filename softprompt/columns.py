"""Aligned columns of text."""

from collections.abc import Sequence


def print_columns(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints the header and the lines, each column as wide as its widest text."""
    widths = [max(len(line[i]) for line in (header, *lines)) for i in range(len(header))]
    for line in (header, *lines):
        print("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip())
