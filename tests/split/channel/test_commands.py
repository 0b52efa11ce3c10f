"""Two processes train from two commands, with certificates made by a third; and go on when one is killed."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from accountants.commands.one_line_parser import OneLineParser
from dpdl.cli import main
from dpdl.errors import DataError, ManifestError, ParameterError
from dpdl.ledger_file import LedgerFile
from dpdl.split.commands import group

pytest.importorskip("grpc", reason="grpcio is not installed: pip install 'dpdl[split]'")

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "dpdl", "dpdl.split.commands.group"])
SETTINGS = ["--records", "60", "--batch-size", "12", "--noise-multiplier", "1.0"]


def parsed(*words: str) -> argparse.Namespace:
    parser = OneLineParser(prog="dpdl")
    group.register(parser.add_subparsers(required=True))
    return parser.parse_args(["split", *words])


def split(*words: str) -> int:
    arguments = parsed(*words)
    code: int = arguments.run(arguments)
    return code


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Certificates, and 60 training and 10 test images of noise, as MNIST's files."""
    chance = random.Random(1)
    (tmp_path / "mnist").mkdir()
    for stem, count in (("train", 60), ("t10k", 10)):
        images = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + chance.randbytes(count * 784)
        labels = struct.pack(">4BI", 0, 0, 8, 1, count) + bytes(n % 10 for n in range(count))
        (tmp_path / "mnist" / f"{stem}-images-idx3-ubyte").write_bytes(images)
        (tmp_path / "mnist" / f"{stem}-labels-idx1-ubyte").write_bytes(labels)
    assert split("certificates", str(tmp_path / "keys")) == 0
    return tmp_path


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def ledger_size(site: Path) -> int:
    path = site / "client" / "client.ledger"
    return path.stat().st_size if path.exists() else 0


def wait_for(address: str) -> None:
    """Until somebody listens there."""
    for _ in range(1200):
        try:
            socket.create_connection(("localhost", int(address.rpartition(":")[2])), timeout=1.0).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError("the server does not start")


@contextmanager
def serving(*words: str) -> Iterator[Any]:
    process = PROCESSES.Process(target=split, args=("serve", *words))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def joined(site: Path, address: str, *words: str) -> dict[str, Any]:
    where = ["--address", address, "--certificates", str(site / "keys"), "--output", str(site / "client")]
    assert split("join", *where, *SETTINGS, "--data", str(site / "mnist"), *words) == 0
    told: dict[str, Any] = json.loads((site / "client" / "report.json").read_text())
    said: dict[str, Any] = told["split"]
    return said


def test_two_commands_train_and_report_and_go_on_where_they_were(
    site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"localhost:{free_port()}"
    where = ["--address", address, "--certificates", str(site / "keys"), "--output", str(site / "server")]
    with serving(*where, *SETTINGS, "--epochs", "1") as server:
        first = joined(site, address, "--epochs", "1", "--steps", "3")
        server.join(30.0)
        assert server.exitcode == 0  # the client has said goodbye
    assert "NO GUARANTEE" in capsys.readouterr().out
    assert first["steps"] == 3
    with serving(*where, *SETTINGS, "--epochs", "1"):
        second = joined(site, address, "--epochs", "1", "--json")
    assert second["steps"] == 5
    assert second["dataset_epsilon"] > first["dataset_epsilon"]
    assert json.loads(capsys.readouterr().out)["split"] == second
    assert main(["report", str(site / "client")]) == 0
    assert "NO GUARANTEE" in capsys.readouterr().out
    assert (site / "server" / "server.pt").exists()
    with LedgerFile(site / "client" / "client.ledger") as ledger:
        assert ledger.releases == 5


def kill_the_server(site: Path, *, kills: int, epochs: int, seed: int) -> int:
    """Train with a server that is killed at most so often, and how often it was; each step is spent once."""
    chance = random.Random(seed)
    address = f"localhost:{free_port()}"
    where = ["--address", address, "--certificates", str(site / "keys"), "--output", str(site / "server")]
    over, killed = threading.Event(), []

    def keep_serving() -> None:
        while not over.is_set():
            with serving(*where, *SETTINGS, "--epochs", str(epochs)) as server:
                if len(killed) < kills:
                    size = ledger_size(site)
                    while ledger_size(site) == size and not over.is_set():  # the other one has found us again
                        time.sleep(0.01)
                    time.sleep(chance.uniform(0.0, 0.3))
                    killed.append(server.is_alive())
                else:
                    over.wait(120.0)

    keeper = threading.Thread(target=keep_serving)
    keeper.start()
    try:
        told = joined(site, address, "--epochs", str(epochs))
    finally:
        over.set()
        keeper.join()
    assert told["steps"] == 5 * epochs
    with LedgerFile(site / "client" / "client.ledger") as ledger:
        assert ledger.releases == 5 * epochs
    return sum(killed)


def test_a_run_goes_on_with_a_server_that_was_killed(site: Path) -> None:
    assert kill_the_server(site, kills=2, epochs=12, seed=1) >= 1


@pytest.mark.slow
def test_a_run_goes_on_with_a_server_that_was_killed_fifty_times(site: Path) -> None:
    assert kill_the_server(site, kills=50, epochs=150, seed=2) >= 20


def kill_the_client(site: Path, *, kills: int, epochs: int, seed: int) -> None:
    """Train with a data site that is killed so many times; the steps of all its lives together are the plan's."""
    chance = random.Random(seed)
    address = f"localhost:{free_port()}"
    where = ["--address", address, "--certificates", str(site / "keys")]
    with serving(*where, "--output", str(site / "server"), *SETTINGS, "--epochs", str(epochs)):
        wait_for(address)
        for _ in range(kills):
            size = ledger_size(site)
            words = [*where, "--output", str(site / "client"), "--data", str(site / "mnist"), "--epochs", str(epochs)]
            client = PROCESSES.Process(target=split, args=("join", *words, *SETTINGS, "--steps", "1000"))
            client.start()
            while client.is_alive() and ledger_size(site) <= size:
                time.sleep(0.01)
            time.sleep(chance.uniform(0.0, 0.3))
            client.kill()
            client.join()
        with LedgerFile(site / "client" / "client.ledger") as spent:
            before = spent.releases
        told = joined(site, address, "--epochs", str(epochs))
    assert 0 < before <= told["steps"] == 5 * epochs


def test_a_data_site_that_was_killed_takes_the_steps_that_are_left(site: Path) -> None:
    kill_the_client(site, kills=2, epochs=12, seed=1)


@pytest.mark.slow
def test_a_data_site_that_was_killed_fifty_times_takes_the_steps_that_are_left(site: Path) -> None:
    kill_the_client(site, kills=50, epochs=150, seed=2)


def test_parties_with_other_settings_do_not_train(site: Path) -> None:
    address = f"localhost:{free_port()}"
    where = ["--address", address, "--certificates", str(site / "keys"), "--output", str(site / "server")]
    with (
        serving(*where, *SETTINGS, "--epochs", "2", "--max-grad-norm", "2.0"),
        pytest.raises(ManifestError, match=r"clips.bottom: 1.41.* here, 0.707.* there.*max_steps: 10 here, 5 there"),
    ):
        joined(site, address, "--epochs", "1")
    with LedgerFile(site / "client" / "client.ledger") as ledger:
        assert ledger.releases == 0


def test_settings_that_do_not_fit_the_data_are_refused(site: Path) -> None:
    for words, error in (
        (["--records", "61"], ParameterError),
        (["--batch-size", "61"], ParameterError),
        (["--epochs", "0"], ParameterError),
        (["--steps", "-1"], ParameterError),
        (["--data", str(site / "keys")], DataError),
    ):
        with pytest.raises(error):
            joined(site, "localhost:1", *words)
    with pytest.raises(ManifestError, match="dpdl split certificates"):
        split("join", "--certificates", str(site), "--data", str(site / "mnist"), *SETTINGS)


def test_certificates_are_made_and_added_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "keys")
    assert split("certificates", folder, "--host", "a.example", "--client", "north", "--client", "south") == 0
    assert "north.key  (private, mode 600)" in capsys.readouterr().out
    assert split("certificates", folder, "--add-client", "west") == 0
    assert (tmp_path / "keys" / "west.signing.pub").exists()
