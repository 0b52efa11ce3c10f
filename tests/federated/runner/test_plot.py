"""The plot shows the evaluation, a line for each client, the server's, and where a budget ended."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dpdl.errors import ParameterError
from dpdl.federated.history import History, RoundRecord
from dpdl.federated.plot import plot_federated

pytest.importorskip("matplotlib")

PNG = b"\x89PNG"


def history(clients: int, *, server: bool = False, epsilon: float = 0.5, refused_from: int = 99) -> History:
    rounds = [
        RoundRecord(
            round=number,
            chosen=tuple(f"hospital-{k}" for k in range(clients)),
            client_epsilon={f"hospital-{k}": epsilon * min(number, refused_from - 1) + k for k in range(clients)},
            refused={"budget": ("hospital-0",)} if number >= refused_from else {},
            server_epsilon=0.1 * number if server else None,
            evaluation={"accuracy": number / 10},
            seconds=0.1,
        )
        for number in range(1, 6)
    ]
    return History(delta=1e-5, rounds=tuple(rounds), secret_participation=True)


def texts(path: Path, shown: History, monkeypatch: pytest.MonkeyPatch) -> str:
    """All that is written in the figure."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    plot_federated(shown, path, title="five hospitals")
    return " ".join(ElementTree.parse(path).getroot().itertext())


def test_clients_and_server_are_named_and_refusals_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = texts(tmp_path / "run.svg", history(5, server=True, refused_from=4), monkeypatch)
    for words in ("five hospitals", "accuracy", "hospital-0", "hospital-4", "server", "budget spent", "delta = 1e-05"):
        assert words in shown, words
    assert "budget spent" not in texts(tmp_path / "run.svg", history(5), monkeypatch)


def test_many_clients_are_drawn_without_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "hospital" not in texts(tmp_path / "run.svg", history(40), monkeypatch).replace("five hospitals", "")


def test_a_run_without_a_guarantee_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no guarantee" in texts(tmp_path / "run.svg", history(2, epsilon=math.inf), monkeypatch)


def test_a_public_history_shows_the_server_and_no_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = texts(tmp_path / "run.svg", history(5, server=True).public(), monkeypatch)
    assert "server" in shown
    assert "hospital-" not in shown


def test_a_picture_is_written_and_bad_paths_are_refused(tmp_path: Path) -> None:
    plot_federated(history(3), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == PNG
    for path in (tmp_path / "run.unknown", tmp_path / "nowhere" / "run.png"):
        with pytest.raises(ParameterError, match=path.name):
            plot_federated(history(3), path)
    with pytest.raises(ParameterError, match="no rounds"):
        plot_federated(History(delta=1e-5), tmp_path / "empty.png")
