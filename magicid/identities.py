"""Checked identities: every photo decoded safely, one usable face on each, all of the same person.

A photo that cannot be used is left out with a warning as long as enough remain; otherwise the identity is set aside
with all reasons. `read_manifest` and `ManifestRow` come from manifests.py.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from magicid import recipe as recipes
from magicid import storage_errors
from magicid.errors import IdentityError, MagicIDError, PhotoError, RecipeError
from magicid.manifests import ManifestRow, read_manifest
from magicid.photos import check_size, decode_photo
from magicid.prompts import for_class
from magicid.recipe import Recipe
from magicid.schema import Identity
from magicid.storage import file_size, join, public_name, public_text, read_bytes, sha256_bytes, write_bytes

__all__ = ["FaceReader", "ManifestRow", "check_consent", "check_identity", "read_manifest"]


class Face(Protocol):
    """One detected face: box (4,) x1 y1 x2 y2 px, unit embedding (D,), detector score 0..1."""

    @property
    def box(self) -> NDArray[np.float32]:
        """x1, y1, x2, y2 in px."""

    @property
    def embedding(self) -> NDArray[np.float32]:
        """Unit length."""

    @property
    def score(self) -> float:
        """Of the detector."""


class FaceReader(Protocol):
    """Finds and embeds faces; `magicid.rewards.identity.IdentityReward` is one."""

    def detect(self, image_HWC: NDArray[np.uint8]) -> Sequence[Face]:
        """All faces of an RGB photo, the largest first."""


@dataclass(frozen=True)
class _Photo:
    """A usable photo: its name in messages, caption, pixels and face."""

    name: str
    caption: str
    pixels: NDArray[np.uint8]  # (H, W, 3)
    face: Face


def check_identity(
    row: ManifestRow, recipe: Recipe, faces: FaceReader, metric_faces: FaceReader | None, run: str
) -> Identity:
    """Check one person's photos and write normalised PNG copies to `<run>/identities/<id>/photo-<n>.png`.

    A copy is upright RGB without metadata, cropped to the aspect of the recipe's clips around the face.

    Args:
        faces: the reward recogniser; its embeddings are the references and find outliers.
        metric_faces: the evaluation's recogniser, for `metric_references`; None: none are made.
        run: the run directory, a path or fsspec URL.

    Raises:
        IdentityError: no consent reference, an override the recipe refuses, or too few usable photos: all reasons are
            named.
        StorageError: the storage of a photo does not answer, or the copies cannot be written.
    """
    try:
        limits = recipe.for_identity(row.overrides).identities
    except RecipeError as error:
        raise IdentityError(f"{row.id}: {error.problem}", error.action) from error
    check_consent(row, limits)
    usable, warnings = _usable(row, limits, faces)
    usable, outliers = _without_outliers(usable, limits.outlier_similarity)
    warnings += outliers
    if len(usable) < limits.min_photos:
        reasons = "; ".join(warnings) or f"the manifest names {len(row.photos)}"
        raise IdentityError(
            f"{row.id} has {len(usable)} usable photos, {limits.min_photos} are needed: {reasons}",
            "replace these photos, or lower identities.min_photos",
        )
    metric_references, without = _metric_references(usable, metric_faces)
    warnings += without + _nameless(usable, row.class_word)
    uris = []
    for number, photo in enumerate(usable, start=1):
        uri = f"identities/{row.id}/photo-{number}.png"
        pixels = _crop(photo.pixels, photo.face.box, recipe.sampling.height / recipe.sampling.width)
        write_bytes(join(run, uri), _png(pixels))
        uris.append(uri)
    return Identity(
        identity_id=row.id,
        owner=row.owner,
        photos=uris,
        class_word=row.class_word,
        consent=row.consent,
        priority=row.priority,
        overrides=dict(row.overrides),
        references=[[float(x) for x in photo.face.embedding] for photo in usable],
        metric_references=metric_references,
        warnings=warnings,
        captions=[photo.caption for photo in usable],
    )


def check_consent(row: ManifestRow, limits: recipes.Identities) -> None:
    """Refuse a person without a reference to their consent, before any photo is read. Raises IdentityError."""
    if limits.require_consent and not (row.consent or "").strip():
        raise IdentityError(
            f"{row.id} has no consent reference",
            "name the person's consent in the manifest's column consent, or set identities.require_consent = false",
        )


def _usable(row: ManifestRow, limits: recipes.Identities, faces: FaceReader) -> tuple[list[_Photo], list[str]]:
    """The photos that show one usable face each, at most `max_photos`; and why the others are left out."""
    usable: list[_Photo] = []
    warnings: list[str] = []
    seen: dict[str, str] = {}
    for location, caption in itertools.zip_longest(row.photos, row.captions, fillvalue=""):
        name = "/".join(public_name(location).rsplit("/", 2)[-2:])
        if len(usable) == limits.max_photos:
            warnings.append(f"{name} is left out: {limits.max_photos} photos are enough")
            continue
        try:
            pixels = decode_photo(_read(location, name, limits), name, limits)
            digest = sha256_bytes(pixels.tobytes() + str(pixels.shape).encode())
            if digest in seen:
                raise PhotoError(f"{name} is the same picture as {seen[digest]}", "give different photos")
            seen[digest] = name
            usable.append(_Photo(name, caption, pixels, _one_face(pixels, name, limits, faces)))
        except MagicIDError as error:
            if storage_errors.transient(error):  # that says nothing of the photo, and what is kept is kept for good
                raise
            warnings.append(error.problem)
        except Exception as error:  # a recogniser that fails on one photo; the person's others go on
            warnings.append(f"{name} cannot be checked: {_reason(error)}")
    return usable, warnings


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {public_text(str(error))}"


def _metric_references(photos: list[_Photo], faces: FaceReader | None) -> tuple[list[list[float]], list[str]]:
    """The evaluation recogniser's embeddings; and which photos have none, and why."""
    references: list[list[float]] = []
    warnings: list[str] = []
    for photo in photos if faces is not None else ():
        try:
            found = faces.detect(photo.pixels) if faces is not None else ()
        except Exception as error:
            warnings.append(f"{photo.name} cannot be read by the evaluation's recogniser: {_reason(error)}")
            continue
        if found:
            references.append([float(x) for x in found[0].embedding])
        else:
            warnings.append(f"{photo.name} shows no face to the evaluation's recogniser")
    return references, warnings


def _nameless(photos: list[_Photo], class_word: str) -> list[str]:
    """Which captions do not call the person what prompts will call them; the person is learned under other words."""
    return [
        f"the caption of {photo.name} does not say {class_word!r} or {{class_word}}, which prompts call the person"
        for photo in photos
        if photo.caption and not re.search(rf"\b{re.escape(class_word)}\b", for_class(photo.caption, class_word))
    ]


def _read(location: str, name: str, limits: recipes.Identities) -> bytes:
    """The bytes of a photo file; its size is checked before it is read."""
    check_size(file_size(location), name, limits)
    return read_bytes(location)


def _one_face(pixels: NDArray[np.uint8], name: str, limits: recipes.Identities, faces: FaceReader) -> Face:
    """The one face that is large enough; smaller ones in the background do not count."""
    found = [face for face in faces.detect(pixels) if face.score >= limits.detection_threshold]
    large = [face for face in found if _shorter_side(face) >= limits.min_face_px]
    if not found:
        raise PhotoError(f"{name} shows no face", "give a photo in which the face is seen clearly")
    if not large:
        size = max(_shorter_side(face) for face in found)
        raise PhotoError(
            f"{name} shows a face of {size:.0f} px, {limits.min_face_px} are needed", "give a larger photo of the face"
        )
    if len(large) > 1:
        raise PhotoError(f"{name} shows {len(large)} faces", "give a photo of one person, or crop it")
    return large[0]


def _shorter_side(face: Face) -> float:
    x1, y1, x2, y2 = face.box
    return float(min(x2 - x1, y2 - y1))


def _without_outliers(photos: list[_Photo], threshold: float) -> tuple[list[_Photo], list[str]]:
    """Leave out, worst first, the photo whose mean cosine with the others is below the threshold, until none is."""
    kept, warnings = list(photos), []
    while len(kept) > 1:
        embeddings = np.stack([photo.face.embedding for photo in kept]).astype(np.float64)
        cosines = embeddings @ embeddings.T
        means = (cosines.sum(axis=1) - np.diag(cosines)) / (len(kept) - 1)
        worst = int(np.argmin(means))
        if means[worst] >= threshold:
            break
        photo = kept.pop(worst)
        warnings.append(
            f"{photo.name} does not look like the same person as the others (similarity {means[worst]:.2f})"
        )
    return kept, warnings


def _crop(pixels: NDArray[np.uint8], box: NDArray[np.float32], aspect: float) -> NDArray[np.uint8]:
    """The largest part of height / width `aspect` whose centre is nearest to the face's.

    Cropping a portrait to a wide clip at the photo's own centre would often cut the face away.
    """
    height, width = pixels.shape[:2]
    crop_height, crop_width = min(height, round(width * aspect)), min(width, round(height / aspect))
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    top = int(np.clip(round(float(y) - crop_height / 2), 0, height - crop_height))
    left = int(np.clip(round(float(x) - crop_width / 2), 0, width - crop_width))
    return pixels[top : top + crop_height, left : left + crop_width]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """Pixels alone: no metadata of the original (place, device) travels on."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
