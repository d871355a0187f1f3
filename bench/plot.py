"""A plot of bits against KL as SVG, written by hand: two logarithmic axes, a line for each codec.

KL falls by decades and bits by factors, so both axes are logarithmic; lines that are lower and further left are better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, log10
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

WIDTH: Final = 760
HEIGHT: Final = 460
LEFT, RIGHT, TOP, BOTTOM = 70, 150, 30, 50
COLOURS: Final = ("#1b6ca8", "#c0392b", "#1e8449", "#7d3c98", "#b9770e", "#148f8b", "#5d6d7e", "#a04000")
BITS_TICKS: Final = (1, 1.5, 2, 3, 4, 6, 8, 12, 16)
BARELY: Final = 1e-5  # nats; what is below is drawn here: zero has no logarithm

Curve = Sequence[tuple[float, float]]
"""(bits per number, KL in nats per token)."""


@dataclass(frozen=True, slots=True)
class Scale:
    """A logarithmic axis from `low` to `high`, drawn from one pixel to another."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = log10(value / self.low) / log10(self.high / self.low)
        return round(self.start + share * (self.end - self.start), 1)


def svg(curves: Mapping[str, Curve], title: str, budget: float) -> str:
    """Deterministic: the same curves give the same text. `budget` is drawn as a line across."""
    bits_axis, kl_axis = _axes(curves, budget)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, TOP - 12, title, weight="bold"),
        *_grid(bits_axis, kl_axis),
        _line(LEFT, kl_axis.at(budget), WIDTH - RIGHT, kl_axis.at(budget), "#444", dashed=True),
        _text(WIDTH - RIGHT + 6, kl_axis.at(budget) + 4, f"budget {budget:g}"),
    ]
    for index, (name, curve) in enumerate(sorted(curves.items())):
        lines += _series(name, curve, bits_axis, kl_axis, COLOURS[index % len(COLOURS)], TOP + 16 * index)
    return "\n".join([*lines, "</svg>", ""])


def write(path: Path, curves: Mapping[str, Curve], title: str, budget: float) -> None:
    path.write_text(svg(curves, title, budget))


def _axes(curves: Mapping[str, Curve], budget: float) -> tuple[Scale, Scale]:
    points = [point for curve in curves.values() for point in curve]
    bits = [bits for bits, _ in points] or [1.0]
    nats = [max(kl, BARELY) for _, kl in points] + [budget]
    low, high = floor(log10(min(nats))), ceil(log10(max(nats)))
    bits_axis = Scale(min(bits) * 0.9, max(bits) * 1.1, LEFT, WIDTH - RIGHT)
    return bits_axis, Scale(10.0**low, 10.0 ** max(high, low + 1), HEIGHT - BOTTOM, TOP)


def _grid(bits_axis: Scale, kl_axis: Scale) -> list[str]:
    marks = [_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, "bits per number of K and V (16: raw)", anchor="middle")]
    marks.append(_text(8, TOP - 12, "KL, nats"))
    for bits in BITS_TICKS:
        if bits_axis.low <= bits <= bits_axis.high:
            x = bits_axis.at(bits)
            marks += [_line(x, TOP, x, HEIGHT - BOTTOM, "#ddd"), _text(x, HEIGHT - 32, f"{bits:g}", anchor="middle")]
    for decade in range(round(log10(kl_axis.low)), round(log10(kl_axis.high)) + 1):
        y = kl_axis.at(10.0**decade)
        marks += [_line(LEFT, y, WIDTH - RIGHT, y, "#ddd"), _text(LEFT - 8, y + 4, f"{10.0**decade:g}", anchor="end")]
    return marks


def _series(name: str, curve: Curve, bits_axis: Scale, kl_axis: Scale, colour: str, label_y: float) -> list[str]:
    places = [(bits_axis.at(bits), kl_axis.at(max(kl, BARELY))) for bits, kl in sorted(curve)]
    path = " ".join(f"{x},{y}" for x, y in places)
    x = WIDTH - RIGHT + 6
    return [
        f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in places),
        f'<circle cx="{x + 4}" cy="{label_y}" r="4" fill="{colour}"/>',
        _text(x + 14, label_y + 4, name),
    ]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, dashed: bool = False) -> str:
    dashes = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}"{dashes}/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: str = "normal") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
