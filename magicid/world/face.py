"""The cartoon person: flat cards, back to front, each carried by its own affine map (2.5D)."""

from __future__ import annotations

import numpy as np

from magicid.world.drawing import Floats, Painter, affine, box, col, coverage, ellipse
from magicid.world.motion_paths import EYES, GAZE, MOUTH, PITCH, ROLL, SCALE, SMILE, YAW, X, Y
from magicid.world.people import Looks

HEAD = 0.26
"""Half the head's height at scale 1, in frame heights."""

LAYERS: tuple[str, ...] = (
    "backdrop", "body", "hair_back", "neck", "ears", "head", "beard", "lips", "mouth", "nose", "eyes", "iris", "brows",
    "glasses", "hair_front",
)  # fmt: skip
_INDEX = {name: index for index, name in enumerate(LAYERS)}

# How far a card slides over the head for a full yaw, in head units: cards nearer to the viewer slide further.
_DEPTH = {
    "hair_back": -0.12, "ears": -0.05, "head": 0.10, "beard": 0.26, "lips": 0.37, "mouth": 0.37, "nose": 0.50,
    "eyes": 0.34, "iris": 0.34, "brows": 0.34, "glasses": 0.36, "hair_front": 0.24,
}  # fmt: skip
_NECK = 1.05


def head_frame(pose: Floats, size: int) -> tuple[Floats, Floats, Floats]:
    """Head centre x, y and pixels per head unit, each (N,), after the head has tipped about the neck."""
    scale = pose[:, SCALE] * (HEAD * size)
    roll = pose[:, ROLL]
    x = pose[:, X] * size + scale * (_NECK * np.sin(roll) + 0.08 * pose[:, YAW])
    y = pose[:, Y] * size + scale * (_NECK * (1 - np.cos(roll)) + 0.13 * pose[:, PITCH])
    return x, y, scale


def card_maps(looks: Looks, pose: Floats, size: int) -> Floats:
    """Card-to-screen maps (N, L, 2, 3) of all layers for poses (N, K)."""
    n = len(pose)
    x, y, scale = head_frame(pose, size)
    yaw, pitch, roll, mouth = pose[:, YAW], pose[:, PITCH], pose[:, ROLL], pose[:, MOUTH]
    zero, one = np.zeros(n, np.float32), np.ones(n, np.float32)
    maps = np.zeros((n, len(LAYERS), 2, 3), np.float32)
    maps[:, 0, 0, 0] = maps[:, 0, 1, 1] = 1
    maps[:, _INDEX["body"]] = affine(pose[:, X] * size, pose[:, Y] * size, scale, zero, zero, zero, one, one)
    maps[:, _INDEX["neck"]] = affine(
        (pose[:, X] * size + x) / 2, (pose[:, Y] * size + y) / 2, scale, roll * 0.5, zero, zero, one, one
    )
    for name, depth in _DEPTH.items():
        dx, dy = depth * yaw, 0.62 * depth * pitch
        ax = 1 - 0.16 * np.abs(yaw) if depth > 0.25 else one
        ay = one
        if name == "lips":
            dy, ay = dy + 0.05 * mouth, 1 + 1.9 * mouth
        elif name == "mouth":
            dy, ay = dy + 0.05 * mouth, 0.14 + mouth
        elif name == "beard":
            dy = dy + 0.04 * mouth
        elif name == "eyes":
            ay = 0.12 + 0.88 * pose[:, EYES]
        elif name == "iris":
            dx = dx + 0.055 * pose[:, GAZE]
        if name in ("eyes", "iris"):
            dy = dy - 0.02
        if name in ("lips", "mouth"):
            dy = dy + 0.57
        maps[:, _INDEX[name]] = affine(x, y, scale, roll, dx, dy, ax, ay)
    return maps


def _head_distance(x: Floats, y: Floats, looks: Looks) -> Floats:
    """Head outline: a squircle whose lower half narrows towards the chin."""
    low = np.clip(y, 0, 1.1)
    qx = x / (col(looks.half_width) * (1 - col(looks.taper) * low * low))
    qx *= qx
    qy = y * y
    k = np.sqrt(np.maximum(qx + qy - col(looks.squareness) * np.minimum(qx, 1) * np.minimum(qy, 1), 0))
    return (k - 1) * np.float32(0.85)


def draw_people(painter: Painter, looks: Looks, pose: Floats, size: int) -> Floats:
    """Paint one person per picture; returns the card maps (N, L, 2, 3)."""
    maps = card_maps(looks, pose, size)
    scale = pose[:, SCALE] * (HEAD * size)
    n = len(pose)
    one = np.ones(n, np.float32)
    width = looks.half_width
    shade = looks.skin * np.array([[0.80, 0.74, 0.74]], np.float32)

    def at(name: str) -> tuple[Floats, int]:
        return maps[:, _INDEX[name]], _INDEX[name]

    # Body: a rounded bust that goes on below the frame.
    card, layer = at("body")
    w = painter.window(card, -1.55 * one, 1.1 * one, 1.55 * one, 3.6 * one)
    cover = coverage(ellipse(w.x, np.minimum(w.y - 2.25, 0), 1.42, 1.02), scale)
    light = 1.04 - 0.10 * w.x - 0.06 * (w.y - 1.5)
    w.paint(cover, looks.shirt, layer, light)
    collar = np.abs(ellipse(w.x, w.y - 1.22, 0.50, 0.40)) - 0.07
    w.paint(coverage(collar, scale) * cover, looks.shirt * 0.72, layer)

    # Long hair hangs behind the neck; short hair only rounds the skull.
    card, layer = at("hair_back")
    reach = width + 0.04 + 0.55 * looks.hair_rise
    crown = -1.02 - looks.hair_rise
    bottom = looks.hair_bottom
    knot = -1.08 - 0.65 * looks.hair_rise
    w = painter.window(card, -reach, np.minimum(crown, knot - 0.30 * looks.bun), reach, np.maximum(bottom, 0.1))
    shape = ellipse(w.x, w.y + 0.06, col(reach - 0.01), col(-crown - 0.06))
    half = np.maximum(bottom + 0.5, 0.3) / 2
    fall = box(w.x, w.y - col(half - 0.5), col(reach), col(half), col(np.minimum(half, 0.34)))
    shape = np.minimum(np.maximum(shape, w.y - 0.1), fall + col(np.where(bottom > -0.2, 0, 9)))
    shape = np.minimum(shape, np.hypot(w.x, w.y - col(knot)) - col(0.32 * looks.bun - 0.05))
    dark = looks.hair * 0.80
    w.paint(coverage(shape, scale) * col(looks.hair_amount), dark, layer, 1.02 - 0.06 * w.y)

    card, layer = at("neck")
    w = painter.window(card, -0.36 * one, 0.5 * one, 0.36 * one, 1.5 * one)
    shape = box(w.x, w.y - 0.95, 0.34, 0.50, 0.30)
    w.paint(coverage(shape, scale), shade, layer)

    card, layer = at("ears")
    w = painter.window(card, -width - 0.16, -0.22 * one, width + 0.16, 0.30 * one)
    shape = ellipse(np.abs(w.x) - col(width - 0.01), w.y - 0.04, 0.13, 0.20)
    w.paint(coverage(shape, scale), looks.skin * 0.90, layer)

    card, layer = at("head")
    w = painter.window(card, -width, -one, width, one)
    cover = coverage(_head_distance(w.x, w.y, looks), scale)
    light = 1.03 - 0.07 * w.x - 0.05 * w.y
    w.paint(cover, looks.skin, layer, light)
    cheeks = np.clip(1 - (np.square(np.abs(w.x) - 0.42) + np.square(w.y - 0.32)) / 0.045, 0, 1) * 0.28
    w.paint(cheeks * cover, looks.skin * 0.45 + looks.lips * 0.62, None)

    # Hair on the skull itself, seen at the back when the cap in front turns away.
    skull = np.maximum(-ellipse(w.x, w.y - 0.35, col(width * 0.98), 1.06), w.y + 0.05)
    w.paint(coverage(skull, scale) * cover * col(looks.hair_amount), looks.hair * 0.86, None)

    # The beard is the lower face, cut by the head's own outline.
    card, layer = at("beard")
    w = painter.window(card, -width - 0.1, -0.1 * one, width + 0.1, 1.08 * one)
    outline = _head_distance(w.x, w.y - 0.03, looks) - 0.03
    shave = -ellipse(w.x, w.y - 0.10, col(width * 0.90), col(looks.beard_top * 0.25 + 0.22))
    shape = np.maximum(np.maximum(outline, shave), col(looks.beard_top - 0.12) - w.y)
    w.paint(coverage(shape, scale) * col(looks.beard), looks.hair * 0.88, layer)

    card, layer = at("lips")
    wide = looks.mouth_rx
    w = painter.window(card, -wide - 0.02, -0.28 * one, wide + 0.02, 0.22 * one)
    bend = col(1.7 * pose[:, SMILE])
    curved = w.y + bend * (w.x * w.x) / (1 + 2 * col(pose[:, MOUTH]))
    shape = ellipse(w.x, curved, col(wide), col(looks.lip_ry))
    w.paint(coverage(shape, scale), looks.lips, layer)

    card, layer = at("mouth")
    w = painter.window(card, -wide, -0.6 * one, wide, 0.22 * one)
    stretch = 0.14 + pose[:, MOUTH]
    curved = w.y + bend * (w.x * w.x) / col(stretch * (1 + 2 * pose[:, MOUTH]))
    inner = 0.045 + 0.12 * np.minimum(1.0, looks.lip_ry / 0.1)
    # Distances in this card are squeezed vertically by the opening.
    shape = ellipse(w.x, curved * col(stretch), col(wide * 0.84), col(inner * stretch))
    teeth = np.clip((-0.25 - curved / col(inner)) * 4, 0, 1) * col(np.clip(pose[:, MOUTH] * 3 - 0.4, 0, 1))
    inside = [gum + teeth * white for gum, white in ((96, 150), (34, 205), (44, 190))]
    w.paint(coverage(shape, scale), inside, layer)

    card, layer = at("nose")
    w = painter.window(card, -looks.nose_rx - 0.05, -0.1 * one, looks.nose_rx + 0.05, looks.nose_y + 0.12)
    tip = ellipse(w.x, w.y - col(looks.nose_y), col(looks.nose_rx), 0.085)
    bridge = box(w.x, w.y - col(looks.nose_y / 2), 0.045, col(looks.nose_y / 2), 0.04)
    w.paint(coverage(np.minimum(tip, bridge), scale), shade, layer)

    card, layer = at("eyes")
    rx, ry, ex = looks.eye_rx, looks.eye_ry, looks.eye_x
    open_ = 0.12 + 0.88 * pose[:, EYES]
    w = painter.window(card, -ex - rx - 0.05, -ry * 1.6, ex + rx + 0.05, ry * 1.4)
    side = np.abs(w.x) - col(ex)
    lash = ellipse(side, (w.y + 0.25 * col(ry)) * col(open_), col(rx * 1.12), col(ry * open_ * 1.05))
    w.paint(coverage(lash, scale), looks.skin * 0.22 + 12, layer)
    white = ellipse(side, w.y * col(open_), col(rx), col(ry * open_))
    w.paint(coverage(white, scale), np.full((n, 3), 250, np.float32), layer)

    # The iris slides within the white, so it is cut by the white's shape in its own coordinates.
    eye_card = card
    card, layer = at("iris")
    radius = 0.78 * ry + 0.03
    w = painter.window(card, -ex - rx, -radius, ex + rx, radius)
    disc = np.hypot(np.abs(w.x) - col(ex), w.y)
    gaze = col(0.055 * pose[:, GAZE] / eye_card[:, 0, 0] * scale * np.cos(pose[:, ROLL]))
    cut = ellipse(np.abs(w.x + gaze) - col(ex), w.y, col(rx), col(ry * open_))
    w.paint(coverage(np.maximum(disc - col(radius), cut), scale), looks.iris, layer)
    w.paint(coverage(np.maximum(disc - col(radius * 0.52), cut), scale), np.full((n, 3), 16, np.float32), layer)

    card, layer = at("brows")
    high = -(looks.eye_ry + 0.16)
    reach = 0.24 * one
    w = painter.window(card, -ex - reach, high - 0.2, ex + reach, high + 0.2)
    side = np.abs(w.x) - col(ex)
    line = w.y - col(high) - col(looks.brow_tilt) * side - 1.1 * side * side
    shape = box(side, line, 0.20, col(looks.brow), 0.03)
    brow = np.where(looks.hair.mean(1, keepdims=True) > 150, looks.hair * 0.62, looks.hair * 0.72 + 6)
    w.paint(coverage(shape, scale), brow.astype(np.float32), layer)

    card, layer = at("glasses")
    lens = 0.25 * one
    w = painter.window(card, -width - 0.05, -0.34 * one, width + 0.05, 0.34 * one)
    side = np.abs(w.x) - col(np.maximum(ex, 0.31))
    soft = 0.08 + 0.16 * looks.glasses_round
    rim = box(side, w.y - 0.01, col(lens), col(lens * 0.80 + 0.05 * looks.glasses_round), col(soft))
    bar = np.maximum(np.abs(w.y + 0.04) - 0.04, -rim)
    bar = np.maximum(bar, np.abs(w.x) - col(width))
    w.paint(coverage(rim, scale) * col(0.16 * looks.glasses), np.full((n, 3), 235, np.float32), None)
    w.paint(coverage(np.minimum(np.abs(rim) - 0.052, bar), scale) * col(looks.glasses), looks.frame, layer)

    # Hair in front: the skull's cap with an opening for the face; both move as one card.
    card, layer = at("hair_front")
    rise = looks.hair_rise
    rx = width + 0.03 + 0.45 * rise
    w = painter.window(card, -rx, -1.02 - rise, rx, 0.25 * one)
    cap = ellipse(w.x, w.y + 0.06, col(rx), col(0.97 + rise))
    wide = width * 0.90
    lean = w.x - col(0.35 * looks.parting)
    edge = col(looks.fringe_y) + 0.42 * lean * col(looks.parting) - w.y
    open_face = ellipse(w.x, w.y - 0.35, col(wide), 1.05)
    hole = np.maximum(open_face, edge)
    shape = np.maximum(np.maximum(cap, -hole), w.y - 0.12)
    light = 1.0 + 0.22 * np.clip(1 - np.square((w.y + 0.72) / 0.18) - np.square((w.x + 0.25) / 0.45), 0, 1)
    light -= 0.06 * w.y
    shiny = [np.minimum(col(looks.hair[:, c]) * light, 255) for c in range(3)]
    w.paint(coverage(shape, scale) * col(looks.hair_amount), shiny, layer)
    return maps


def face_boxes(looks: Looks, pose: Floats, maps: Floats, size: int) -> Floats:
    """Boxes (N, 4) as x1, y1, x2, y2 px around the skin of the face, hair left out."""
    card = maps[:, _INDEX["head"]]
    hx = np.hypot(card[:, 0, 0] * looks.half_width, card[:, 0, 1])
    hy = np.hypot(card[:, 1, 0] * looks.half_width, card[:, 1, 1])
    x, y = card[:, 0, 2], card[:, 1, 2]
    return np.stack([x - hx, y - hy, x + hx, y + hy], axis=1)


def face_landmarks(looks: Looks, maps: Floats) -> Floats:
    """Landmarks (N, 5, 2) px: left eye, right eye, nose, left and right mouth corner (left in the picture)."""
    zero = np.zeros_like(looks.eye_x)
    points = (
        ("eyes", -looks.eye_x, zero),
        ("eyes", looks.eye_x, zero),
        ("nose", zero, looks.nose_y),
        ("lips", -looks.mouth_rx, zero),
        ("lips", looks.mouth_rx, zero),
    )
    out = np.empty((len(zero), 5, 2), np.float32)
    for i, (name, x, y) in enumerate(points):
        card = maps[:, _INDEX[name]]
        out[:, i] = card[:, :, 0] * x[:, None] + card[:, :, 1] * y[:, None] + card[:, :, 2]
    return out
