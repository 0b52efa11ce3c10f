"""Where `serve` and `join` keep their party's state: replaced whole or not at all, and on the disk before it counts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from dpdl.errors import CheckpointError
from dpdl.split.client import SplitClient
from dpdl.split.server import SplitServer

__all__ = ["load_state", "save_state"]


def save_state(party: SplitClient | SplitServer, path: Path) -> None:
    """Put a party's state in the place of the last one."""
    beside = path.with_name(f".{path.name}")  # one name, so that a process that is killed leaves one file at most
    with beside.open("wb") as file:
        torch.save(party.state_dict(), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_state(party: SplitClient | SplitServer, path: Path) -> None:
    """Go on from what `save_state` has written.

    Raises:
        CheckpointError: it is damaged, or of another network.
    """
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        party.load_state_dict(state)
    except (OSError, RuntimeError, LookupError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} is not the state of this network ({type(error).__name__}). Choose another --output; what the old "
            "one has spent on these records is spent."
        ) from error
