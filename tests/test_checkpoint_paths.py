"""Where a checkpoint goes: a folder that is there, and what a link points to."""

from __future__ import annotations

from pathlib import Path

import pytest

import dpdl
from dpdl.errors import CheckpointError
from tests.small_run import small_run


def saved(path: Path) -> None:
    private = small_run(noise_multiplier=1.0)
    dpdl.save_checkpoint(path, private.model, private.optimizer)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere.run\.pt could not be written"):
        saved(tmp_path / "nowhere" / "run.pt")


def test_a_link_is_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "step1.pt", tmp_path / "last.pt"
    link.symlink_to(target)
    saved(link)
    assert link.is_symlink()
    assert target.exists()
