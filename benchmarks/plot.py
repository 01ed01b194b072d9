"""A line plot as SVG, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 86, 24, 40, 56
ROW = 18  # of the legend
COLORS = ("#1b6ca8", "#c0392b", "#2e7d32", "#8e44ad", "#b9770e", "#00838f", "#5d4037")


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name: a line with dots, or dots alone."""

    name: str
    points: Sequence[tuple[float, float]]
    joined: bool


def line_plot(series: Sequence[Series], *, x: str, y: str, title: str) -> str:
    """Return a plot with a legend below it; both axes are linear and start at the lowest value, y at most at 0."""
    points = [point for one in series for point in one.points]
    low_x, high_x = min(p[0] for p in points), max(p[0] for p in points)
    low_y, high_y = min(0.0, *(p[1] for p in points)), max(p[1] for p in points) * 1.05

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - low_x) / ((high_x - low_x) or 1)
        up = (point[1] - low_y) / ((high_y - low_y) or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    whole = HEIGHT + 6 + ROW * len(series)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {whole}"',
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{whole}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="22" text-anchor="middle" font-size="15">{escape(title)}</text>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 14}" text-anchor="middle">{escape(x)}</text>',
        f'<text transform="translate(18 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">{escape(y)}</text>',
    ]
    for value in ticks(low_y, high_y):
        _, py = at((low_x, value))
        gray = "#ddd" if value else "#888"
        out.append(f'<line x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}" stroke="{gray}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in ticks(low_x, high_x):
        px, _ = at((value, low_y))
        out.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:g}</text>')
    for i, one in enumerate(series):
        color = COLORS[i % len(COLORS)]
        places = [at(point) for point in one.points]
        if one.joined:
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in places)
            out.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2"/>')
        out += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{3 if one.joined else 5}" fill="{color}"/>' for px, py in places
        ]
        row = HEIGHT + 4 + ROW * i
        out.append(f'<circle cx="{LEFT + 5}" cy="{row - 4}" r="5" fill="{color}"/>')
        out.append(f'<text x="{LEFT + 17}" y="{row}">{escape(one.name)}</text>')
    return "\n".join([*out, "</svg>"]) + "\n"


def ticks(low: float, high: float) -> list[float]:
    """Return 4 to 8 round values within [low, high]."""
    size = 10.0 ** math.floor(math.log10(high - low))
    step = next(size * factor for factor in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (size * factor) <= 8)
    return [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
