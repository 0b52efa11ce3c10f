"""The bounded tar reader: nothing on disk, nothing lost in silence, nothing without limit."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from dpdl.data import archive
from dpdl.data.image_data import no_progress
from dpdl.errors import DataError


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.size, header.type = size, kind
    return header


def write(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:
        for name, content in files.items():
            file.addfile(info(name, len(content)), io.BytesIO(content))
    return path


def contents(path: Path) -> dict[str, bytes]:
    return {str(member.path): member.read() for member in archive.members(path, no_progress)}


FILES = {"a": b"", "b/c": b"x" * 511, "b/d": b"y" * 512, "e": b"z" * 5000}


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_members_have_the_bytes_packed(tmp_path: Path, mode: str) -> None:
    assert contents(write(tmp_path / "a.tar", FILES, mode)) == FILES


def test_paths_that_lead_out_write_nothing(tmp_path: Path) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    before = sorted(tmp_path.rglob("*"))
    path = write(inner / "a.tar", {"../escaped": b"x", str(tmp_path / "absolute"): b"y"})
    assert list(contents(path)) == ["../escaped", str(tmp_path / "absolute")]
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])


def test_only_folders_and_regular_files_are_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    kinds = [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
        tarfile.DIRTYPE,
        tarfile.REGTYPE,
    ]
    with tarfile.open(path, "w") as file:
        for index, kind in enumerate(kinds):
            header = info(str(index), kind=kind)
            header.linkname = "/etc/passwd"
            file.addfile(header)
    seen = [(str(member.path), member.is_folder) for member in archive.members(path, no_progress)]
    assert seen == [("4", True), ("5", False)]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_archive_cut_short_is_refused(tmp_path: Path, mode: str, share: float) -> None:
    content = bytes(range(256)) * 80
    path = write(tmp_path / "a.tar", {str(index): content for index in range(4)}, mode)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(DataError, match=r"a\.tar is (cut short or damaged|not a readable tar archive)"):
        contents(path)


def test_archive_cut_between_two_files_is_refused(tmp_path: Path) -> None:
    """tarfile alone takes this for a whole archive of one file."""
    path = write(tmp_path / "a.tar", {"a": b"x" * 512, "b": b"y" * 512})
    path.write_bytes(path.read_bytes()[:1024])
    with tarfile.open(path) as file:
        assert file.getnames() == ["a"]
    with pytest.raises(DataError, match="cut short or damaged: no end mark"):
        contents(path)


def test_damaged_header_in_the_middle_is_refused(tmp_path: Path) -> None:
    """tarfile alone stops there, as if it were the end."""
    path = write(tmp_path / "a.tar", {"a": b"x" * 512, "b": b"y" * 512})
    content = bytearray(path.read_bytes())
    content[1024] ^= 255
    path.write_bytes(content)
    with pytest.raises(DataError, match="cut short or damaged"):
        contents(path)


def test_wrong_checksum_at_the_end_of_gzip_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar.gz", FILES, "w:gz")
    content = bytearray(path.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable tar archive: CRC"):
        contents(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x1f\x8bhello", b"BZhello", b"\xfd7zXZ\x00hello", b"x" * 2000])
def test_what_is_no_tar_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tar is not a readable tar archive"):
        contents(path)


def test_missing_archive_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.tar is not a readable tar archive: .*No such file"):
        contents(tmp_path / "none.tar")


def test_archive_that_unpacks_past_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar.gz", {"a": bytes(10**6), "b": b"x"}, "w:gz")
    assert len(path.read_bytes()) < 10**4
    monkeypatch.setattr(archive, "LARGEST_ARCHIVE", 10**6)
    with pytest.raises(DataError, match="unpacks to more than 1000000 bytes"):
        for _ in archive.members(path, no_progress):
            pass


def test_file_that_would_take_hours_to_skip_is_refused_before(tmp_path: Path) -> None:
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(info("a", size=2**40).tobuf(tarfile.GNU_FORMAT) + bytes(4096)))
    with pytest.raises(DataError, match="unpacks to more than 17179869184 bytes"):
        for _ in archive.members(path, no_progress):
            pass


def test_member_past_the_limit_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tar", {"a": bytes(10**6)})
    monkeypatch.setattr(archive, "LARGEST_MEMBER", 10**5)
    with pytest.raises(DataError, match="asks for 1000000 bytes at once, limit 100000"):
        contents(path)


def test_header_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    """A long-name record of 2^33 bytes, which tarfile would read into memory before anything is yielded."""
    header = info("././@LongLink", size=2**33, kind=tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(header + bytes(4096)))
    with pytest.raises(DataError, match="asks for 8589934592 bytes at once"):
        contents(path)


def test_header_that_leads_backwards_is_refused(tmp_path: Path) -> None:
    """A negative size, by which tarfile goes round in circles for ever."""
    header = bytearray(info("a").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(-1024, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    path = tmp_path / "a.tar"
    path.write_bytes(write(tmp_path / "b.tar", {"b": b"x"}).read_bytes()[:1024] + bytes(header) + bytes(10240))
    with pytest.raises(DataError, match=r"leads backwards"):
        contents(path)


def test_progress_counts_the_bytes_of_the_archive(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {str(index): b"x" for index in range(1000)})
    calls: list[tuple[str, int, int | None]] = []
    for _ in archive.members(path, lambda what, done, whole: calls.append((what, done, whole))):
        pass
    size = path.stat().st_size
    assert {(what, whole) for what, _, whole in calls} == {("a.tar", size)}
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert done[-1] == size
    assert len(done) == 5  # one for each 256 members begun, one for the end
