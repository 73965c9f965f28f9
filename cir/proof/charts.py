"""Bar charts as inline SVG: rates before and after, with their intervals. Colours are those of the page."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cir.proof.figures import interval_of, percent
from cir.proof.statistics import interval

WIDTH, LABELS, VALUES = 720, 300, 60
"""Of the whole, of the column of labels on the left and of that of the figures on the right."""
ROW, BAR, TOP, BOTTOM = 34, 11, 26, 20
"""Heights: of a row, of one of its two bars, of the key above and of the axis below."""
MOST_LABEL = 46
"""Letters that fit in the column of labels."""


@dataclass(frozen=True)
class Row:
    """What is compared: the rate ``measure``, in words ``label``, before and after; either may be missing."""

    measure: str
    label: str
    before: Mapping[str, Any] | None
    after: Mapping[str, Any] | None


def plain(text: str) -> str:
    """``text`` as HTML that shows it: what is markup, or changes the order of letters, is written out; a figure
    and its % stay on one line.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return re.sub(r"(?<=\d) %", "\N{NO-BREAK SPACE}%", html.escape(shown))


def chart(name: str, title: str, rows: Sequence[Row]) -> str:
    """One bar for before and one for after in each of ``rows``; ``name`` is its id in the page, and ``title`` is read
    aloud with every figure.
    """
    height = TOP + ROW * len(rows) + BOTTOM
    said = "; ".join(f"{row.label}: {_said(row, row.before)} before, {_said(row, row.after)} after" for row in rows)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {WIDTH} {height}" '
        f'aria-labelledby="{name}-title {name}-text">',
        f'<title id="{name}-title">{plain(title)}</title><desc id="{name}-text">{plain(said)}.</desc>',
        _key(),
        *(_grid(share, TOP, height - BOTTOM) for share in (0.0, 0.25, 0.5, 0.75, 1.0)),
        *(_row(row, TOP + ROW * place) for place, row in enumerate(rows)),
        "</svg>",
    ]
    return "".join(parts)


def _said(row: Row, outcome: Mapping[str, Any] | None) -> str:
    if outcome is None:
        return "not measured"
    return f"{percent(outcome['value'])} (95 %: {interval_of(row.measure, outcome)}, n = {outcome['count']})"


def _x(rate: float) -> float:
    return LABELS + 10 + (WIDTH - LABELS - VALUES - 20) * min(max(rate, 0.0), 1.0)


def _key() -> str:
    x = LABELS + 10
    return (
        f'<rect class="before" x="{x}" y="4" width="22" height="{BAR}"/><text x="{x + 28}" y="14">before</text>'
        f'<rect class="after" x="{x + 90}" y="4" width="22" height="{BAR}"/><text x="{x + 118}" y="14">after</text>'
        f'<path class="whisker" d="M{x + 180} 10h22m0-4v8m-22-8v8"/><text x="{x + 208}" y="14">95 % interval</text>'
    )


def _grid(share: float, top: int, bottom: int) -> str:
    x = f"{_x(share):.1f}"
    return (
        f'<path class="grid" d="M{x} {top}V{bottom}"/>'
        f'<text x="{x}" y="{bottom + 15}" text-anchor="middle" class="axis">{100 * share:.0f} %</text>'
    )


def _row(row: Row, top: int) -> str:
    label = row.label if len(row.label) <= MOST_LABEL else row.label[: MOST_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
    parts = [f'<text x="{LABELS}" y="{top + ROW / 2 + 4:.0f}" text-anchor="end">{plain(label)}</text>']
    for outcome, kind, y in ((row.before, "before", top + 5), (row.after, "after", top + 6 + BAR)):
        if outcome is not None:
            parts.append(_bar(row.measure, outcome, kind, y))
    return "".join(parts)


def _bar(measure: str, outcome: Mapping[str, Any], kind: str, y: int) -> str:
    start, end, middle = _x(0.0), _x(outcome["value"]), y + BAR / 2
    parts = [f'<rect class="{kind}" x="{start:.1f}" y="{y}" width="{end - start:.1f}" height="{BAR}"/>']
    if found := interval(measure, outcome):
        low, high = map(_x, found)
        parts.append(f'<path class="whisker" d="M{low:.1f} {middle}H{high:.1f}m0-3v6M{low:.1f} {middle - 3}v6"/>')
    parts.append(f'<text x="{WIDTH - VALUES}" y="{middle + 4}">{plain(percent(outcome["value"]))}</text>')
    return "".join(parts)
