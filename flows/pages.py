"""Pages in one HTML file, for light and dark displays: the house's style, tables, tiles, and figures as inline SVG."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BRAND = (
    '<div class="brand"><svg viewBox="0 0 32 32" width="30" height="30" aria-hidden="true">'
    '<path d="M16 29V13" stroke="var(--leaf)" stroke-width="2.4" stroke-linecap="round"/>'
    '<path d="M16 15C16 8 11 4.5 4.5 4 5 11 9 15 16 15Z" fill="var(--leaf)"/>'
    '<path d="M16 20c0-5.5 4-8.6 11-9-.4 6-4 9-11 9Z" fill="var(--leaf)" opacity=".62"/></svg>'
    "<span>Perennial</span></div>"
)

# Colours of figures → those of the style sheet, which has them for light and for dark displays.
SERIES = ("#2f7d5b", "#3f6fb5", "#8a5aa8", "#b0722a", "#3d8f99", "#a84f6c", "#6b7a2f", "#56607d")
INK, SOFT, FAINT, GRID = "#1d2421", "#5f6b66", "#dfe3de", "#eceee9"
_VARIABLES = {
    **{colour: f"var(--c{index})" for index, colour in enumerate(SERIES)},
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    FAINT: "var(--faint)",
    GRID: "var(--grid)",
}

_LONG = 48  # characters of a cell that is broken

_SVG_SETTINGS: Any = {"svg.fonttype": "none", "svg.hashsalt": "perennial"}


def style() -> str:
    """The style sheet of every page."""
    return resources.files("flows").joinpath("style.css").read_text(encoding="utf-8")


def page(title: str, lead: str, parts: Iterable[str]) -> str:
    """A whole page: a heading, one line under it, and parts made by the functions below."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{_text(title)}</title><style>{style()}</style></head>'
        f'<body><main><header>{BRAND}<h1>{_text(title)}</h1><p class="quiet">{_text(lead)}</p></header>'
        f"{''.join(parts)}</main></body></html>\n"
    )


def section(heading: str, *parts: str, about: str = "") -> str:
    """A card with a heading, a sentence about it, and what is in it."""
    words = f'<p class="quiet">{_text(about)}</p>' if about else ""
    return f"<section><h2>{_text(heading)}</h2>{words}{''.join(parts)}</section>"


def tiles(numbers: Mapping[str, str]) -> str:
    """A row of large numbers, each with what it is."""
    cells = (
        f'<div class="tile"><b>{_text(value)}</b><span>{_text(what)}</span></div>' for what, value in numbers.items()
    )
    return f'<div class="tiles">{"".join(cells)}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; columns that begin as numbers do are set to the right, long cells are broken."""
    texts = [[str(cell) for cell in row] for row in rows]
    kinds = [
        "n" if re.match(r"^[\d$∞–-]", column[0]) and len(column[0]) < _LONG else ""
        for column in zip(*texts, strict=True)
    ]
    cells = "".join(f'<th class="{kind}">{_text(name)}</th>' for name, kind in zip(head, kinds or head, strict=True))
    body = "".join(f"<tr>{''.join(map(_cell, row, kinds))}</tr>" for row in texts)
    return f'<div class="scroll"><table><tr>{cells}</tr>{body}</table></div>'


def facts(entries: Mapping[str, str]) -> str:
    """Names and what there is to say about each."""
    pairs = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in entries.items())
    return f"<dl>{''.join(pairs)}</dl>"


def figure(drawn: Figure, about: str = "") -> str:
    """A figure as inline SVG in the page's fonts and colours."""
    from matplotlib import rc_context

    buffer = StringIO()
    with rc_context(_SVG_SETTINGS):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)
    svg = "<svg" + re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)  # names that would repeat in the next figure
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)  # the page's
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    label = f' role="img" aria-label="{_text(about)}"' if about else ""
    return f"<figure{label}>{svg}</figure>"


def _kind(words: str) -> str:
    return "n" if re.match(r"^[\d$∞–-]", words) and len(words) <= _LONG else ""


def _cell(words: str, kind: str) -> str:
    return f'<td class="{"wrap" if len(words) > _LONG else kind}">{_text(words)}</td>'


def _text(words: str) -> str:
    return html.escape(words, quote=True)
