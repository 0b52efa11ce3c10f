"""`--plot FILE`, the same in every command, and refused before any work is done if the figure could not be drawn."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from accountants.errors import ParameterError, PrivacyError

__all__ = ["add_plot", "refuse_what_cannot_be_drawn"]

_FORMATS = (".png", ".pdf", ".svg")


def add_plot(parser: argparse.ArgumentParser, what: str) -> None:
    """The option: where to draw `what`."""
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help=f"draw {what} there ({', '.join(_FORMATS)}); needs dpdl[plots]"
    )


def refuse_what_cannot_be_drawn(path: Path | None) -> None:
    """Look at the file that was asked for, which may be none.

    Raises:
        PrivacyError: matplotlib is not installed.
        ParameterError: the file's name says no format, or nothing can be written there.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise PrivacyError("Plots need matplotlib: pip install 'dpdl[plots]'.")
    if path.suffix.lower() not in _FORMATS:
        raise ParameterError(f"--plot: {str(path)!r} names no format. Let it end in {', '.join(_FORMATS)}.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ParameterError(f"--plot: {str(path)!r} cannot be written. Name a file in a folder that exists.")
