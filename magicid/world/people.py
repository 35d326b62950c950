"""Identity parameters of the face world and the colours and proportions they stand for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from magicid.world.drawing import Floats

PARAMETERS: tuple[str, ...] = (
    "skin_tone",
    "skin_hue",
    "face_width",
    "jaw",
    "eye_distance",
    "eye_size",
    "iris_colour",
    "brow_thickness",
    "brow_tilt",
    "nose_length",
    "nose_width",
    "mouth_width",
    "lip_colour",
    "hair_colour",
    "hair_length",
    "hair_volume",
    "fringe",
    "parting",
    "bun",
    "beard",
    "glasses",
    "shirt",
)

_SKIN = ((74, 44, 32), (112, 68, 46), (152, 98, 66), (190, 132, 92), (222, 170, 128), (243, 204, 168), (252, 226, 204))
_HAIR = (
    (28, 24, 30), (62, 38, 28), (112, 64, 36), (176, 74, 34), (226, 142, 52), (240, 206, 122), (232, 226, 214),
    (142, 144, 154), (62, 92, 148), (118, 70, 150), (206, 88, 130),
)  # fmt: skip
_IRIS = ((52, 32, 24), (104, 64, 30), (112, 122, 50), (52, 132, 92), (58, 126, 178), (112, 132, 150))
_LIPS = ((150, 84, 76), (196, 96, 88), (206, 62, 78), (158, 42, 76))
_SHIRT = (
    (196, 62, 58), (232, 142, 58), (244, 206, 92), (98, 160, 96), (58, 148, 150), (66, 100, 176), (132, 86, 164),
    (226, 130, 160), (240, 236, 226),
)  # fmt: skip


def sample_people(n: int, seed: int) -> Floats:
    """``n`` random people, float32 (n, P) in 0..1, columns as in ``PARAMETERS``.

    By convention networks are trained on people of seeds below 1 000 000; seeds of 9 000 000 and more are the examples.
    """
    return np.random.default_rng([seed, 101]).random((n, len(PARAMETERS)), dtype=np.float32)


def ramp(stops: tuple[tuple[int, int, int], ...], position: Floats) -> Floats:
    """Colour (N, 3) in 0..255 at ``position`` (N,) in 0..1 along evenly spaced colour stops."""
    table = np.asarray(stops, np.float32)
    place = np.clip(position, 0, 1) * (len(stops) - 1)
    low = np.minimum(place.astype(np.int64), len(stops) - 2)
    part = (place - low)[:, None].astype(np.float32)
    return table[low] * (1 - part) + table[low + 1] * part


def ease(low: float, high: float, value: Floats) -> Floats:
    """Smoothstep of ``value`` from 0 at ``low`` to 1 at ``high``."""
    part = np.clip((value - low) / (high - low), 0, 1)
    return (part * part * (3 - 2 * part)).astype(np.float32)


@dataclass(frozen=True)
class Looks:
    """Colours (N, 3) in 0..255 and proportions (N,) in head units (1 = half the head's height)."""

    skin: Floats
    hair: Floats
    iris: Floats
    lips: Floats
    shirt: Floats
    frame: Floats
    half_width: Floats
    taper: Floats
    squareness: Floats
    eye_x: Floats
    eye_rx: Floats
    eye_ry: Floats
    brow: Floats
    brow_tilt: Floats
    nose_y: Floats
    nose_rx: Floats
    mouth_rx: Floats
    lip_ry: Floats
    hair_amount: Floats
    hair_bottom: Floats
    hair_rise: Floats
    fringe_y: Floats
    parting: Floats
    bun: Floats
    beard: Floats
    beard_top: Floats
    glasses: Floats
    glasses_round: Floats

    def repeat(self, frames: int) -> Looks:
        """The same looks with every row repeated ``frames`` times."""
        return Looks(**{name: np.repeat(value, frames, axis=0) for name, value in self.__dict__.items()})

    def rows(self, index: slice) -> Looks:
        """The looks of some rows."""
        return Looks(**{name: value[index] for name, value in self.__dict__.items()})


def looks(people: Floats) -> Looks:
    """Colours and proportions of people (N, P) in 0..1."""
    p = {name: people[:, i] for i, name in enumerate(PARAMETERS)}
    warm = (p["skin_hue"] - 0.5)[:, None] * np.array([[10, -12, -34]], np.float32)
    skin = np.clip(ramp(_SKIN, p["skin_tone"]) + warm, 20, 255)
    hair = ramp(_HAIR, p["hair_colour"])
    # Lips keep some of the skin's own colour so that they sit on every tone.
    lips = 0.75 * ramp(_LIPS, p["lip_colour"]) + 0.25 * skin
    half_width = 0.70 + 0.22 * p["face_width"]
    glasses = ease(0.58, 0.64, p["glasses"])
    frame = ramp(((30, 28, 36), (120, 50, 40), (40, 70, 120)), (p["glasses"] - 0.6) / 0.4)
    volume = p["hair_volume"]
    return Looks(
        skin=skin.astype(np.float32),
        hair=hair,
        iris=ramp(_IRIS, p["iris_colour"]),
        lips=lips,
        shirt=ramp(_SHIRT, p["shirt"]),
        frame=frame,
        half_width=half_width,
        taper=0.42 - 0.34 * p["jaw"],
        squareness=0.05 + 0.35 * p["jaw"],
        eye_x=(0.27 + 0.12 * p["eye_distance"]) * (0.6 + 0.5 * half_width),
        eye_rx=0.135 + 0.075 * p["eye_size"],
        eye_ry=0.105 + 0.085 * p["eye_size"],
        brow=0.028 + 0.065 * p["brow_thickness"],
        brow_tilt=(p["brow_tilt"] - 0.55) * 0.6,
        nose_y=0.20 + 0.15 * p["nose_length"],
        nose_rx=0.075 + 0.10 * p["nose_width"],
        mouth_rx=0.20 + 0.17 * p["mouth_width"],
        lip_ry=0.06 + 0.05 * p["lip_colour"],
        hair_amount=ease(0.05, 0.07, p["hair_length"]),
        hair_bottom=-0.25 + 1.7 * ease(0.25, 0.9, p["hair_length"]),
        hair_rise=0.03 + 0.40 * volume * volume,
        fringe_y=-0.66 + 0.34 * p["fringe"],
        parting=(p["parting"] - 0.5) * 0.7,
        bun=ease(0.72, 0.80, p["bun"]) * ease(0.05, 0.07, p["hair_length"]),
        beard=ease(0.60, 0.68, p["beard"]),
        beard_top=0.52 - 0.42 * ease(0.65, 1.0, p["beard"]),
        glasses=glasses,
        glasses_round=ease(0.7, 0.9, p["glasses"]),
    )
