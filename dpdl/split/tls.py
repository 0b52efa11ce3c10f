"""Which files prove who a party is: mutual TLS, both sides with a certificate of one authority."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from dpdl.errors import ChannelError
from dpdl.split.certificates import AUTHORITY

__all__ = ["MutualTLS", "is_loopback"]

_OTHERS = 0o007  # permission bits of everybody else


@dataclass(frozen=True, kw_only=True)
class MutualTLS:
    """One party's end of mutual TLS.

    Attributes:
        authority: certificate of the authority that signed both parties'.
        certificate: this party's.
        key: its private key.
        server_name: what the server's certificate is made out to, if that is not what the client connects to.

    Nothing is read before a connection is made; `read` raises ChannelError where a file is missing, is no longer good,
    or is a private key that everybody may read.
    """

    authority: Path
    certificate: Path
    key: Path
    server_name: str | None = None

    @classmethod
    def of(cls, folder: str | os.PathLike[str], party: str, *, server_name: str | None = None) -> MutualTLS:
        """The files of one party in a folder that `make_certificates` has made.

        Args:
            folder: where the files are.
            party: whose.
            server_name: as the certificate of the server has it, if that is not its address.
        """
        here = Path(folder)
        return cls(
            authority=here / f"{AUTHORITY}.pem",
            certificate=here / f"{party}.pem",
            key=here / f"{party}.key",
            server_name=server_name,
        )

    def read(self) -> tuple[bytes, bytes, bytes]:
        """Authority, certificate and key, as PEM.

        Raises:
            ChannelError: a file is missing, not what it should be, no longer good, or a key that everybody may read.
        """
        try:
            authority, certificate, key = (path.read_bytes() for path in (self.authority, self.certificate, self.key))
            mode = self.key.stat().st_mode
        except OSError as error:
            raise ChannelError(
                f"{error.filename} cannot be read: {error.strerror}. Make certificates with: dpdl split certificates"
            ) from error
        if mode & _OTHERS:
            raise ChannelError(f"Everybody may read or write the private key {self.key}. Run: chmod 600 {self.key}")
        for path, content in ((self.authority, authority), (self.certificate, certificate)):
            _refuse_certificate(path, content)
        return authority, certificate, key


def _refuse_certificate(path: Path, content: bytes) -> None:
    try:
        found = x509.load_pem_x509_certificate(content)
    except ValueError as error:
        raise ChannelError(f"{path} is not a certificate in PEM.") from error
    now = datetime.now(UTC)
    if not found.not_valid_before_utc <= now <= found.not_valid_after_utc:
        raise ChannelError(
            f"The certificate {path} is good from {found.not_valid_before_utc} to {found.not_valid_after_utc}, and it "
            f"is {now:%Y-%m-%d %H:%M}. Make new ones with: dpdl split certificates"
        )


def is_loopback(address: str) -> bool:
    """Whether an address "host:port" stays on this machine.

    Example:
        >>> is_loopback("localhost:50051"), is_loopback("[::1]:50051"), is_loopback("10.0.0.5:50051")
        (True, True, False)
    """
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
