"""Tables as text and HTML, and the page around them."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Table", "facts", "flatten", "html_page", "make_table", "number"]


@dataclass(frozen=True, slots=True)
class Table:
    """A table as plain text and as HTML."""

    text: str
    html: str

    def __str__(self) -> str:
        return self.text


def number(value: Any, digits: int = 4) -> str:
    """A number with that many significant digits, readable at every size; other things as text."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e7):
        return f"{int(value):,}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.{digits}g}" if abs(value) >= 1e15 else f"{value:,.0f}"
    return f"{value:.{digits}g}"


def make_table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> Table:
    """A table of text cells; a cell may be ``(text, whether it is the best of its column)``."""
    plain = [[cell if isinstance(cell, str) else cell[0] + (" *" if cell[1] else "") for cell in row] for row in body]
    widths = [max(len(row[i]) for row in [list(head), *plain]) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return "  ".join(padded).rstrip()

    text = "\n".join([line(head), "  ".join("-" * width for width in widths), *map(line, plain)])
    rows = []
    for row in body:
        tags = []
        for cell in row:
            value, marked = (cell, False) if isinstance(cell, str) else cell
            tags.append(f"<td{' class=best' if marked else ''}>{html.escape(value)}</td>")
        rows.append("<tr>" + "".join(tags) + "</tr>")
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return Table(text, f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>")


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one, ``lora.r`` -> 16; lists as JSON text."""
    if isinstance(value, Mapping) and value:
        found = [flatten(inner, f"{path}.{key}" if path else str(key)) for key, inner in value.items()]
        return {key: inner for one in found for key, inner in one.items()}
    return {path: json.dumps(value, default=str) if isinstance(value, (list, tuple, dict)) else value}


def facts(values: Mapping[str, Any]) -> str:
    """Two columns, name and value."""
    rows = [[key, number(value)] for key, value in flatten(values).items()]
    return make_table(["", ""], rows).html.replace("<table>", "<table class=facts>", 1)


_CSS = """
:root{--ink:#24292f;--soft:#57606a;--line:#d9dde3;--back:#f6f8fa}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:var(--ink);background:#fff;margin:0 auto;
max-width:1240px;padding:28px 24px 60px}
h1{font-size:26px;margin:0}h1+p{color:var(--soft);margin:2px 0 22px}
h2{font-size:18px;margin:34px 0 10px;padding-bottom:5px;border-bottom:1px solid var(--line)}
img{display:block;max-width:100%;height:auto}
.tiles{display:flex;flex-wrap:wrap;gap:12px}
.tile{background:var(--back);border:1px solid var(--line);border-radius:8px;padding:10px 16px;min-width:150px}
.tile span,.tile i{display:block;color:var(--soft);font-size:12.5px;font-style:normal}.tile b{font-size:24px;font-weight:600}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}
th{color:var(--soft);font-weight:600;text-align:right;padding:4px 14px 4px 0;border-bottom:1px solid var(--line)}
td{text-align:right;padding:3px 14px 3px 0;border-bottom:1px solid #eef0f3;white-space:nowrap}
th:first-child,td:first-child{text-align:left}td.best{font-weight:700}
table.facts td{text-align:left;white-space:normal;overflow-wrap:anywhere}
table.facts td:first-child{color:var(--soft);white-space:nowrap}
table.facts thead{display:none}
ul.remarks{background:#fff8e6;border:1px solid #ead9a4;border-radius:8px;padding:10px 16px 10px 34px;margin:0}
details{margin:26px 0 0}summary{font-size:18px;font-weight:600;cursor:pointer;margin-bottom:10px}
"""


def html_page(heading: str, what: str, body: str) -> str:
    """A page that loads nothing and runs nothing; ``body`` is HTML already."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    name = html.escape(heading)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}</title><style>{_CSS}</style></head>\n"
        f"<body><h1>{name}</h1><p>{html.escape(what)}</p>\n{body}\n</body></html>\n"
    )
