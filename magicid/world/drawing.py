"""Anti-aliased painting of signed-distance shapes into a batch of pictures, and the flow of what was painted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = NDArray[np.floating[Any]]


def affine(
    centre_x: Floats, centre_y: Floats, scale: Floats, roll: Floats, dx: Floats, dy: Floats, ax: Floats, ay: Floats
) -> Floats:
    """Maps (N, 2, 3) from a card to the screen: stretch by (ax, ay), shift by (dx, dy), rotate, scale, centre."""
    cos, sin = np.cos(roll) * scale, np.sin(roll) * scale
    out = np.empty((len(scale), 2, 3), np.float32)
    out[:, 0, 0], out[:, 0, 1] = cos * ax, -sin * ay
    out[:, 1, 0], out[:, 1, 1] = sin * ax, cos * ay
    out[:, 0, 2] = centre_x + cos * dx - sin * dy
    out[:, 1, 2] = centre_y + sin * dx + cos * dy
    return out


def inverse(maps: Floats) -> Floats:
    """Inverse of affine maps (..., 2, 3)."""
    a, b, c, d = maps[..., 0, 0], maps[..., 0, 1], maps[..., 1, 0], maps[..., 1, 1]
    x, y = maps[..., 0, 2], maps[..., 1, 2]
    det = a * d - b * c
    out = np.empty_like(maps)
    out[..., 0, 0], out[..., 0, 1] = d / det, -b / det
    out[..., 1, 0], out[..., 1, 1] = -c / det, a / det
    out[..., 0, 2] = -(d * x - b * y) / det
    out[..., 1, 2] = (c * x - a * y) / det
    return out


def col(values: Floats) -> Floats:
    """(N,) as (N, 1, 1), to meet a window's pixels."""
    return values[:, None, None]


def ellipse(x: Floats, y: Floats, rx: Floats | float, ry: Floats | float) -> Floats:
    """Signed distance (first-order) to an ellipse at the origin, in the units of x and y."""
    qx, qy = x / rx, y / ry
    k0 = np.sqrt(qx * qx + qy * qy)
    qx /= rx
    qy /= ry
    k1 = np.sqrt(qx * qx + qy * qy) + np.float32(1e-6)
    return k0 * (k0 - 1) / k1


def box(x: Floats, y: Floats, rx: Floats | float, ry: Floats | float, radius: Floats | float) -> Floats:
    """Signed distance to a rounded box at the origin with half sizes rx, ry."""
    qx, qy = np.abs(x) - rx + radius, np.abs(y) - ry + radius
    outside = np.hypot(np.maximum(qx, 0), np.maximum(qy, 0))
    return outside + np.minimum(np.maximum(qx, qy), 0) - radius


class Painter:
    """Composites shapes back to front into pictures (N, H, W, 3) and remembers the topmost layer of each pixel.

    Each shape is evaluated only in a window around it, and colours are kept as planes (3, N * H * W): both are what
    makes a batch cheap.
    """

    def __init__(self, pictures_NHWC: Floats) -> None:
        self.count, self.height, self.width, _ = pictures_NHWC.shape
        self._planes = np.ascontiguousarray(pictures_NHWC.reshape(-1, 3).T)
        self._layers = np.zeros(self._planes.shape[1], np.uint8)
        self._open: Window | None = None

    def window(self, maps: Floats, left: Floats, top: Floats, right: Floats, bottom: Floats) -> Window:
        """Pixels around the card rectangle left..right, top..bottom (each (N,)), in card coordinates."""
        self._flush()
        cx, cy, hx, hy = (left + right) / 2, (top + bottom) / 2, (right - left) / 2, (bottom - top) / 2
        mx = maps[:, 0, 0] * cx + maps[:, 0, 1] * cy + maps[:, 0, 2]
        my = maps[:, 1, 0] * cx + maps[:, 1, 1] * cy + maps[:, 1, 2]
        ex = np.abs(maps[:, 0, 0]) * hx + np.abs(maps[:, 0, 1]) * hy + 1.0
        ey = np.abs(maps[:, 1, 0]) * hx + np.abs(maps[:, 1, 1]) * hy + 1.0
        # Parts outside the frame need no pixels.
        x0, x1 = np.clip(np.floor(mx - ex), 0, self.width), np.clip(np.ceil(mx + ex), 0, self.width)
        y0, y1 = np.clip(np.floor(my - ey), 0, self.height), np.clip(np.ceil(my + ey), 0, self.height)
        w, h = max(int((x1 - x0).max()), 1), max(int((y1 - y0).max()), 1)
        xs = np.minimum(x0, self.width - w).astype(np.int64)[:, None] + np.arange(w)
        ys = np.minimum(y0, self.height - h).astype(np.int64)[:, None] + np.arange(h)
        rows = np.arange(self.count)[:, None] * self.height + ys
        index = rows[:, :, None] * self.width + xs[:, None, :]
        back = inverse(maps)
        u, v = xs.astype(np.float32) + np.float32(0.5), ys.astype(np.float32) + np.float32(0.5)
        x = (back[:, 0, 0, None] * u)[:, None, :] + (back[:, 0, 1, None] * v + back[:, 0, 2, None])[:, :, None]
        y = (back[:, 1, 0, None] * u)[:, None, :] + (back[:, 1, 1, None] * v + back[:, 1, 2, None])[:, :, None]
        self._open = Window(index, x, y, self._planes.take(index, axis=1), self._layers.take(index))
        return self._open

    def _flush(self) -> None:
        if self._open is not None:
            for plane, patch in zip(self._planes, self._open.planes, strict=True):
                plane[self._open.index] = patch
            self._layers[self._open.index] = self._open.layers
            self._open = None

    def pictures(self) -> Floats:
        """What was painted, (N, 3, H, W), 0..255."""
        self._flush()
        return self._planes.reshape(3, self.count, self.height, self.width).transpose(1, 0, 2, 3)

    def layers(self) -> NDArray[np.uint8]:
        """Topmost layer (N, H, W) of every pixel, 0 where nothing was painted."""
        self._flush()
        return self._layers.reshape(self.count, self.height, self.width)


class Window:
    """The pixels of one window per picture: card coordinates ``x``, ``y`` (N, h, w) and what they show so far."""

    def __init__(
        self, index: NDArray[np.int64], x: Floats, y: Floats, planes: Floats, layers: NDArray[np.uint8]
    ) -> None:
        self.index, self.x, self.y, self.planes, self.layers = index, x, y, planes, layers

    def paint(
        self, cover: Floats, colour: Floats | Sequence[Floats], layer: int | None, light: Floats | None = None
    ) -> None:
        """Blend a colour in with coverage (N, h, w) in 0..1; ``layer`` owns the pixels where it wins.

        ``colour`` is (N, 3), or three planes (N, h, w); ``light`` (N, h, w) multiplies it.
        """
        planes = [col(colour[:, c]) for c in range(3)] if isinstance(colour, np.ndarray) else colour
        for patch, plane in zip(self.planes, planes, strict=True):
            new = plane - patch if light is None else plane * light - patch
            new *= cover
            patch += new
        if layer is not None:
            self.layers[cover > 0.5] = layer


def coverage(distance: Floats, pixels: Floats) -> Floats:
    """Coverage in 0..1 from a signed distance in card units and the number of pixels per unit (N,)."""
    return np.clip(0.5 - distance * col(pixels), 0, 1)


def layer_flow(layers: NDArray[np.uint8], maps: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Forward flow of the topmost layers and where it is visible.

    Args:
        layers: topmost layer (B, F, H, W) per pixel, 0 = backdrop.
        maps: card-to-screen maps (B, F, L, 2, 3) of every layer; the backdrop's is the identity.

    Returns:
        flow (B, F-1, H, W, 2) in px as (x, y), and valid (B, F-1, H, W): the target lies in the frame and shows the
        same layer in the next frame.
    """
    batch, frames, height, width = layers.shape
    now, then = inverse(maps[:, :-1]), maps[:, 1:]
    step = np.empty_like(then)
    step[..., :2] = then[..., :2] @ now[..., :2]
    step[..., 2] = (then[..., :2] @ now[..., 2:])[..., 0] + then[..., 2]
    step[..., 0, 0] -= 1
    step[..., 1, 1] -= 1
    count = maps.shape[2]
    clip = np.arange(batch * (frames - 1), dtype=np.int64).reshape(batch, frames - 1, 1, 1) * count
    rows = step.reshape(-1, 6)[clip + layers[:, :-1]]
    x = np.arange(width, dtype=np.float32) + np.float32(0.5)
    y = (np.arange(height, dtype=np.float32) + np.float32(0.5))[:, None]
    flow = np.empty((batch, frames - 1, height, width, 2), np.float32)
    flow[..., 0] = rows[..., 0] * x + rows[..., 1] * y + rows[..., 2]
    flow[..., 1] = rows[..., 3] * x + rows[..., 4] * y + rows[..., 5]
    to_x = np.floor(x + flow[..., 0]).astype(np.int64)
    to_y = np.floor(y + flow[..., 1]).astype(np.int64)
    inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
    np.clip(to_x, 0, width - 1, out=to_x)
    np.clip(to_y, 0, height - 1, out=to_y)
    picture = np.arange(batch * frames, dtype=np.int64).reshape(batch, frames, 1, 1)[:, 1:]
    target = layers.reshape(-1)[(picture * height + to_y) * width + to_x]
    return flow, inside & (target == layers[:, :-1])
