"""The charts of reports: coordinates of lines, ticks and labels, which templates draw as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from n3c.backends.gpus import GPUS

from ..units import format_bytes, format_operations

WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 82, 130, 28, 34
"""Margins; names of lines stand in the right one."""
LINE = 11
"""Least distance of two labels."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear or logarithmic scale from values to coordinates."""

    low: float
    high: float
    start: float
    end: float
    log: bool = True

    def __call__(self, value: float) -> float:
        """Return the coordinate of `value`."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return round(self.start + (value - low) / ((high - low) or 1) * (self.end - self.start), 1)


@dataclass(frozen=True, slots=True)
class Label:
    """A text at a place."""

    x: float
    y: float
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline with its name at the end."""

    name: str
    points: str
    """`x,y x,y …`."""
    label: Label
    style: str
    """Class of the stylesheet."""
    color: int = 0
    """Of a curve: which of the colors that follow each other."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart: axes, lines, dots."""

    title: str
    x_title: str
    x_ticks: tuple[Label, ...]
    y_ticks: tuple[Label, ...]
    lines: tuple[Line, ...]
    dots: tuple[Label, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    right: int = WIDTH - RIGHT
    left: int = LEFT
    top: int = TOP

    @property
    def bottom(self) -> int:
        """Return where the axis of steps or contexts lies."""
        return self.height - BOTTOM


def memory_chart(weights: int, fixed: int, a_token: int, longest: int, cards: Sequence[tuple[str, int]]) -> Chart:
    """Return memory against context for several batch sizes, and the memory of `cards`, smallest first."""
    first = min(1024, longest)
    batches = (1, 8, 64, 512)
    most = weights + batches[2] * (fixed + a_token * longest)  # the largest batch may leave the chart
    y = Axis(weights * 0.9, max(most, weights * 1.5), HEIGHT - BOTTOM, TOP)
    x = Axis(first, longest if longest > first else first * 2, LEFT, WIDTH - RIGHT)
    contexts = [2.0**power for power in range(int(math.log2(first)), int(math.log2(longest)) + 1)] + [longest]
    lines: list[Line] = []
    for color, batch in enumerate(batches):
        values = [(context, weights + batch * (fixed + a_token * context)) for context in contexts]
        inside = [(x(context), y(value)) for context, value in values if value <= y.high]
        if inside:
            end = Label(inside[-1][0] + 5, inside[-1][1] + 4, f"batch {batch}")
            lines.append(Line(end.text, _points(inside), end, "curve", color))
    for name, size in _spread(cards, y):
        label = Label(WIDTH - RIGHT + 5, y(size) + 4, name)
        lines.append(Line(name, _points([(LEFT, y(size)), (WIDTH - RIGHT, y(size))]), label, "card"))
    return Chart(
        "memory against context",
        "tokens of context, each sequence",
        tuple(Label(x(value), HEIGHT - BOTTOM + 15, text) for value, text in _doublings(x.low, x.high)),
        tuple(Label(LEFT - 6, y(value) + 4, short_bytes(value)) for value in _nice(y.low, y.high)),
        _apart(lines),
    )


def roofline_chart(entries: Sequence[tuple[str, float]], gpus: Sequence[tuple[str, float, float]]) -> Chart:
    """Return attainable FLOP/s against FLOPs a byte: of each GPU (name, bandwidth, peak), with dots for entries."""
    intensities = [intensity for _, intensity in entries]
    ridges = [peak / bandwidth for _, bandwidth, peak in gpus]
    x = Axis(min(0.5, *intensities) / 1.5, max(*ridges, *intensities) * 2, LEFT, WIDTH - RIGHT)
    low = min(bandwidth for _, bandwidth, _ in gpus) * x.low
    y = Axis(low, max(peak for *_, peak in gpus) * 1.5, HEIGHT - BOTTOM, TOP)
    lines: list[Line] = []
    dots: list[Label] = []
    for color, (name, bandwidth, peak) in enumerate(gpus):
        roof = [(value, min(peak, bandwidth * value)) for value in (x.low, peak / bandwidth, x.high)]
        points = [(x(value), y(reached)) for value, reached in roof]
        lines.append(Line(name, _points(points), Label(points[-1][0] + 5, points[-1][1] + 4, name), "curve", color))
        dots += [Label(x(i), y(min(peak, bandwidth * i)), f"{entry} on {name}") for entry, i in entries]
    at, row = -math.inf, 0
    for entry, intensity in sorted(entries, key=lambda item: item[1]):
        place = x(intensity)
        row = 1 - row if place - at < 7 * len(entry) else 0  # names that would touch stand on two rows
        at = place
        top = TOP - 4 - LINE * row
        lines.append(
            Line(entry, _points([(place, HEIGHT - BOTTOM), (place, top + 3)]), Label(place, top, entry), "entry")
        )
    return Chart(
        "roofline",
        "FLOPs a byte",
        tuple(Label(x(v), HEIGHT - BOTTOM + 15, f"{v:g}") for v in _nice(x.low, x.high)),
        tuple(Label(LEFT - 6, y(v) + 4, format_operations(v, "FLOP/s")) for v in _nice(y.low, y.high)),
        _apart(lines),
        tuple(dots),
    )


def curve_chart(title: str, points: Sequence[tuple[float, float]]) -> Chart | None:
    """Return values against steps, linear; None without two finite values."""
    found = _thinned([(step, value) for step, value in points if math.isfinite(value)])
    if len(found) < 2:
        return None
    width, height, right = 350, 180, 54
    steps, values = zip(*found, strict=True)
    low, high = min(values), max(values)
    pad = (high - low or abs(high) or 1.0) * 0.05
    x = Axis(min(steps), max(steps), LEFT, width - right, log=False)
    y = Axis(low - pad, high + pad, height - BOTTOM, TOP, log=False)
    return Chart(
        title,
        "step",
        tuple(Label(x(step), height - BOTTOM + 15, f"{step:,.0f}") for step in (min(steps), max(steps))),
        tuple(Label(LEFT - 6, y(value) + 4, f"{value:.4g}") for value in (low, (low + high) / 2, high)),
        (Line(title, _points((x(step), y(value)) for step, value in found), Label(0, 0, ""), "curve"),),
        (),
        width,
        height,
        width - right,
    )


def known_cards() -> list[tuple[str, int]]:
    """Return the GPUs that n3c knows, with their memory, smallest first; of the largest also several."""
    cards = sorted(((gpu.name, gpu.memory) for gpu in GPUS.values()), key=lambda card: card[1])
    name, size = cards[-1]
    return cards + [(f"{count} x {name}", count * size) for count in (2, 4, 8, 16)]


def _spread(cards: Sequence[tuple[str, int]], y: Axis) -> list[tuple[str, int]]:
    """Return the cards within the axis, but of two whose names would touch the larger one only."""
    kept: list[tuple[str, int]] = []
    for name, size in reversed(cards):
        if y.low <= size <= y.high and all(abs(y(size) - y(other)) >= LINE + 2 for _, other in kept):
            kept.append((name, size))
    return kept[::-1]


def _apart(lines: Iterable[Line]) -> tuple[Line, ...]:
    """Move labels of the right margin down where they would touch the one above."""
    kept: list[Line] = []
    last: dict[float, float] = {}
    for line in sorted(lines, key=lambda line: (line.label.x, line.label.y)):
        label, above = line.label, last.get(line.label.x, -LINE)
        y = max(label.y, above + LINE) if line.style != "entry" else label.y
        last[label.x] = y
        kept.append(replace(line, label=Label(label.x, y, label.text)))
    return tuple(kept)


def _thinned(points: Sequence[tuple[float, float]], most: int = 300) -> list[tuple[float, float]]:
    """Return at most about `most` points, the last among them."""
    return [*points[: -1 : max(1, len(points) // most)], *points[-1:]]


def _points(points: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _doublings(low: float, high: float) -> Iterator[tuple[float, str]]:
    """Yield every second power of two within, with its text: `64k`."""
    for power in range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1, 2):
        value = 2**power
        yield value, f"{value >> 20}M" if value >= 1 << 20 else f"{value >> 10}k" if value >= 1024 else str(value)


def short_bytes(size: float) -> str:
    """Return a round size for an axis: `200 GB`."""
    figure, unit = format_bytes(size).split()
    return f"{float(figure):g} {unit}"


def _nice(low: float, high: float) -> list[float]:
    """Return round values on a logarithmic scale: powers of ten, with 2 and 5 where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) > 3:
            return found
    return found
