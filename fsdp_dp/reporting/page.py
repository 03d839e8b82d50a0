"""A page as blocks, written as Markdown (pictures beside it) and as one HTML file that holds everything."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

STYLE = """
:root { --ink: #222b33; --quiet: #5c6873; --line: #dde2e6; --good: #1f7a4d; --bad: #a83232; --note: #8a6100 }
* { box-sizing: border-box }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; color: var(--ink);
       max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; background: #fff }
h1 { font-size: 1.75rem; margin: 0 0 1.2rem } h2 { font-size: 1.2rem; margin: 2.8rem 0 .8rem; padding-top: 1rem;
     border-top: 2px solid var(--line) }
.banner { border-left: 5px solid; padding: .7rem 1rem; margin: .6rem 0; background: #f6f8f9; border-radius: 0 4px 4px 0 }
.good { border-color: var(--good) } .bad { border-color: var(--bad); background: #fbf3f2 }
.note { border-color: var(--note); background: #fdf8ec }
.banner b { font-size: 1.05rem }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid var(--line); padding: .42rem .8rem .42rem 0; text-align: left; vertical-align: top }
th { font-weight: 600 } td:first-child { color: var(--quiet); width: 14rem }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem }
figure { margin: 0; border: 1px solid var(--line); border-radius: 6px; padding: .6rem; break-inside: avoid }
img { width: 100%; max-width: 46rem; height: auto; display: block; margin: 0 auto }
figcaption { color: var(--quiet); font-size: .83rem; padding: .3rem .2rem 0 }
code { background: #f1f3f5; padding: .05rem .3rem; border-radius: 3px; font-size: .9em }
li { margin: .25rem 0 } .sign { margin-top: 2.5rem; color: var(--quiet) }
@media print { h2 { break-before: page } body { padding: 0 } }
"""


# What Markdown or HTML may take for more than a letter.
MARKS = frozenset("*_<>[]|#&\\")


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Banner(NamedTuple):
    """A sentence that nobody may overlook; `tone` is good, bad or note."""

    text: str
    tone: str


class Bullets(NamedTuple):
    points: tuple[str, ...]


class Table(NamedTuple):
    """`head` names the columns; without it the first column names the rows."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Figure(NamedTuple):
    """A PNG; `name` is its file's beside the Markdown."""

    name: str
    caption: str
    png: bytes


class Figures(NamedTuple):
    """Side by side, where there is room."""

    figures: tuple[Figure, ...]


Block = Heading | Paragraph | Banner | Bullets | Table | Figures


def as_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text) | Banner(text, _):
            return text
        case Bullets(points):
            return "\n".join(f"- {point}" for point in points)
        case Table(head, rows):
            lines = [head, ("---",) * len(head), *rows]
            return "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)
        case Figures(figures):
            return "\n\n".join(f"![{figure.caption}]({figure.name}.png)" for figure in figures)


def verbatim(text: str) -> str:
    """Words of a configuration, such as `corpus/**/*.txt`, in which no mark of Markdown's or HTML's means anything."""
    plain = " ".join(text.replace("`", "'").split())
    return f"`{plain}`" if MARKS & set(plain) else plain


def _markdown_cell(text: str) -> str:
    """On one line, in one cell."""
    return " ".join(text.split()).replace("|", "\\|")


def as_html(blocks: Sequence[Block], title: str) -> str:
    """One file: no script, no style sheet and no picture from elsewhere."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Banner(text, tone):
            return f'<p class="banner {tone}">{_inline(text)}</p>'
        case Bullets(points):
            return f"<ul>{''.join(f'<li>{_inline(point)}</li>' for point in points)}</ul>"
        case Table(head, rows):
            names = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            top = f"<tr>{names}</tr>" if any(head) else ""
            body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
            return f"<table>{top}{body}</table>"
        case Figures(figures):
            return f'<div class="grid">{"".join(map(_html_figure, figures))}</div>'


def _html_figure(figure: Figure) -> str:
    data, alt = base64.b64encode(figure.png).decode(), escape(figure.caption)
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'


def _inline(text: str) -> str:
    """Escaped text, in which Markdown's pairs of asterisks become bold, and those of backticks code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if number % 2 else _bold(part) for number, part in enumerate(parts))


def _bold(text: str) -> str:
    parts = text.split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(parts))
