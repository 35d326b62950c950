"""Provenance: clips that still play, changed bytes that are found, keys that stay private, and no network."""

from __future__ import annotations

import datetime
import http.server
import io
import multiprocessing
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import av
import c2pa
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from PIL import Image

import magicid
from magicid.certificates import ProvenanceError
from magicid.clips import decode_mp4, encode_mp4
from magicid.provenance import INVALID, NONE, VALID, Claim, Signer, read, sign

CLAIM = Claim("face-world", "b" * 64, "28ae72f7565f", "2026-11-24T10:00:00+00:00")
FRAMES = np.random.default_rng(0).integers(0, 255, (9, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "certificate"
    Signer.self_made(folder)
    return folder


@pytest.fixture(scope="module")
def signer(folder: Path) -> Signer:
    return Signer.self_made(folder)


@pytest.fixture(scope="module")
def video() -> bytes:
    return encode_mp4(FRAMES, 8)


@pytest.fixture(scope="module")
def signed(video: bytes, signer: Signer) -> bytes:
    return sign(video, CLAIM, signer)


def test_a_signed_clip_says_what_made_it(signed: bytes, folder: Path) -> None:
    found = read(signed, (folder / "root.pem").read_bytes())
    assert (found.state, found.trusted, found.ai_generated, found.problems) == (VALID, True, True, ())
    assert found.claim == Claim(**vars(CLAIM) | {"generator": f"magicid/{magicid.__version__}"})
    assert found.signed_by == "magicid"


def test_the_base_model_alone_has_no_adapter(video: bytes, signer: Signer) -> None:
    found = read(sign(video, Claim("face-world", "b" * 64, None, CLAIM.created), signer))
    assert found.claim is not None
    assert found.claim.adapter_version is None


def test_it_plays_as_before(video: bytes, signed: bytes) -> None:
    before, after = decode_mp4(video), decode_mp4(signed)
    assert np.array_equal(before[0], after[0])
    assert after[1] == 8
    with av.open(io.BytesIO(video)) as plain, av.open(io.BytesIO(signed)) as marked:
        assert [(p.pts, bytes(p)) for p in plain.demux(video=0)] == [(p.pts, bytes(p)) for p in marked.demux(video=0)]
    assert signed[4:8] == b"ftyp"  # browsers look for the type first


@pytest.mark.parametrize("place", ["pixels", "index", "claim", "signature"])
def test_changed_bytes_are_found(signed: bytes, place: str) -> None:
    marks = {"pixels": (b"mdat", 200), "index": (b"stts", 12), "claim": (b"28ae72f7565f", 0), "signature": (b"C2PA", 0)}
    mark, beyond = marks[place]
    at = signed.rindex(mark) + beyond if place != "signature" else signed.index(b"c2pa.signature") + 120
    assert at < len(signed)
    changed = signed[:at] + bytes([signed[at] ^ 1]) + signed[at + 1 :]
    found = read(changed)
    assert found.state == INVALID
    assert not found.trusted
    assert found.problems


def test_a_truncated_clip_is_not_valid(signed: bytes) -> None:
    assert read(signed[:-100]).state == INVALID
    assert read(signed[: len(signed) // 2]).state == INVALID


def test_another_manifest_over_the_clip_does_not_make_it_ours(
    signed: bytes, video: bytes, folder: Path, tmp_path: Path
) -> None:
    other = sign(video, CLAIM, Signer.self_made(tmp_path / "other"))
    found = read(other, (folder / "root.pem").read_bytes())
    assert (found.state, found.trusted) == (VALID, False)
    assert not read(signed).trusted


def test_without_a_manifest_there_is_none(video: bytes) -> None:
    assert read(video).state == NONE
    assert read(b"no media at all").state == INVALID
    with pytest.raises(ProvenanceError, match="not PEM"):
        read(video, b"root")


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_are_signed_too(signer: Signer, kind: str) -> None:
    plain = io.BytesIO()
    Image.fromarray(FRAMES[0]).save(plain, kind)
    marked = sign(plain.getvalue(), CLAIM, signer)
    found = read(marked)
    assert (found.state, found.ai_generated) == (VALID, True)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(marked))), np.asarray(Image.open(plain)))
    with pytest.raises(ProvenanceError, match="neither an MP4"):
        sign(b"GIF89a", CLAIM, signer)


def test_a_damaged_clip_is_refused(video: bytes, signer: Signer) -> None:
    with pytest.raises(ProvenanceError, match="cannot sign"):
        sign(video[:-50], CLAIM, signer)


def test_many_threads_may_sign(video: bytes, signer: Signer) -> None:
    states: list[str] = []
    threads = [threading.Thread(target=lambda: states.append(read(sign(video, CLAIM, signer)).state)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert states == [VALID] * 6


def test_the_key_is_private_and_made_once(folder: Path, signer: Signer) -> None:
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    assert Signer.self_made(folder) == signer
    assert sorted(file.name for file in folder.parent.iterdir()) == ["certificate"]
    assert "PRIVATE" not in repr(signer)


def make(folder: str, started: multiprocessing.synchronize.Barrier) -> None:
    started.wait()
    Signer.self_made(folder)


def test_processes_that_start_at_once_share_one_key(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    started = context.Barrier(3)
    processes = [context.Process(target=make, args=(str(tmp_path / "made"), started)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["made"]
    Signer.self_made(tmp_path / "made")


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProvenanceError, match=re.escape(str(tmp_path / "file"))):
        Signer.self_made(tmp_path / "file" / "certificate")


def pem_of(key: ec.EllipticCurvePrivateKey, password: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, encryption)


def self_signed(key: ec.EllipticCurvePrivateKey, until: datetime.timedelta) -> bytes:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "studio")])
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now - datetime.timedelta(days=9)).not_valid_after(now + until)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("missing", "cannot read the certificate"),
        ("text", "cannot read the certificate"),
        ("password", "not a PEM key without password"),
        ("pair", "is not that of the certificate"),
        ("expired", "valid from"),
        ("curve", "does not know"),
        ("profile", "is no use"),
    ],
)
def test_a_certificate_that_cannot_sign_is_refused_at_once(tmp_path: Path, wrong: str, message: str) -> None:
    key = ec.generate_private_key(ec.SECP256K1() if wrong == "curve" else ec.SECP256R1())
    until = datetime.timedelta(days=-1 if wrong == "expired" else 9)
    certificate, private = tmp_path / "certificate.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"hello" if wrong == "text" else self_signed(key, until))
    other = ec.generate_private_key(ec.SECP256R1())
    private.write_bytes(pem_of(other if wrong == "pair" else key, b"secret" if wrong == "password" else None))
    if wrong == "missing":
        certificate.unlink()
    with pytest.raises(ProvenanceError, match=message) as caught:
        Signer.from_files(certificate, private)
    assert str(private if wrong in ("password", "pair", "curve") else certificate) in str(caught.value)


@pytest.fixture
def asked() -> Iterator[tuple[str, list[str]]]:
    """A web server's address and the paths it was asked for."""
    paths: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_error(404)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_manifest_kept_elsewhere_is_not_fetched(video: bytes, signer: Signer, asked: tuple[str, list[str]]) -> None:
    address, paths = asked
    credentials = c2pa.Signer.from_info(c2pa.C2paSignerInfo(signer.algorithm, signer.chain, signer.key, None))
    capture = "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture"
    action = {"action": "c2pa.created", "digitalSourceType": capture}
    manifest = {
        "claim_generator_info": [{"name": "elsewhere"}],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
    }
    pointing = io.BytesIO()
    with c2pa.Context.from_dict({}, signer=credentials) as context:
        builder = c2pa.Builder.from_json(manifest, context=context)
        builder.set_no_embed()
        builder.set_remote_url(f"{address}/manifest.c2pa")
        builder.sign("video/mp4", io.BytesIO(video), pointing)
        with pytest.raises(c2pa.C2paError):
            c2pa.Reader(None, io.BytesIO(pointing.getvalue()), context=context)
    assert paths == ["/manifest.c2pa"]  # what C2PA does where nobody forbids it
    found = read(pointing.getvalue())
    assert found.state == NONE
    assert "must fetch remote manifest" in found.problems[0]
    assert paths == ["/manifest.c2pa"]
