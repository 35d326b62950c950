"""The key and certificates that sign provenance: made here for a start, or brought along as PEM files.

A self-made certificate proves that clips come from the same source and were not changed; nobody but the one who made it
has a reason to trust it. For others, bring a certificate of an authority they trust (C2PA's list, or your own).
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from magicid.errors import MagicIDError

CERTIFICATE_NAME, KEY_NAME, ROOT_NAME = "certificate.pem", "key.pem", "root.pem"
_NAME, _ROOT_SUBJECT = "magicid", "magicid, self-made root"
_YEARS = 10  # a clip has no trusted time in it: what the certificate signed is valid for as long as the certificate
_CLOCK_SKEW = datetime.timedelta(hours=1)
_C2PA_CLAIM_SIGNING = x509.ObjectIdentifier("1.3.6.1.4.1.62558.2.1")
_CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}


class ProvenanceError(MagicIDError):
    """Provenance that cannot be signed: the certificate, its key, or the file."""


def make_files(folder: Path) -> None:
    """Make `certificate.pem`, `key.pem` (mode 0600) and `root.pem` in a new folder, unless they are there.

    All or nothing, and safe when several processes start at once: the first one's files stay. The root's own key is
    forgotten, so nothing else can be signed in its name.

    Raises:
        ProvenanceError: the folder cannot be written.
    """
    if (folder / CERTIFICATE_NAME).exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for name, content in _self_made().items():
                with open(os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            made.rename(folder)
        except OSError:
            if not (folder / CERTIFICATE_NAME).exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except OSError as error:
        raise ProvenanceError(
            f"cannot make a certificate in {folder}: {error.strerror or error}", "make the folder writable and empty"
        ) from error


def load_files(certificate: Path, key: Path) -> tuple[str, bytes, bytes]:
    """A certificate chain, its own certificate first, and the key to it.

    Returns:
        algorithm: as C2PA names it, such as `es256`.
        chain: PEM.
        key: PEM, PKCS #8; a secret.

    Raises:
        ProvenanceError: a file that is missing or not PEM, a key with a password or of another certificate, a kind of
            key that C2PA does not know, or a certificate that is not valid now.
    """
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise ProvenanceError(
            f"cannot read the certificate {certificate}: {_reason(error)}", "give a PEM file with the whole chain"
        ) from error
    try:
        private = load_pem_private_key(key.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:  # TypeError: it has a password
        # Not `from error`: what a parser says of a key stays out of the logs.
        problem = _reason(error) if isinstance(error, OSError) else "it is not a PEM key without password"
        raise ProvenanceError(f"cannot read the private key {key}: {problem}", "give its PEM file") from None
    own = chain[0]
    spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*spki) != own.public_key().public_bytes(*spki):
        raise ProvenanceError(
            f"the private key {key} is not that of the certificate {certificate}",
            "give files that belong together, the signer's own certificate first in its file",
        )
    now = datetime.datetime.now(datetime.UTC)
    if not own.not_valid_before_utc <= now <= own.not_valid_after_utc:
        raise ProvenanceError(
            f"the certificate {certificate} is valid from {own.not_valid_before_utc:%Y-%m-%d} "
            f"to {own.not_valid_after_utc:%Y-%m-%d} only",
            "replace it and its key; remove the folder of a self-made one",
        )
    match private:
        case ec.EllipticCurvePrivateKey() if private.curve.name in _CURVES:
            algorithm = _CURVES[private.curve.name]
        case rsa.RSAPrivateKey():
            algorithm = "ps256"
        case ed25519.Ed25519PrivateKey():
            algorithm = "ed25519"
        case _:
            raise ProvenanceError(
                f"the private key {key} is of a kind that C2PA does not know",
                "use EC P-256, P-384, P-521, RSA, Ed25519",
            )
    pem = b"".join(each.public_bytes(Encoding.PEM) for each in chain)
    return algorithm, pem, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def _self_made() -> dict[str, bytes]:
    """Files by name: an end certificate as C2PA's profile wants it, its key, and the root that signed it."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = (
        _begin(_ROOT_SUBJECT, root_key.public_key(), root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    own = (
        _begin(_NAME, key.public_key(), root_key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        # The second is what C2PA asks for today, the first what older readers know.
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION, _C2PA_CLAIM_SIGNING]), critical=False
        )
        .sign(root_key, hashes.SHA256())
    )
    return {
        ROOT_NAME: root.public_bytes(Encoding.PEM),
        KEY_NAME: key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        CERTIFICATE_NAME: own.public_bytes(Encoding.PEM),
    }


def _begin(name: str, public: ec.EllipticCurvePublicKey, issuer: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    issuer_id = x509.SubjectKeyIdentifier.from_public_key(issuer)
    return (
        x509.CertificateBuilder()
        .subject_name(_named(name))
        .issuer_name(_named(_ROOT_SUBJECT))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SKEW)
        .not_valid_after(now + datetime.timedelta(days=365 * _YEARS))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
    )


def _named(name: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, _NAME)
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
