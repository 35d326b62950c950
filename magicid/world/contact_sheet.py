"""A contact sheet: a clip of every action, generated and rendered, frames side by side."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from magicid.world.language import ACTIONS

SIDE, GAP, MARGIN, LABEL = 96, 2, 16, 18
SHOWN = 6  # frames of a clip
_INK, _PAPER = (60, 60, 66), (255, 255, 255)


def contact_sheet(
    generated: NDArray[np.uint8], rendered: NDArray[np.uint8], prompts: Sequence[str], rows: int = len(ACTIONS)
) -> Image.Image:
    """The first `rows` clips (N, F, H, W, 3), generated on the left and the renderer's of the same prompt on the right.

    The picture has 256 colours, which makes it a third of the size.
    """
    strip = SHOWN * (SIDE + GAP) - GAP
    width, height = 3 * MARGIN + 2 * strip, MARGIN + LABEL + rows * (SIDE + LABEL) + MARGIN
    sheet = Image.new("RGB", (width, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for column, (title, clips) in enumerate((("generated", generated), ("the renderer", rendered))):
        left = MARGIN + column * (strip + MARGIN)
        draw.text((left, MARGIN // 2), title, _INK, font)
        for row, frames in enumerate(clips[:rows]):
            top = MARGIN + LABEL + row * (SIDE + LABEL)
            if column == 0:
                draw.text((left, top + SIDE + 1), prompts[row], _INK, font)
            for number, index in enumerate(np.linspace(0, len(frames) - 1, SHOWN).round().astype(int)):
                shown = cv2.resize(frames[index], (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
                sheet.paste(Image.fromarray(shown), (left + number * (SIDE + GAP), top))
    return sheet.quantize(256, dither=Image.Dither.NONE)
