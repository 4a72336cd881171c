"""Tables of text cells, and their two forms: Markdown and HTML."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

from grpo_jax.report.safe_text import escape_html


class Column(NamedTuple):
    """A column's name, and the title that it shares with the columns beside it.

    Columns with the same title are side by side in HTML. In Markdown they are one
    column, whose names and cells are joined by arrows.
    """

    name: str
    title: str = ""


class Cell(NamedTuple):
    """A cell's text, and a detail that follows it in a quieter colour."""

    text: str
    detail: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Columns and rows; each row has a cell for each column. A `str` is a plain cell.

    HTML shows the caption; Markdown leaves it out. HTML takes the first cell of a row
    for the row's header.
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell | str]]
    caption: str = ""

    def column_groups(self) -> list[tuple[str, list[int]]]:
        """Returns (title, positions) of columns that share a title, or of one."""
        places = range(len(self.columns))
        groups = itertools.groupby(places, key=lambda i: self.columns[i].title or i)
        return [(k if isinstance(k, str) else "", list(group)) for k, group in groups]


def to_markdown(table: Table) -> str:
    """Returns the table in Markdown. Cells are not escaped.

    >>> table = Table(
    ...     [Column("set"), Column("base", "greedy"), Column("rl", "greedy")],
    ...     [["gsm8k", Cell("64.2", "± 2.6"), "–"]],
    ... )
    >>> print(to_markdown(table))
    | set | greedy: base → rl |
    |---|---|
    | gsm8k | 64.2 ± 2.6 → – |
    """
    groups = table.column_groups()
    header = []
    for title, positions in groups:
        names = " → ".join(table.columns[i].name for i in positions)
        header.append(f"{title}: {names}" if title else names)
    lines = [header]
    for row in table.rows:
        cells = [" ".join(filter(None, _cell(cell))) for cell in row]
        lines.append([" → ".join(cells[i] for i in place) for _, place in groups])
    first, *others = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([first, "|" + "---|" * len(groups), *others])


def to_html(table: Table) -> str:
    """Returns the table as HTML that scrolls sideways on its own. All text is escaped.

    >>> "&lt;b&gt;" in to_html(Table([Column("name")], [["<b>"]]))
    True
    """
    groups = table.column_groups()
    titled = any(title for title, _ in groups)
    rowspan = ' rowspan="2"' if titled else ""
    upper, lower = [], []
    for title, positions in groups:
        names = [escape_html(table.columns[i].name) for i in positions]
        if title:
            upper.append(
                f'<th scope="colgroup" colspan="{len(names)}">{escape_html(title)}</th>'
            )
            lower += [f'<th scope="col">{name}</th>' for name in names]
        else:
            upper += [f'<th scope="col"{rowspan}>{name}</th>' for name in names]
    head = "".join(["<tr>", *upper, "</tr>"])
    head += "".join(["<tr>", *lower, "</tr>"]) if titled else ""
    body = []
    for row in table.rows:
        first, *others = [_cell_html(cell) for cell in row]
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    caption = (
        f"<caption>{escape_html(table.caption)}</caption>" if table.caption else ""
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>'
        f"{caption}<thead>{head}</thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(cell: Cell | str) -> Cell:
    return Cell(cell) if isinstance(cell, str) else cell


def _cell_html(cell: Cell | str) -> str:
    text, detail = _cell(cell)
    shown = escape_html(text)
    return (
        f'{shown} <span class="quiet">{escape_html(detail)}</span>' if detail else shown
    )
