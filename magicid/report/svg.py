"""Small inline SVG: escaped elements, linear scales with round ticks, and the axes all charts share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 340.0, 206.0
LEFT, RIGHT, TOP, BOTTOM = 42.0, 10.0, 12.0, 34.0


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """An SVG element; attribute values and text children are escaped. `class_` and `stroke_width` as in Python."""
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            text = f"{value:.2f}" if isinstance(value, float) else str(value)
            parts.append(f' {name.rstrip("_").replace("_", "-")}="{escape(text)}"')
    inner = "".join(str(escape(child)) for child in children)
    return Markup("".join([*parts, ">", inner, f"</{tag}>"]))


def join(parts: Iterable[Markup]) -> Markup:
    """Elements one after the other."""
    return Markup("").join(parts)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers inside [low, high], about `count` of them."""
    span = high - low
    if not math.isfinite(span) or span <= 0:
        return [low]
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def label(value: float) -> str:
    """A tick label without noise digits."""
    return f"{value:.4g}".replace("e-0", "e-").replace("-", "−")


@dataclass(frozen=True)
class Scale:
    """A linear map from values [low, high] to pixels [start, end]."""

    low: float
    high: float
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float, *, margin: float = 0.06) -> Scale:
        """A scale over finite values with a margin on both sides; around a single value, one with some width."""
        low, high = min(values), max(values)
        pad = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
        return Scale(low - pad, high + pad, start, end)

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def axes(
    x: Scale, y: Scale, x_title: str, y_title: str = "", *, width: float = WIDTH, height: float = HEIGHT
) -> Markup:
    """Grid lines, tick labels and axis titles."""
    parts = []
    for value in ticks(y.low, y.high):
        parts.append(element("line", x1=x.start, x2=x.end, y1=y(value), y2=y(value), class_="grid"))
        parts.append(element("text", label(value), x=x.start - 7, y=y(value) + 3.5, class_="tick end"))
    for value in ticks(x.low, x.high, 6):
        parts.append(element("text", label(value), x=x(value), y=y.start + 15, class_="tick middle"))
    parts.append(element("line", x1=x.start, x2=x.end, y1=y.start, y2=y.start, class_="axis"))
    parts.append(element("text", x_title, x=x.end, y=height - 3, class_="axis-title end"))
    if y_title:
        parts.append(element("text", y_title, x=4.0, y=9.0, class_="axis-title"))
    return join(parts)


def drawing(
    *children: Markup, title: str, class_: str = "chart", width: float = WIDTH, height: float = HEIGHT
) -> Markup:
    """A whole drawing that fills the width it is given; `title` is read aloud."""
    return element("svg", *children, viewBox=f"0 0 {width:g} {height:g}", class_=class_, role="img", aria_label=title)
