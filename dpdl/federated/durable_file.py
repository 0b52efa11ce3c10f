"""A file that is there whole or not at all, and on the disk when the call returns."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import Any

from dpdl.checkpoint_format import write_tree

__all__ = ["write_durably"]


def write_durably(tree: dict[str, Any], file: Path) -> None:
    """Write plain values and tensors, in place of what the file was before.

    Whoever is killed in between leaves the old file, and a draft whose name begins with a dot. What reads it is
    `dpdl.checkpoint_format.read_tree`.

    Args:
        tree: mappings, lists, plain values and tensors.
        file: where to; its folder is there.

    Raises:
        OSError: the folder is missing, full, or not ours to write.
        RuntimeError: torch's own word for the same.
    """
    handle, draft = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        write_tree(tree, Path(draft), named=file)
        with open(draft, "rb") as written:
            os.fsync(written.fileno())
        os.replace(draft, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(draft)
        raise
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
