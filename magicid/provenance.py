"""Provenance: a signed C2PA manifest inside a clip or image which says that it is made by AI, and by which model.

It names the generator, the base model and the adapter's version, which is a hash: no person, owner, prompt or request.
Whoever passes a clip on passes its manifest on, and the person on it did not ask to be named there; the one who runs
magicid finds the person by the version. Nothing here reaches the network: no timestamp authority is asked, no
revocation looked up, no manifest fetched that is kept elsewhere.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import c2pa
from PIL import Image

import magicid
from magicid.certificates import CERTIFICATE_NAME, KEY_NAME, ProvenanceError, load_files, make_files

VALID, INVALID, NONE = "valid", "invalid", "none"
_GENERATOR = "magicid"
_DIGITAL_SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_MADE_BY_AI = f"{_DIGITAL_SOURCES}trainedAlgorithmicMedia"
_AI_SOURCES = (_MADE_BY_AI, f"{_DIGITAL_SOURCES}compositeWithTrainedAlgorithmicMedia")
_BASE_SHA256, _ADAPTER_VERSION = "magicid.base_sha256", "magicid.adapter_version"
_UNTRUSTED = "signingCredential.untrusted"
_SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "core": {"allowed_network_hosts": [], "decode_identity_assertions": False},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": True},
}


@dataclass(frozen=True)
class Claim:
    """What a manifest says of a clip.

    Attributes:
        base: the base model's name.
        base_sha256: hex SHA-256 of its weights.
        adapter_version: of the identity's adapter; None: the base model alone.
        created: ISO 8601 with its zone.
        generator: what made it; None: this version of magicid.
    """

    base: str
    base_sha256: str
    adapter_version: str | None
    created: str
    generator: str | None = None


@dataclass(frozen=True)
class Provenance:
    """What was found in a file.

    Attributes:
        state: `valid`: the bytes are those that were signed; `invalid`: they or the manifest were changed, or the file
            cannot be read; `none`: it holds no manifest.
        trusted: the signer's certificate leads to the root that `read` was given. Without that anybody may have signed.
        ai_generated: the manifest says so.
        claim: None where magicid did not write the manifest, or it cannot be read. Believe it only when valid.
        signed_by: names in the signer's certificate.
        problems: why it is invalid, or where its manifest is kept instead.
    """

    state: str
    trusted: bool = False
    ai_generated: bool = False
    claim: Claim | None = None
    signed_by: str = ""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Signer:
    """A certificate chain (PEM, the own one first) and its key (PEM, PKCS #8), as C2PA's `algorithm`."""

    algorithm: str
    chain: bytes
    key: bytes = field(repr=False)

    @classmethod
    def from_files(cls, certificate: str | Path, key: str | Path) -> Signer:
        """A signer from two PEM files, tried out. Raises ProvenanceError: unreadable, no pair, or refused by C2PA."""
        signer = cls(*load_files(Path(certificate), Path(key)))
        pixel = io.BytesIO()
        Image.new("L", (1, 1)).save(pixel, "PNG")
        try:
            sign(pixel.getvalue(), Claim("", "", None, "1970-01-01T00:00:00+00:00"), signer)
        except ProvenanceError as error:
            action = (
                "see C2PA's certificate profile: no CA or self-signed certificate, with a key usage that C2PA lists"
            )
            raise ProvenanceError(f"the certificate {certificate} is no use: {error.problem}", action) from error
        return signer

    @classmethod
    def self_made(cls, folder: str | Path) -> Signer:
        """The signer kept in a folder of its own, made there once: `certificate.pem`, `key.pem` (mode 0600), and
        `root.pem`, which readers give to `read`. Raises ProvenanceError: the folder cannot be written or read."""
        make_files(Path(folder))
        return cls.from_files(Path(folder) / CERTIFICATE_NAME, Path(folder) / KEY_NAME)


def sign(data: bytes, claim: Claim, signer: Signer) -> bytes:
    """An MP4, PNG, JPEG or WebP with the claim in it; pictures and sound stay as they are.

    Raises:
        ProvenanceError: none of these formats, damaged, or the certificate is refused.
    """
    name, _, version = (claim.generator or f"{_GENERATOR}/{magicid.__version__}").partition("/")
    parameters = {_BASE_SHA256: claim.base_sha256, _ADAPTER_VERSION: claim.adapter_version}
    action = {
        "action": "c2pa.created",
        "when": claim.created,
        "digitalSourceType": _MADE_BY_AI,
        "softwareAgent": {"name": claim.base},
        "parameters": {key: value for key, value in parameters.items() if value is not None},
    }
    manifest = {
        "claim_generator_info": [{"name": name, "version": version}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    kind, signed = _media_type(data), io.BytesIO()
    try:
        credentials = c2pa.Signer.from_info(c2pa.C2paSignerInfo(signer.algorithm, signer.chain, signer.key, None))
        with (
            c2pa.Context.from_dict(_SETTINGS, signer=credentials) as context,
            c2pa.Builder.from_json(manifest, context=context) as builder,
        ):
            builder.sign(kind, io.BytesIO(data), signed)
    except c2pa.C2paError as error:
        raise ProvenanceError(f"cannot sign provenance: {error}", "check the certificate and the file") from error
    return signed.getvalue()


def read(data: bytes, root: bytes | None = None) -> Provenance:
    """What a file says of its origin.

    Args:
        data: an MP4, PNG, JPEG or another file that C2PA knows.
        root: PEM certificates that the signer's must lead to for `trusted`.

    Raises:
        ProvenanceError: `root` is not PEM.
    """
    settings: dict[str, Any] = _SETTINGS if root is None else _SETTINGS | {"trust": {"user_anchors": _text(root)}}
    try:
        with (
            c2pa.Context.from_dict(settings) as context,
            c2pa.Reader(None, io.BytesIO(data), context=context) as reader,
        ):
            state, found = reader.get_validation_state(), json.loads(reader.json())
    except c2pa.C2paError as error:
        absent = isinstance(error, c2pa.C2paError.ManifestNotFound)
        elsewhere = str(error).startswith("Remote:")  # it has no class of its own
        problems = () if absent else (str(error),)
        return Provenance(NONE if absent or elsewhere else INVALID, problems=problems)
    manifest = found.get("manifests", {}).get(found.get("active_manifest"), {})
    signature = manifest.get("signature_info", {})
    statuses = found.get("validation_status", [])
    return Provenance(
        state=VALID if state in ("Valid", "Trusted") else INVALID,
        trusted=state == "Trusted",
        ai_generated=any(action.get("digitalSourceType") in _AI_SOURCES for action in _actions(manifest)),
        claim=_claim(manifest),
        signed_by=", ".join(dict.fromkeys(filter(None, (signature.get("issuer"), signature.get("common_name"))))),
        problems=tuple(
            str(status.get("explanation") or status["code"]) for status in statuses if status["code"] != _UNTRUSTED
        ),
    )


def _actions(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    assertions = [each for each in manifest.get("assertions", []) if each["label"].startswith("c2pa.actions")]
    return [action for each in assertions for action in each["data"].get("actions", [])]


def _claim(manifest: dict[str, Any]) -> Claim | None:
    """The claim that `sign` wrote; None for anything else, as anybody may write a manifest."""
    for action in _actions(manifest):
        try:
            parameters, generator = action["parameters"], manifest["claim_generator_info"][0]
            return Claim(
                base=str(action["softwareAgent"]["name"]),
                base_sha256=str(parameters[_BASE_SHA256]),
                adapter_version=str(parameters[_ADAPTER_VERSION]) if _ADAPTER_VERSION in parameters else None,
                created=str(action["when"]),
                generator=f"{generator['name']}/{generator['version']}",
            )
        except (KeyError, IndexError, TypeError):
            continue
    return None


def _media_type(data: bytes) -> str:
    if data[4:8] == b"ftyp":
        return "video/mp4"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "image/webp"
    raise ProvenanceError("this is neither an MP4 nor a PNG, JPEG or WebP", "sign one of these")


def _text(root: bytes) -> str:
    if b"-----BEGIN CERTIFICATE-----" not in root:
        raise ProvenanceError("the root certificate is not PEM", "give a file that begins with BEGIN CERTIFICATE")
    return root.decode("ascii", "replace")
