"""Backdrops: eight places, each with its own layout and palette, varied by a seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from magicid.world.drawing import Floats, box, ellipse
from magicid.world.language import PLACES

Colour = tuple[int, int, int]


class _Scene:
    """One picture in unit coordinates (0..1 across and down) that shapes are laid over."""

    def __init__(self, size: int, rng: np.random.Generator) -> None:
        self.size, self.rng = size, rng
        line = (np.arange(size, dtype=np.float32) + np.float32(0.5)) / size
        self.x, self.y = np.broadcast_to(line[None, :], (size, size)), np.broadcast_to(line[:, None], (size, size))
        self.picture = np.zeros((3, size, size), np.float32)

    def fill(self, top: Colour, bottom: Colour) -> None:
        """Vertical gradient over everything."""
        first, last = np.array(top, np.float32)[:, None, None], np.array(bottom, np.float32)[:, None, None]
        self.picture[:] = first * (1 - self.y) + last * self.y

    def lay(self, distance: Floats, colour: Colour, part: tuple[slice, slice] = (slice(None), slice(None))) -> None:
        """Lay a colour over where the signed distance (unit coordinates) of a part of the picture is negative."""
        cover = np.minimum(np.maximum(0.5 - distance * self.size, 0), 1)
        old = self.picture[(slice(None), *part)]
        old += cover * (np.array(colour, np.float32)[:, None, None] - old)

    def _near(self, x: np.float32, y: np.float32, rx: float, ry: float) -> tuple[Floats, Floats, tuple[slice, slice]]:
        """Coordinates from (x, y), and the pixels, of the part of the picture within rx, ry and a margin."""
        low = [max(int((a - r) * self.size) - 2, 0) for a, r in ((y, ry), (x, rx))]
        high = [max(int((a + r) * self.size) + 3, 0) for a, r in ((y, ry), (x, rx))]
        part = (slice(low[0], high[0]), slice(low[1], high[1]))
        return self.x[0:1, part[1]] - x, self.y[part[0], 0:1] - y, part

    def disc(self, x: float, y: float, rx: float, ry: float, colour: Colour) -> None:
        dx, dy, part = self._near(np.float32(x), np.float32(y), rx, ry)
        self.lay(ellipse(dx, dy, rx, ry), colour, part)

    def block(self, x1: float, y1: float, x2: float, y2: float, colour: Colour, radius: float = 0.0) -> None:
        x, y = np.float32((x1 + x2) / 2), np.float32((y1 + y2) / 2)
        rx, ry = abs(x2 - x1) / 2, abs(y2 - y1) / 2
        dx, dy, part = self._near(x, y, rx, ry)
        self.lay(box(dx, dy, rx, ry, radius), colour, part)

    def hill(self, base: float, height: float, waves: float, phase: float, colour: Colour) -> None:
        """Ground whose upper edge is a wave."""
        edge = base - height * np.sin(2 * np.pi * (waves * self.x + phase))
        self.lay((edge - self.y).astype(np.float32), colour)

    def triangle(self, x: float, top: float, bottom: float, half: float, colour: Colour) -> None:
        slope = half / (bottom - top)
        sides = (np.abs(self.x - x) - (self.y - top) * slope) / np.hypot(1, slope)
        self.lay(np.maximum(sides, self.y - bottom).astype(np.float32), colour)

    def jitter(self, amount: float) -> float:
        return float(self.rng.uniform(-amount, amount))


def _kitchen(s: _Scene) -> None:
    s.fill((252, 230, 188), (246, 214, 164))
    for i in range(9):  # tiles
        s.block(i / 8 - 0.008, 0.30, i / 8 + 0.008, 0.75, (232, 196, 148))
    for y in (0.42, 0.55, 0.68):
        s.block(0, y - 0.008, 1, y + 0.008, (232, 196, 148))
    shift = s.jitter(0.05)
    for x in (-0.12, 0.14, 0.66, 0.92):  # cupboards
        s.block(x + shift, -0.05, x + 0.23 + shift, 0.25, (196, 98, 62), 0.02)
        s.disc(x + 0.19 + shift, 0.19, 0.018, 0.018, (250, 220, 150))
    s.block(0, 0.78, 1, 0.84, (250, 246, 236))  # counter
    s.block(0, 0.84, 1, 1.1, (168, 82, 54))
    side = s.rng.choice([0.13, 0.87]) + s.jitter(0.02)
    s.block(side - 0.11, 0.62, side + 0.11, 0.79, (70, 110, 130), 0.03)  # pot
    s.block(side - 0.14, 0.64, side + 0.14, 0.68, (50, 80, 100), 0.02)
    other = 1 - side
    s.disc(other, 0.72, 0.08, 0.075, (226, 60, 48))  # fruit
    s.disc(other + 0.09, 0.74, 0.055, 0.055, (246, 190, 50))


def _beach(s: _Scene) -> None:
    s.fill((104, 196, 240), (196, 236, 250))
    x = s.rng.choice([0.14, 0.86]) + s.jitter(0.05)
    s.disc(x, 0.14, 0.10, 0.10, (255, 240, 150))
    level = 0.50 + s.jitter(0.03)
    s.block(-0.1, level, 1.1, 0.8, (30, 136, 190))
    s.block(-0.1, level + 0.09, 1.1, 0.8, (64, 180, 204))
    s.hill(0.70, 0.02, 1.5, s.rng.random(), (246, 250, 246))
    s.hill(0.73, 0.02, 1.5, s.rng.random(), (246, 218, 158))
    u = 1 - x  # umbrella
    s.block(u - 0.012, 0.42, u + 0.012, 0.86, (250, 246, 236))
    dome = ellipse(s.x - np.float32(u), s.y - np.float32(0.45), 0.20, 0.17)
    s.lay(np.maximum(dome, s.y - np.float32(0.45)), (236, 72, 66))
    stripe = ellipse(s.x - np.float32(u), s.y - np.float32(0.45), 0.08, 0.17)
    s.lay(np.maximum(stripe, s.y - np.float32(0.45)), (252, 246, 236))
    s.disc(x, 0.86, 0.06, 0.06, (250, 120, 60))


def _forest(s: _Scene) -> None:
    s.fill((52, 106, 64), (26, 66, 44))
    for i in range(6):
        x = (i + 0.5) / 6 + s.jitter(0.06)
        s.block(x - 0.02, 0.1, x + 0.02, 0.9, (34, 60, 42))
    for x in (0.06, 0.25, 0.76, 0.95):
        x += s.jitter(0.04)
        half = 0.045 + abs(s.jitter(0.02))
        s.block(x - half, -0.1, x + half, 1.0, (96, 64, 40))
        s.block(x - half, -0.1, x - half * 0.3, 1.0, (122, 84, 52))
    for i in range(8):
        x, y = i / 7 + s.jitter(0.05), 0.03 + s.jitter(0.05)
        s.disc(x, y, 0.12, 0.11, (40, 128, 62) if i % 2 else (70, 152, 70))
    s.hill(0.86, 0.03, 2, s.rng.random(), (58, 96, 46))
    for x in (0.1, 0.9):
        x += s.jitter(0.05)
        s.disc(x, 0.88, 0.12, 0.08, (36, 116, 58))
    m = s.rng.choice([0.2, 0.8])
    s.block(m - 0.02, 0.84, m + 0.02, 0.94, (246, 232, 210))
    s.disc(m, 0.84, 0.055, 0.04, (216, 58, 50))


def _city(s: _Scene) -> None:
    s.fill((18, 20, 58), (66, 44, 104))
    moon = s.rng.choice([0.16, 0.84])
    s.disc(moon, 0.12, 0.085, 0.085, (250, 240, 200))
    s.disc(moon + 0.04, 0.10, 0.07, 0.07, (24, 24, 64))
    for _ in range(6):
        s.disc(s.rng.random(), s.rng.uniform(0, 0.25), 0.012, 0.012, (240, 236, 255))
    left = -0.03
    while left < 1:
        wide = s.rng.uniform(0.15, 0.22)
        top = s.rng.uniform(0.22, 0.46)
        s.block(left, top, left + wide - 0.01, 1.1, (34, 34, 82) if s.rng.random() < 0.5 else (46, 40, 96))
        for wx in np.arange(left + 0.035, left + wide - 0.04, 0.06):
            for wy in np.arange(top + 0.05, 0.95, 0.085):
                if s.rng.random() < 0.62:
                    s.block(wx - 0.004, wy, wx + 0.028, wy + 0.038, (255, 206, 92))
        left += wide
    s.block(-0.1, 0.92, 1.1, 1.1, (28, 26, 54))


def _desert(s: _Scene) -> None:
    s.fill((244, 128, 74), (254, 214, 130))
    s.disc(0.5 + s.rng.choice([-0.32, 0.32]) + s.jitter(0.05), 0.24, 0.13, 0.13, (255, 244, 190))
    mesa = s.rng.choice([0.1, 0.9])
    s.block(mesa - 0.18, 0.44, mesa + 0.18, 0.75, (176, 84, 62), 0.02)
    s.block(mesa - 0.11, 0.37, mesa + 0.11, 0.5, (190, 94, 66), 0.02)
    s.hill(0.64, 0.06, 1.0, s.rng.random(), (232, 158, 82))
    s.hill(0.80, 0.05, 1.3, s.rng.random(), (214, 132, 62))
    x = 1 - mesa + s.jitter(0.03)
    green = (48, 124, 84)
    s.block(x - 0.04, 0.38, x + 0.04, 0.90, green, 0.04)
    s.block(x - 0.12, 0.55, x, 0.61, green, 0.03)
    s.block(x - 0.12, 0.46, x - 0.065, 0.61, green, 0.027)
    s.block(x, 0.63, x + 0.12, 0.69, green, 0.03)
    s.block(x + 0.065, 0.52, x + 0.12, 0.69, green, 0.027)


def _office(s: _Scene) -> None:
    s.fill((214, 222, 230), (190, 200, 212))
    x = s.rng.choice([0.04, 0.60]) + s.jitter(0.03)
    s.block(x - 0.02, 0.06, x + 0.38, 0.50, (250, 250, 250))  # window with blinds
    s.block(x, 0.08, x + 0.36, 0.48, (130, 184, 220))
    for y in np.arange(0.10, 0.48, 0.075):
        s.block(x, y, x + 0.36, y + 0.03, (240, 244, 248))
    shelf = 0.62 if x < 0.3 else 0.02
    s.block(shelf, 0.08, shelf + 0.36, 0.56, (120, 92, 72))
    books: tuple[Colour, ...] = ((60, 90, 150), (190, 70, 60), (230, 180, 70), (70, 140, 110), (236, 232, 222))
    for y in (0.11, 0.35):
        for i in range(6):
            left = shelf + 0.025 + i * 0.053
            s.block(left, y + s.rng.uniform(0, 0.05), left + 0.042, y + 0.18, books[int(s.rng.integers(5))])
    s.block(-0.1, 0.82, 1.1, 0.88, (150, 112, 80))  # desk
    s.block(-0.1, 0.88, 1.1, 1.1, (92, 100, 116))
    screen = s.rng.choice([0.13, 0.87])
    s.block(screen - 0.13, 0.58, screen + 0.13, 0.78, (44, 50, 62), 0.015)
    s.block(screen - 0.105, 0.605, screen + 0.105, 0.755, (96, 190, 210))
    s.block(screen - 0.03, 0.77, screen + 0.03, 0.83, (44, 50, 62))


def _snow(s: _Scene) -> None:
    s.fill((158, 188, 222), (222, 234, 246))
    s.triangle(0.2 + s.jitter(0.1), 0.14, 0.72, 0.42, (128, 150, 188))
    s.triangle(0.82 + s.jitter(0.1), 0.06, 0.72, 0.46, (144, 166, 202))
    s.hill(0.66, 0.04, 1.0, s.rng.random(), (236, 242, 250))
    for x in (0.08, 0.24, 0.78, 0.93):
        x += s.jitter(0.04)
        size = s.rng.uniform(0.85, 1.15)
        for top, bottom, half in ((0.40, 0.56, 0.08), (0.48, 0.68, 0.105), (0.58, 0.82, 0.13)):
            s.triangle(x, top, bottom, half * size, (38, 92, 96))
            s.triangle(x, top, top + 0.06, half * size * 0.42, (250, 252, 255))
    s.hill(0.84, 0.03, 1.4, s.rng.random(), (250, 252, 255))
    for _ in range(26):
        s.disc(s.rng.random(), s.rng.random(), 0.017, 0.017, (255, 255, 255))


def _garden(s: _Scene) -> None:
    s.fill((168, 220, 246), (214, 242, 250))
    s.disc(0.2 + s.jitter(0.15), 0.12, 0.13, 0.05, (255, 255, 255))
    s.disc(0.8 + s.jitter(0.12), 0.2, 0.12, 0.045, (255, 255, 255))
    for i in range(7):  # hedge
        s.disc(i / 6 + s.jitter(0.04), 0.50 + s.jitter(0.02), 0.12, 0.13, (88, 168, 72))
    s.block(-0.1, 0.50, 1.1, 0.9, (88, 168, 72))
    phase = s.rng.uniform(0, 0.1)
    for i in range(11):  # picket fence
        x = i * 0.1 - 0.05 + phase
        s.block(x - 0.03, 0.56, x + 0.03, 0.82, (252, 250, 244), 0.012)
        s.triangle(x, 0.52, 0.565, 0.03, (252, 250, 244))
    s.block(-0.1, 0.62, 1.1, 0.66, (240, 236, 226))
    s.block(-0.1, 0.80, 1.1, 1.1, (124, 196, 84))
    flowers: tuple[Colour, ...] = ((240, 80, 120), (250, 200, 60), (170, 90, 210), (250, 120, 60))
    for i in range(10):
        x, y = (i + 0.5) / 10 + s.jitter(0.03), 0.84 + s.rng.uniform(0, 0.12)
        s.block(x - 0.008, y, x + 0.008, y + 0.1, (60, 140, 60))
        s.disc(x, y, 0.036, 0.036, flowers[int(s.rng.integers(4))])
        s.disc(x, y, 0.013, 0.013, (255, 244, 200))


_DRAW: tuple[Callable[[_Scene], None], ...] = (
    _kitchen, _beach, _forest, _city, _desert, _office, _snow, _garden,
)  # fmt: skip
assert len(_DRAW) == len(PLACES)


def draw_backdrops(places: NDArray[np.int64], seeds: NDArray[np.int64], size: int) -> Floats:
    """Backdrops float32 (B, size, size, 3) in 0..255; equal for equal (place, seed)."""
    out = np.empty((len(places), size, size, 3), np.float32)
    for i, (place, seed) in enumerate(zip(places, seeds, strict=True)):
        scene = _Scene(size, np.random.default_rng([int(seed), int(place), 303]))
        _DRAW[int(place)](scene)
        tint = scene.rng.uniform(0.93, 1.06) * (1 + scene.rng.uniform(-0.04, 0.04, 3))
        out[i] = np.clip(scene.picture.transpose(1, 2, 0) * tint.astype(np.float32), 0, 255)
    return out
