"""A ledger file that was torn, cut or changed: nothing whole is lost, nothing damaged is taken for good."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpdl.budget import Budget
from dpdl.errors import LedgerError
from dpdl.ledger_file import LedgerFile
from dpdl.ledger_lines import Link, sealed
from dpdl.tally import Segment
from tests.small_ledger import STEP, a_ledger


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests kill no machine, and the disk is slow."""
    monkeypatch.setattr("dpdl.journal._sync_data", lambda file: None)
    monkeypatch.setattr("dpdl.journal.os.fsync", lambda file: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data.ledger"


def test_cut_at_every_byte_nothing_whole_is_lost_and_nothing_torn_is_taken(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a_ledger(path, 3)
    whole = path.read_bytes()
    header = whole.index(b"\n") + 1
    torn = path.with_name("data.ledger.torn")
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        torn.unlink(missing_ok=True)
        if length < header:  # a header is made whole or not at all: no crash leaves this
            with pytest.raises(LedgerError, match="damaged"):
                LedgerFile(path)
            assert path.read_bytes() == whole[:length]
            continue
        with caplog.at_level(logging.ERROR):
            ledger = LedgerFile(path)
        lines = whole[:length].split(b"\n")
        kept = len(lines) - 2
        rest = lines[-1]
        if rest and whole[length : length + 1] == b"\n":  # only the line feed is missing: it may count
            kept, rest = kept + 1, b""
        assert ledger.releases == kept, length
        assert torn.exists() == bool(rest)
        if rest:
            assert torn.read_bytes() == rest + b"\n"
        ledger.record(STEP, run="after")
        assert LedgerFile(path).releases == kept + 1
        assert path.read_bytes().startswith(whole[:length] if not rest else whole[: length - len(rest)])


@pytest.mark.parametrize("zeros", ["all", "first half", "second half"])
def test_pages_that_never_reached_the_disk_are_torn_as_well(path: Path, zeros: str) -> None:
    a_ledger(path, 3)
    whole = path.read_bytes()
    begin = whole.rindex(b"\n", 0, -1) + 1
    middle = (begin + len(whole)) // 2
    first, end = {"all": (begin, len(whole)), "first half": (begin, middle), "second half": (middle, len(whole))}[zeros]
    path.write_bytes(whole[:first] + bytes(end - first) + whole[end:])
    assert LedgerFile(path).releases == 2


def test_a_torn_line_is_found_by_a_process_that_had_the_file_open(path: Path) -> None:
    ledger = a_ledger(path, 2)
    with path.open("ab") as file:
        file.write(b'{"n": 3, "kind": "sp')
    assert ledger.releases == 2
    ledger.record(STEP)
    assert LedgerFile(path).releases == 3


def test_a_flipped_bit_anywhere_is_noticed(path: Path) -> None:
    a_ledger(path, 3)
    whole = path.read_bytes()
    for position in (*range(0, len(whole) - 1, 3), len(whole) - 1):
        for bit in (0, 5):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                ledger = LedgerFile(path)
            except LedgerError:
                assert path.read_bytes() == changed, "a damaged file was written to"
            else:  # its last line lost its line feed, and another byte stands there: torn, as far as one can see
                assert position == len(whole) - 1
                assert ledger.releases == 2


def edits() -> dict[str, Any]:
    return {
        "first line deleted": lambda lines: lines[1:],
        "first release deleted": lambda lines: [lines[0], *lines[2:]],
        "middle deleted": lambda lines: [*lines[:2], *lines[3:]],
        "header alone repeated": lambda lines: [lines[0], *lines],
        "two exchanged": lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
        "one repeated": lambda lines: [*lines[:3], *lines[2:]],
        "a count lowered": lambda lines: [*lines[:2], lines[2].replace(b'"count": 1', b'"count": 0'), *lines[3:]],
        "less noise": lambda lines: [*lines[:2], lines[2].replace(b"1.5", b"9.5"), *lines[3:]],
        "another's line": lambda lines: [*lines[:2], other_line(), *lines[3:]],
        "an empty line": lambda lines: [*lines[:2], b"\n", *lines[2:]],
        "a larger budget": lambda lines: [lines[0].replace(b'"epsilon": 5', b'"epsilon": 9'), *lines[1:]],
        "empty": lambda lines: [],
        "text": lambda lines: [b"hello\n"],
    }


def other_line() -> bytes:
    """A sound line of the right number, from a ledger with another past."""
    segment = Segment(run="b", label="step", event=STEP, first=0, count=1)
    return sealed(segment, Link(number=2, digest="0" * 64))[0]


@pytest.mark.parametrize("edit", edits())
def test_an_edited_file_is_refused_and_left_as_it_is(path: Path, edit: str) -> None:
    a_ledger(path, 4) if edit != "a larger budget" else a_ledger(path, 1, budget=Budget(epsilon=5.0, delta=1e-5))
    lines = path.read_bytes().splitlines(keepends=True)
    edited = b"".join(edits()[edit](lines))
    path.write_bytes(edited)
    with pytest.raises(LedgerError, match=r"damaged.*Restore it"):
        LedgerFile(path)
    assert path.read_bytes() == edited
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("change", ["cut", "older copy", "removed", "exchanged", "last line edited"])
def test_a_process_notices_what_happens_to_the_file_under_its_hands(path: Path, tmp_path: Path, change: str) -> None:
    ledger = a_ledger(path, 2)
    older = tmp_path / "older"
    shutil.copy(path, older)
    ledger.record(STEP)
    content = path.read_bytes()
    if change == "cut":
        path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 1])
    elif change == "older copy":
        os.replace(older, path)
    elif change == "removed":
        path.unlink()
    elif change == "exchanged":
        path.unlink()
        a_ledger(path, 9)
    else:
        path.write_bytes(content[:-80] + b"0" + content[-79:])
    with pytest.raises(LedgerError):
        ledger.record(STEP)
    with pytest.raises(LedgerError):
        ledger.epsilon(1e-5)


@pytest.mark.parametrize("failure", ["write", "part of a write", "sync"])
def test_a_full_disk_releases_nothing_and_the_next_try_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    ledger = a_ledger(path, 2)
    real = os.write

    def no_space(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    def half(file: int, data: bytes) -> int:
        return real(file, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        if failure == "sync":
            patch.setattr("dpdl.journal._sync_data", no_space)
        else:
            patch.setattr("dpdl.journal.os.write", half if failure.startswith("part") else no_space)
        with pytest.raises(LedgerError, match="Nothing was released"):
            ledger.record(STEP)
    ledger.record(STEP)
    # After a failed sync the line may be on the disk: it counts.
    assert ledger.releases == LedgerFile(path).releases == 3 + (failure == "sync")
