"""Certificates: who may be whom, for how long, and who may read the keys."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from dpdl.errors import ChannelError, ParameterError
from dpdl.split.certificates import add_client, make_certificates
from dpdl.split.tls import MutualTLS, is_loopback


def certificate(folder: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((folder / f"{name}.pem").read_bytes())


def test_certificates_say_what_they_are_for(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    written = make_certificates(folder, hosts=("hospital.example", "10.0.0.5"), clients=("radiology", "p-2"), days=30)
    assert set(written) == set(folder.iterdir())
    authority, server, client = (certificate(folder, name) for name in ("authority", "server", "radiology"))
    for name in ("authority", "server", "radiology", "p-2"):
        issued = certificate(folder, name)
        issued.verify_directly_issued_by(authority)
        key = serialization.load_pem_private_key((folder / f"{name}.key").read_bytes(), None)
        assert key.public_key() == issued.public_key()
        left = issued.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(days=29, hours=23) < left <= timedelta(days=30)
        assert issued.not_valid_before_utc < datetime.now(UTC)
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value == x509.BasicConstraints(True, 0)
    assert authority.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    for issued, purpose in ((server, ExtendedKeyUsageOID.SERVER_AUTH), (client, ExtendedKeyUsageOID.CLIENT_AUTH)):
        assert not issued.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        assert not issued.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
        assert list(issued.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == [purpose]
    names = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hospital.example"]
    assert names.get_values_for_type(x509.IPAddress) == [ip_address("10.0.0.5")]
    assert client.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == "radiology"
    assert len({issued.serial_number for issued in (authority, server, client)}) == 3


def test_private_keys_are_for_their_owner_alone_whatever_the_mask(tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        written = make_certificates(tmp_path / "new")
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700
    for path in written:
        private = b"PRIVATE" in path.read_bytes()
        assert private == path.name.endswith(".key"), path
        assert stat.S_IMODE(path.stat().st_mode) == (0o600 if private else 0o644), path


def test_a_client_is_added_later_by_the_same_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, clients=(), days=10)
    add_client(tmp_path, "late", days=365)
    late, authority = certificate(tmp_path, "late"), certificate(tmp_path, "authority")
    late.verify_directly_issued_by(authority)
    assert late.not_valid_after_utc <= authority.not_valid_after_utc


def test_nothing_is_overwritten_or_half_written(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ParameterError, match="not overwritten"):
        make_certificates(tmp_path)
    with pytest.raises(ParameterError, match="not overwritten"):
        add_client(tmp_path, "client")
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ParameterError, match="no authority"):
        add_client(tmp_path / "empty", "late")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"clients": ("../etc/passwd",)}, "client's name"),
        ({"clients": ("server",)}, "client's name"),
        ({"clients": ("authority",)}, "client's name"),
        ({"clients": ("",)}, "client's name"),
        ({"clients": ("a", "a")}, "different names"),
        ({"hosts": ()}, "hosts is empty"),
        ({"hosts": ("localhost:50051",)}, "without a port"),
        ({"hosts": ("*.example",)}, "name or an IP"),
        ({"days": 0}, "days"),
        ({"days": 10**6}, "days"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(tmp_path: Path, arguments: dict, says: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ParameterError, match=says):
        make_certificates(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_files_are_checked_before_they_are_used(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    tls = MutualTLS.of(tmp_path, "client")
    assert all(tls.read())
    with pytest.raises(ChannelError, match=r"nobody\.pem cannot be read"):
        MutualTLS.of(tmp_path, "nobody").read()
    (tmp_path / "client.key").chmod(0o604)
    with pytest.raises(ChannelError, match="chmod 600"):
        tls.read()
    (tmp_path / "client.key").chmod(0o640)
    (tmp_path / "client.pem").write_text("no certificate")
    with pytest.raises(ChannelError, match="not a certificate"):
        tls.read()


def test_a_certificate_past_its_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_certificates(tmp_path, days=3)

    class Later(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=4)

    monkeypatch.setattr("dpdl.split.tls.datetime", Later)
    with pytest.raises(ChannelError, match=r"authority.pem is good from"):
        MutualTLS.of(tmp_path, "client").read()


def test_what_is_on_this_machine() -> None:
    for address in ("localhost:1", "127.0.0.1:50051", "127.9.9.9:1", "[::1]:0"):
        assert is_loopback(address), address
    for address in (
        "10.0.0.1:1",
        "0.0.0.0:1",
        "[::]:1",
        "example.org:1",
        "localhost.example:1",
        "[::ffff:8.8.8.8]:1",
        ":1",
    ):
        assert not is_loopback(address), address
