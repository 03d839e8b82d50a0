"""A page as blocks, written as Markdown (pictures beside it) and as one HTML file that holds everything."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; width: 100% } td, th { border: 1px solid #ccc; padding: .3rem .6rem; text-align: left }
td, th { vertical-align: top } img { max-width: 100% } figcaption { color: #555 } h2 { margin-top: 2.5rem }
@media print { h2 { break-before: page } }
"""


class Heading(NamedTuple):
    level: int
    text: str


class Paragraph(NamedTuple):
    text: str


class Bullets(NamedTuple):
    points: tuple[str, ...]


class Table(NamedTuple):
    """`head` names the columns."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Figure(NamedTuple):
    """A PNG; `name` is its file's beside the Markdown."""

    name: str
    caption: str
    png: bytes


Block = Heading | Paragraph | Bullets | Table | Figure


def as_markdown(blocks: Sequence[Block]) -> str:
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {text}"
        case Paragraph(text):
            return text
        case Bullets(points):
            return "\n".join(f"- {point}" for point in points)
        case Table(head, rows):
            lines = [head, ("---",) * len(head), *rows]
            return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)
        case Figure(name, caption, _):
            return f"![{caption}]({name}.png)"


def as_html(blocks: Sequence[Block], title: str) -> str:
    """One file: no script, no style sheet and no picture from elsewhere."""
    body = "\n".join(map(_html, blocks))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{STYLE}</style></head><body>\n{body}\n</body></html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Paragraph(text):
            return f"<p>{_inline(text)}</p>"
        case Bullets(points):
            return f"<ul>{''.join(f'<li>{_inline(point)}</li>' for point in points)}</ul>"
        case Table(head, rows):
            names = "".join(f"<th>{escape(cell)}</th>" for cell in head)
            body = "".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in rows)
            return f"<table><tr>{names}</tr>{body}</table>"
        case Figure(_, caption, png):
            data = base64.b64encode(png).decode()
            alt = escape(caption)
            return (
                f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{alt}</figcaption></figure>'
            )


def _inline(text: str) -> str:
    """Escaped text, in which Markdown's pairs of asterisks become bold."""
    parts = escape(text).split("**")
    return "".join(f"<b>{part}</b>" if number % 2 else part for number, part in enumerate(parts))
