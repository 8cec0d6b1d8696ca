"""Parts of the report, each as Markdown and as HTML, and the page that holds them.

The page is one file without outside assets. Without scripts only sorting is missing.
"""

import html
import re
from collections.abc import Sequence

import pandas as pd

from softprompt.analysis import tables

Part = tuple[str, str]  # the same as Markdown and as HTML
LONG = 40  # characters of a cell that is given more room

STYLE = """
:root { color-scheme: light dark; --ink: #222; --paper: #fff; --line: #ccc; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --paper: #181818; --line: #444; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 52rem; margin: auto; padding: 1rem; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 1rem 0; overflow-wrap: normal; }
table { border-collapse: collapse; font-size: 0.9rem; }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: left;
  vertical-align: top; min-width: 3.5rem; }
td:not(.number) { min-width: 6.5rem; }
td.long { min-width: 14rem; }
@media (max-width: 40rem) {
  body { padding: 0.7rem; } th, td { padding: 0.3rem; } td.long { min-width: 10.5rem; }
  td:first-child:not(.number) { min-width: 4.5rem; }
}
.number { text-align: right; font-variant-numeric: tabular-nums; }
.sortable th { cursor: pointer; }
svg { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
pre { overflow-x: auto; background: color-mix(in srgb, var(--line) 30%, transparent);
  padding: 0.5rem; border-radius: 6px; overflow-wrap: normal; }
pre, code { font-size: 0.9em; }
"""
# `comparison` of the cells of a column compares two of them: by the numbers that they begin with if
# all of them do, else as text. Empty cells come last.
COMPARISON = r"""
function comparison(cells, up) {
  const numeric = cells.every(text => /^$|^[-+]?\d[\d,]*(\.\d+)?($|[ %])/.test(text));
  const number = text => parseFloat(text.replaceAll(",", ""));
  return (a, b) => {
    if (a === "" || b === "") return (a === "") - (b === "");
    const order = numeric ? number(a) - number(b) : a.localeCompare(b, "en", {numeric: true});
    return up ? order : -order;
  };
}
"""
SORT = f"""{COMPARISON}
for (const table of document.querySelectorAll("table")) table.classList.add("sortable");
for (const th of document.querySelectorAll("th")) th.onclick = () => {{
  const body = th.closest("table").tBodies[0], rows = [...body.rows];
  const cell = row => row.cells[th.cellIndex].textContent;
  const up = th.ariaSort !== "ascending";
  for (const other of th.parentNode.cells) other.ariaSort = null;
  th.ariaSort = up ? "ascending" : "descending";
  const compare = comparison(rows.map(cell), up);
  body.append(...rows.sort((a, b) => compare(cell(a), cell(b))));
}};
"""


def heading(text: str, level: int = 2) -> Part:
    """A heading."""
    return f"{'#' * level} {text}", f"<h{level}>{_inline(text)}</h{level}>"


def paragraph(text: str, label: str = "") -> Part:
    """A paragraph, which may begin with a label such as "Question"."""
    if not label:
        return text, f"<p>{_inline(text)}</p>"
    return f"**{label}.** {text}", f"<p><b>{label}.</b> {_inline(text)}</p>"


def commands(lines: Sequence[str]) -> Part:
    """Commands of a shell."""
    told = "; ".join(f"`{one}`" for one in lines)
    return f"**Command.** {told}", f"<pre>{html.escape(chr(10).join(lines))}</pre>"


def table(frame: pd.DataFrame) -> Part:
    """A table; one that is wider than the page scrolls, and cells of long texts are wider."""
    text = re.sub(f"<td>(?=[^<]{{{LONG}}})", '<td class="long">', tables.to_html(frame))
    return tables.to_markdown(frame).rstrip(), f'<div class="wide">{text}</div>'


def items(lines: Sequence[str]) -> Part:
    """A list."""
    listed = "".join(f"<li>{_inline(one)}</li>" for one in lines)
    return "\n".join(f"* {one}" for one in lines), f"<ul>{listed}</ul>"


def picture(title: str, file: str, svg: str) -> Part:
    """A figure: in a file for Markdown, inside the page for HTML."""
    return f"![{title}]({file})", svg


def to_markdown(parts: Sequence[Part]) -> str:
    """The parts as one Markdown text."""
    return "\n\n".join(markdown for markdown, _ in parts) + "\n"


def to_page(title: str, parts: Sequence[Part]) -> str:
    """The parts as one page, with its style and script."""
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    body = "\n".join(text for _, text in parts)
    return (
        f"<!doctype html><html lang=en><head>{head}<title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style></head><body>{body}<script>{SORT}</script></body></html>\n"
    )


def _inline(text: str) -> str:
    """Text of a docstring as HTML, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=False))
