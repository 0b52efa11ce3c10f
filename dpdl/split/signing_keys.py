"""The keys that manifests are signed and checked with, from the files that `dpdl split certificates` makes."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from dpdl.errors import ManifestError

__all__ = ["read_private_key", "read_public_key"]

_MAKE = "Make keys with: dpdl split certificates"


def read_private_key(path: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """A party's own signing key, from its PEM file at path.

    Raises:
        ManifestError: it is not there, or not such a key.
    """
    try:
        key = serialization.load_pem_private_key(Path(path).read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ManifestError(f"There is no signing key at {path} ({error}). {_MAKE}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ManifestError(f"{path} is a key of another kind than Ed25519. {_MAKE}")
    return key


def read_public_key(path: str | os.PathLike[str]) -> Ed25519PublicKey:
    """The other party's key to verify with, from its PEM file at path.

    Raises:
        ManifestError: it is not there, or not such a key.
    """
    try:
        key = serialization.load_pem_public_key(Path(path).read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ManifestError(f"There is no public key at {path} ({error}). {_MAKE}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ManifestError(f"{path} is a key of another kind than Ed25519. {_MAKE}")
    return key
