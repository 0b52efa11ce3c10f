"""A journal that is damaged, of another program, or out of reach: one clear error, and the file stays as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from accountants import Repetitions
from dpdl.errors import CheckpointError
from dpdl.tradeoff.cases import Case
from dpdl.tradeoff.grid import Grid
from dpdl.tradeoff.journal import JOURNAL, SCHEMA
from tests.tradeoff.command_line import dpdl
from tests.tradeoff.small_training import small

SELECT: dict[str, Any] = {
    "epsilons": (2.0,),
    "held_out": "public",
    "select": Repetitions(mean=2.0, shape=1.0),
    "insecure_seed": 11,
}
Lines = list[dict[str, Any]]


def settings(**changed: Any) -> dict[str, Any]:
    """As the command writes them."""
    grid = Grid(
        epsilons=(1.0,), delta=1e-3, dataset_size=10, epochs=1, max_grad_norms=(1.0,), batch_sizes=(5,), settings={}
    )
    case = {"data": None, "table": "wine", "features": "none", "model": "logistic"}
    return {**grid.to_dict(), "select": None, "train": repr(Case(table="wine")), "case": case, **changed}


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in settings().items() if key != name}


HEADERS: list[tuple[bytes | dict[str, Any], str]] = [
    (b"5\n", "damaged in line 1"),
    (b"\xff\n", "damaged in line 1"),
    (b"", "no sweep of this version"),
    (b"[" * 100_000 + b"]" * 100_000 + b"\n", "damaged in line 1"),
    (b'{"schema": NaN}\n', "damaged in line 1"),
    (b'{"schema":"dpdl.sweep/1"}\n', "names no settings"),
    (b'{"schema":"dpdl.sweep/1","asked":5}\n', "names no settings"),
    (b'{"schema":"dpdl.sweep/9","asked":{}}\n', "is of schema 'dpdl.sweep/9'"),
    ({"case": {"data": None, "bogus": 1}}, "missing"),
    ({"train": "mine.train"}, "begun by dpdl.sweep"),
    (without("delta"), "missing ['delta']"),
    (without("select"), "missing ['select']"),
    (settings(more=1), "unknown ['more']"),
    (settings(case={"data": None}), "case is"),
    (settings(case={**settings()["case"], "data": 5}), "case is"),
    (settings(case={**settings()["case"], "model": "oracle"}), "model must be"),
    (settings(epsilons=5), "epsilons is 5"),
    (settings(seeds=[0, "a"]), "seeds is"),
    (settings(plans=[{}]), "plans is"),
    (settings(settings=5), "settings is 5"),
    (settings(lrs=[10**400]), "lrs is"),
    (settings(delta=[1]), "delta is"),
    (settings(select={"mean": 5.0}), "select is"),
    (settings(select={"mean": "five", "shape": 0.0}), "select is"),
]


@pytest.mark.parametrize(("header", "said"), HEADERS)
def test_damaged_settings_are_one_line(
    header: bytes | dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    line = header if isinstance(header, bytes) else json.dumps({"schema": SCHEMA, "asked": header}).encode() + b"\n"
    path = tmp_path / JOURNAL
    path.write_bytes(line)
    assert dpdl("sweep", "--resume", "--output", str(tmp_path)) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown) < 2000
    assert path.read_bytes() == line


def test_a_journal_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / JOURNAL).mkdir()
    assert dpdl("sweep", "--resume", "--output", str(tmp_path)) == 2
    assert "cannot be read" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="cannot be written"):
        small(output=tmp_path, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        small(output=tmp_path / "file")
    with pytest.raises(CheckpointError, match="cannot be written"):
        small(output=Path("/proc/nowhere"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    small(output=folder, epsilons=(1.0,), seeds=(0,), baseline=False)
    return (folder / JOURNAL).read_bytes()


def changed(row: dict[str, Any]) -> Callable[[Lines], None]:
    def change(lines: Lines) -> None:
        lines[-1]["row"].update(row)

    return change


@pytest.mark.parametrize(
    "row",
    [
        {"epsilon": "1"},
        {"epsilon": None},
        {"epsilon": -1.0},
        {"score": True},
        {"score": "inf"},
        {"steps": 3.5},
        {"metrics": {"a": "b"}},
        {"metrics": []},
        {"key": 5},
        {"error": 5},
        {"error": "both"},
        {"report": None},
        {"report": 5},
        {"unknown": 5},
    ],
    ids=str,
)
def test_a_damaged_row_is_refused(row: dict[str, Any], whole: bytes, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in whole.splitlines()]
    changed(row)(lines)
    damaged = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    (tmp_path / JOURNAL).write_bytes(damaged)
    only: dict[str, Any] = {"epsilons": (1.0,), "seeds": (0,), "baseline": False}
    with pytest.raises(CheckpointError, match="row of the sweep is"):
        small(output=tmp_path, resume=True, **only)
    assert (tmp_path / JOURNAL).read_bytes() == damaged


@pytest.mark.parametrize(
    "drawn",
    [
        {},
        {"picks": [0], "ties": []},
        {"picks": [2], "ties": [1]},
        {"picks": [0], "ties": [True]},
        {"picks": 1, "ties": 1},
    ],
    ids=str,
)
def test_a_damaged_draw_is_refused(drawn: dict[str, Any], tmp_path: Path) -> None:
    small(output=tmp_path, **SELECT)
    path = tmp_path / "secret" / JOURNAL
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    next(line for line in lines if "drawn" in line)["drawn"] = drawn
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CheckpointError, match="drew is damaged"):
        small(output=tmp_path, resume=True, **SELECT)


def test_a_refusal_leaves_the_sweep_free_for_the_next_try(tmp_path: Path) -> None:
    small(output=tmp_path, epsilons=(1.0,), seeds=(0,))
    with pytest.raises(CheckpointError, match="asked otherwise") as kept:
        small(output=tmp_path, resume=True, epsilons=(2.0,), seeds=(0,))
    assert not small(output=tmp_path, resume=True, epsilons=(1.0,), seeds=(0,)).failed
    assert kept.value is not None  # and with it all its frames
