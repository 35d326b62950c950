"""What the autoencoder leaves of a person, on the shipped networks."""

from __future__ import annotations

import numpy as np
import pytest

from magicid import recipe
from magicid.laboratory.ceiling import THRESHOLD, Row, markdown, measure


def test_the_autoencoder_costs_identity_and_leaves_a_person() -> None:
    clips, decoded, photos, held = measure(recipe.load("face-world"), count=1)
    assert [row.name for row in (clips, decoded, photos, held)] == [
        "clips", "clips, decoded", "photos", "photos, decoded",
    ]  # fmt: skip
    assert clips.similarities.shape == decoded.similarities.shape == (len(clips.owners), 13)
    assert len(photos.owners) == 6
    assert clips.clips.mean() > 0.75
    assert 0.2 < decoded.clips.mean() < clips.clips.mean() - 0.05
    assert held.clips.mean() > decoded.clips.mean()
    assert photos.by_frame == pytest.approx(photos.by_frame[0])  # a photo held still is the same in every frame


def test_shares_and_frames_of_the_table() -> None:
    row = Row("x", np.array([[0.6, 0.5], [0.7, np.nan], [0.2, 0.4]]), [0, 0, 1])
    line = markdown([row]).splitlines()[2].split(" | ")
    assert THRESHOLD == 0.545
    assert line[2].startswith("0.46")  # people count alike: (0.55 + 0.7) / 2 and 0.3
    assert line[3].startswith("0.50 ")  # both of the first person's clips, none of the other's
    assert line[4:6] == ["0.500", "0.450"]
