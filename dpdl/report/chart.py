"""A line chart as inline SVG: axes, ticks, curves, a shaded region, and words for who cannot see it.

Colours come from the page's style sheet, by class. Coordinates are whole tenths of a pixel of a drawing 440 wide, which
a phone shows at its full width with letters that can still be read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpdl.html_page import text

__all__ = ["Curve", "Mark", "line_chart", "round_numbers"]

WIDTH, HEIGHT = 440.0, 320.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 18.0, 26.0, 46.0  # margins: room for tick labels, a value, the axis' name
LETTER = 7.2  # about the width of a digit at 13 px

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points joined by lines.

    Attributes:
        points: (x, y), ascending in x.
        kind: its class in the style sheet: "curve", "planned", "guess".
        name: in the legend.
        shaded: whether what lies below it is shaded.
    """

    points: Sequence[Point]
    kind: str
    name: str
    shaded: bool = False


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point with its value written beside it."""

    at: Point
    value: str


def line_chart(
    *,
    name: str,
    title: str,
    description: str,
    x: str,
    y: str,
    curves: Sequence[Curve],
    marks: Sequence[Mark] = (),
    most: Point | None = None,
    shown: Callable[[float], str] = lambda value: f"{value:,g}",
) -> str:
    """A figure: the legend, the drawing, and its description as a caption.

    Args:
        name: tells its ids from those of other charts on the page.
        title: what is shown, in a few words.
        description: what one sees, in a sentence, for who cannot.
        x, y: names of the axes.
        curves: at least one; both axes start at 0.
        marks: on top of them.
        most: where the axes end; None for a round number above all points.
        shown: how a tick is written.
    """
    every = [point for curve in curves for point in curve.points]
    right = most[0] if most else max(max(point[0] for point in every), 1e-9)
    ticks_x = round_numbers(right)
    ticks_y = round_numbers(most[1] if most else max(max(point[1] for point in every), 1e-9) * 1.08)
    top = most[1] if most else ticks_y[-1] + (ticks_y[1] - ticks_y[0])

    def place(point: Point) -> Point:
        across, up = point[0] / right, min(point[1] / top, 1.0)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = [
        *(_region(curve, place) for curve in curves if curve.shaded),
        *(_tick_y(value, shown(value), place) for value in ticks_y if value <= top),
        *(_tick_x(value, shown(value), place) for value in ticks_x if value <= right),
        f'<path class="axis" d="M{_at(place((0, top)))}L{_at(place((0, 0)))}L{_at(place((right, 0)))}"/>',
        *(f'<path class="{curve.kind}" d="{_path(curve.points, place)}"/>' for curve in curves),
        *(_mark(mark, place) for mark in marks),
        f'<text x="{LEFT - 44:g}" y="14">{text(y)}</text>',
        f'<text x="{WIDTH - RIGHT:g}" y="{HEIGHT - 8:g}" text-anchor="end">{text(x)}</text>',
    ]
    ids = f"{name}-title {name}-description"
    return "\n".join(
        [
            "<figure>",
            _legend(curves),
            f'<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" aria-labelledby="{ids}">',
            f'<title id="{name}-title">{text(title)}</title>',
            f'<desc id="{name}-description">{text(description)}</desc>',
            *drawn,
            "</svg>",
            f"<figcaption>{text(description)}</figcaption>",
            "</figure>",
        ]
    )


def round_numbers(most: float) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten, up to `most`: two to six of them above 0.

    Example:
        >>> round_numbers(3.5), round_numbers(480)
        ([0.0, 1.0, 2.0, 3.0], [0.0, 100.0, 200.0, 300.0, 400.0])
    """
    unit = 10.0 ** math.floor(math.log10(most))
    apart = next(unit * share for share in (0.2, 0.5, 1.0, 2.0) if most / (unit * share) < 6.5)
    return [float(f"{apart * i:.12g}") for i in range(int(most / apart * (1 + 1e-9)) + 1)]


def _legend(curves: Sequence[Curve]) -> str:
    items = []
    for curve in curves:
        shade = '<rect class="reach" width="32" height="12"/>' if curve.shaded else ""
        line = f'<path class="{curve.kind}" d="M1 6H31"/>'
        sample = f'<svg viewBox="0 0 32 12" aria-hidden="true">{shade}{line}</svg>'
        items.append(f"<li>{sample}{text(curve.name)}</li>")
    return f'<ul class="legend">{"".join(items)}</ul>'


def _at(point: Point) -> str:
    return f"{point[0]:.1f} {point[1]:.1f}"


def _path(points: Sequence[Point], place: Callable[[Point], Point]) -> str:
    return "M" + "L".join(_at(place(point)) for point in points)


def _region(curve: Curve, place: Callable[[Point], Point]) -> str:
    ends = [(curve.points[0][0], 0.0), *curve.points, (curve.points[-1][0], 0.0)]
    return f'<path class="reach" d="{_path(ends, place)}Z"/>'


def _tick_x(value: float, label: str, place: Callable[[Point], Point]) -> str:
    across, up = place((value, 0))
    return f'<text x="{across:.1f}" y="{up + 17:.1f}" text-anchor="middle">{text(label)}</text>'


def _tick_y(value: float, label: str, place: Callable[[Point], Point]) -> str:
    across, up = place((0, value))
    line = f'<path class="grid" d="M{across:.1f} {up:.1f}H{WIDTH - RIGHT:g}"/>'
    return f'{line}<text x="{across - 6:.1f}" y="{up + 4.5:.1f}" text-anchor="end">{text(label)}</text>'


def _mark(mark: Mark, place: Callable[[Point], Point]) -> str:
    """Its value stands above, on the side where there is room."""
    across, up = place(mark.at)
    room = WIDTH - RIGHT - across > len(mark.value) * LETTER
    side, anchor = (across + 4, "start") if room and across < LEFT + 60 else (across, "end")
    return (
        f'<circle class="dot" cx="{across:.1f}" cy="{up:.1f}" r="5"/>'
        f'<text class="value" x="{side:.1f}" y="{up - 10:.1f}" text-anchor="{anchor}">{text(mark.value)}</text>'
    )
