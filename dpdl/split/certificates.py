"""Certificates for the parties of a split network: a small authority of their own, and one certificate a party.

    make_certificates("certificates", hosts=("hospital.example", "10.0.0.5"), clients=("radiology", "pathology"))

    certificates/
        authority.pem   authority.key      signs the others; keep the key where no network is
        server.pem      server.key
        radiology.pem   radiology.key      a client's common name is its name: what the server knows it by
        *.signing.key   *.signing.pub      Ed25519, to sign the manifest with

Each party gets authority.pem, its own .pem and .key files, and everybody's .signing.pub; private keys are readable for
their owner alone. A client's certificate is not good for a server, and the other way round. Keys are ECDSA over P-256,
which every TLS library takes.

References:
    [1] RFC 5280, Internet X.509 Public Key Infrastructure Certificate, sections 4.2.1.3, 4.2.1.6, 4.2.1.9, 4.2.1.12.
    [2] RFC 8032, Edwards-Curve Digital Signature Algorithm (EdDSA), section 5.1.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dpdl.errors import ParameterError

__all__ = ["AUTHORITY", "SERVER", "add_client", "make_certificates"]

AUTHORITY = "authority"
SERVER = "server"
_LONGEST_DAYS = 3650
_SKEW = timedelta(minutes=5)  # by which the parties' clocks may differ
_PARTY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")  # a file's name, and at most 64 characters of a common name
_HOST = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*")


@dataclass(frozen=True, kw_only=True)
class _Issuer:
    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes


def make_certificates(
    folder: str | os.PathLike[str],
    *,
    hosts: Iterable[str] = ("localhost", "127.0.0.1", "::1"),
    clients: Iterable[str] = ("client",),
    days: int = 365,
) -> tuple[Path, ...]:
    """Make an authority, a server's certificate and one for each client, with signing keys, in a folder.

    Args:
        folder: made if it is not there, for its owner alone.
        hosts: names and addresses under which clients reach the server.
        clients: names of the clients: letters, digits, "-" and "_".
        days: for which all of them are good.

    Returns:
        The files.

    Raises:
        ParameterError: a name, host or number of days is not possible, or a file is there already; nothing is written.
    """
    folder, names, found = Path(folder), list(clients), list(hosts)
    _refuse_days(days)
    _refuse_names(names)
    alternatives = [_alternative(host) for host in found]
    if not alternatives:
        raise ParameterError("hosts is empty. Name what clients connect to, such as 'localhost'.")
    _refuse_existing(folder, AUTHORITY, SERVER, *names)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = _Issuer(certificate=_authority(key, days), key=key)
    written = [*_write_pair(folder, AUTHORITY, issuer.certificate, key)]
    written += _party(folder, SERVER, issuer, days, ExtendedKeyUsageOID.SERVER_AUTH, alternatives)
    for name in names:
        written += _party(folder, name, issuer, days, ExtendedKeyUsageOID.CLIENT_AUTH, [x509.DNSName(name)])
    return tuple(written)


def add_client(folder: str | os.PathLike[str], name: str, *, days: int = 365) -> tuple[Path, ...]:
    """One more client's certificate and keys, by the authority in the folder.

    Returns:
        The files.

    Raises:
        ParameterError: the authority is not there, the name is not possible, or its files are there already.
    """
    folder = Path(folder)
    _refuse_days(days)
    _refuse_names([name])
    _refuse_existing(folder, name)
    try:
        certificate = x509.load_pem_x509_certificate((folder / f"{AUTHORITY}.pem").read_bytes())
        key = serialization.load_pem_private_key((folder / f"{AUTHORITY}.key").read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise ParameterError(
            f"There is no authority in {folder} ({error}). Make one with make_certificates."
        ) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ParameterError(f"The authority in {folder} has a key of another kind. Make one with make_certificates.")
    issuer = _Issuer(certificate=certificate, key=key)
    return tuple(_party(folder, name, issuer, days, ExtendedKeyUsageOID.CLIENT_AUTH, [x509.DNSName(name)]))


def _authority(key: ec.EllipticCurvePrivateKey, days: int) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "dpdl split authority")])
    builder = (
        _builder(name, key.public_key(), days)
        .issuer_name(name)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )
    return builder.sign(key, hashes.SHA256())


def _party(
    folder: Path,
    name: str,
    issuer: _Issuer,
    days: int,
    purpose: x509.ObjectIdentifier,
    alternatives: list[x509.GeneralName],
) -> list[Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(datetime.now(UTC) + timedelta(days=days), issuer.certificate.not_valid_after_utc)
    builder = (
        _builder(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]), key.public_key(), days, until=until)
        .issuer_name(issuer.certificate.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    )
    written = [*_write_pair(folder, name, builder.sign(issuer.key, hashes.SHA256()), key)]
    signing = Ed25519PrivateKey.generate()
    public = signing.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    written.append(_write_new(folder / f"{name}.signing.key", _private(signing), mode=0o600))
    written.append(_write_new(folder / f"{name}.signing.pub", public, mode=0o644))
    return written


def _builder(
    subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int, *, until: datetime | None = None
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(until or now + timedelta(days=days))
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _private(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_pair(
    folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> tuple[Path, Path]:
    pem = certificate.public_bytes(serialization.Encoding.PEM)
    return (
        _write_new(folder / f"{name}.pem", pem, mode=0o644),
        _write_new(folder / f"{name}.key", _private(key), mode=0o600),
    )


def _write_new(path: Path, content: bytes, *, mode: int) -> Path:
    """A file that was not there, never readable for more people than `mode` says."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
    except OSError as error:
        raise ParameterError(f"{path} cannot be written: {error.strerror}.") from error
    return path


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        if not _HOST.fullmatch(host):
            raise ParameterError(f"A host must be a name or an IP address without a port, got {host!r}.") from None
        return x509.DNSName(host)


def _refuse_days(days: int) -> None:
    if type(days) is not int or not 0 < days <= _LONGEST_DAYS:
        raise ParameterError(f"days must be a whole number from 1 to {_LONGEST_DAYS}, got {days!r}.")


def _refuse_names(names: list[str]) -> None:
    for name in names:
        if not _PARTY.fullmatch(name) or name in (AUTHORITY, SERVER):
            raise ParameterError(
                f"A client's name must be letters, digits, '-' and '_', and neither '{AUTHORITY}' nor '{SERVER}', got "
                f"{name!r}."
            )
    if len(set(names)) != len(names):
        raise ParameterError(f"Clients must have different names, got {names}.")


def _refuse_existing(folder: Path, *names: str) -> None:
    for name in names:
        for ending in ("pem", "key", "signing.key", "signing.pub"):
            if (folder / f"{name}.{ending}").exists():
                raise ParameterError(
                    f"{folder / f'{name}.{ending}'} is there already, and keys are not overwritten. Choose another "
                    "folder, or move the old files away."
                )
