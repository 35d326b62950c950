"""The example identities: ``python -m magicid.world.examples OUT`` writes their photos and a manifest.

People that networks are trained on come from ``sample_people`` with seeds below 1 000 000; the people here have seeds
of 9 000 000 and more, so no network has seen them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from magicid.world.language import caption
from magicid.world.renderer import photo_places, render_photos, sample_people

EXAMPLE_PEOPLE: tuple[tuple[str, int], ...] = (
    ("ada", 9_000_031),
    ("bruno", 9_000_033),
    ("chidi", 9_000_036),
    ("dana", 9_000_017),
)
"""Name and seed of the person."""

CLASS_WORD = "person"  # the same for all, so that they share the clips of the base model

PHOTO_COUNTS = (5, 6, 4, 5)
PHOTO_SIZE = 96


def write_examples(out: Path) -> list[dict[str, Any]]:
    """Write ``out/<name>/NN.png`` and ``out/manifest.jsonl``; returns the manifest's rows.

    Columns: id, owner, photos (paths relative to the manifest), captions, class_word, consent, priority.
    """
    rows: list[dict[str, Any]] = []
    for rank, ((name, seed), count) in enumerate(zip(EXAMPLE_PEOPLE, PHOTO_COUNTS, strict=True)):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        photos = []
        for number, photo in enumerate(render_photos(sample_people(1, seed)[0], count, seed, size=PHOTO_SIZE), 1):
            path = folder / f"{number:02d}.png"
            Image.fromarray(photo).save(path, optimize=True)
            photos.append(path.relative_to(out).as_posix())
        rows.append(
            {
                "id": name,
                "owner": "face-world",
                "photos": photos,
                "captions": [
                    caption(None, int(place), class_word="{class_word}") for place in photo_places(count, seed)
                ],
                "class_word": CLASS_WORD,
                "consent": f"synthetic:face-world/{seed}",
                "priority": len(EXAMPLE_PEOPLE) - rank,
            }
        )
    (out / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m magicid.world.examples OUT")
    for written in write_examples(Path(sys.argv[1])):
        print(written["id"], len(written["photos"]), "photos")
