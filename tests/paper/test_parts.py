"""The page of the report: how its tables sort, and what it makes of texts."""

import html
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest

from experiments.paper import parts

COLUMNS = {
    ("-16.9 (-20.6 to -13.2)", "", "-4.5 (-9 to 1)", "0.10", "0.9 (0.1 to 2)", "1,234.5", "40 %"): (
        ["-16.9 (-20.6 to -13.2)", "-4.5 (-9 to 1)", "0.10", "0.9 (0.1 to 2)", "40 %", "1,234.5"]
    ),
    ("undecided", "holds", "", "not run"): ["holds", "not run", "undecided"],
    ("d10", "d2", "3 points"): ["3 points", "d2", "d10"],
}


def evaluated(script, folder):
    """What an expression in JavaScript gives, by node or by Chromium, whichever is here."""
    if node := shutil.which("node"):
        told = f"{parts.COMPARISON}\nconsole.log(JSON.stringify({script}))"
        return subprocess.run([node, "-e", told], capture_output=True, text=True, check=True).stdout
    if not (chromium := shutil.which("chromium")):
        pytest.skip("neither node nor Chromium is here")
    page = folder / "sort.html"
    told = f"{parts.COMPARISON}\ndocument.body.textContent = JSON.stringify({script})"
    page.write_text(f"<body><script>{told}</script>")
    command = [chromium, "--headless", "--no-sandbox", "--dump-dom", page.as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return html.unescape(re.sub("<[^>]*>", "", found))


def test_columns_sort(tmp_path):
    """Breaks when numbers sort as text, a minus is ignored, or an empty cell is the smallest."""
    columns = json.dumps([list(cells) for cells in COLUMNS])
    each = "cells => [true, false].map(up => [...cells].sort(comparison(cells, up)))"
    found = json.loads(evaluated(f"{columns}.map({each})", tmp_path))
    for (cells, expected), (up, down) in zip(COLUMNS.items(), found, strict=True):
        empty = [""] * cells.count("")
        assert up == expected + empty
        assert down == expected[::-1] + empty


def test_texts_are_escaped():
    """Breaks when a text is markup, or what stands between backticks is not code."""
    assert parts.paragraph("a < `b`", "So")[1] == "<p><b>So.</b> a &lt; <code>b</code></p>"
    assert parts.items(["a & b"])[1] == "<ul><li>a &amp; b</li></ul>"
    page = parts.to_page("<t>", [parts.table(pd.DataFrame({"x": ["short", "long " * 20]}))])
    assert page.count('<td class="long">') == 1 and "<title>&lt;t&gt;" in page
