"""The example as Flower runs it: a simulation, or SuperLink and SuperNodes as processes on this machine's loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
APP = ROOT / "examples" / "flower"
BIN = Path(sys.executable).parent
OFFLINE = {
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


def environment(home: Path) -> dict[str, str]:
    return {**os.environ, **OFFLINE, "FLWR_HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}"}


def settings_text(**settings: Any) -> str:
    """As `flwr run --run-config` takes them."""
    return " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in settings.items())


def in_process(folder: Path, **settings: Any) -> dict[str, Any]:
    """The outcome of the example in one process."""
    changes = [f"{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "dpdl_flower.in_process", *changes, f"outcome={folder / 'in_process.json'}"]
    subprocess.run(command, cwd=APP, env=environment(folder), check=True, timeout=300, capture_output=True)
    return read(folder / "in_process.json")


def simulation(folder: Path, **settings: Any) -> dict[str, Any]:
    """The outcome of `flwr run`, with as many SuperNodes as clients."""
    home, ledgers = folder / "home", folder / "ledgers"
    home.mkdir()
    ledgers.mkdir()
    with _on_a_port_of_its_own(home, "--simulation") as connection:
        number = ["flwr", "federation", "simulation-config", "@none/default", connection]
        _flwr([*number, "--num-supernodes", str(settings["clients"])], home)
        text = settings_text(**settings, ledger_folder=str(ledgers), outcome=str(folder / "outcome.json"))
        _flwr(["flwr", "run", str(APP), connection, "--stream", "--run-config", text], home)
    return read(folder / "outcome.json")


class Deployment:
    """A SuperLink, and SuperNodes whose ledgers are their own."""

    def __init__(self, folder: Path, connection: str, address: str, number: int) -> None:
        self.folder, self.connection, self.address, self.number = folder, connection, address, number
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.run: subprocess.Popen[bytes] | None = None

    def start(self, index: int) -> None:
        """A SuperNode; a second one of an index takes over from the first."""
        ledger = self.folder / f"client-{index}.ledger"
        config = f'partition-id={index} num-partitions={self.number} ledger="{ledger}"'
        node = ["flower-supernode", "--insecure", "--superlink", self.address, "--port", str(free_port())]
        command = [str(BIN / node[0]), *node[1:], "--node-config", config]
        self.nodes[index] = _started(command, self.folder / "home", self.folder / f"node-{index}.log")

    def kill(self, index: int) -> None:
        """kill -9 of a SuperNode and of the process that trains for it."""
        os.killpg(self.nodes.pop(index).pid, signal.SIGKILL)

    def submit(self, **settings: Any) -> None:
        text = settings_text(**settings, clients=self.number, outcome=str(self.folder / "outcome.json"))
        command = [str(BIN / "flwr"), "run", str(APP), self.connection, "--stream", "--run-config", text]
        self.run = _started(command, self.folder / "home", self.folder / "run.log")

    def log(self) -> str:
        return (self.folder / "run.log").read_text(errors="replace")

    def wait_for(self, text: str, *, timeout: float) -> None:
        """Until the run's log has it."""
        end = time.monotonic() + timeout
        while text not in self.log():
            assert time.monotonic() < end, f"no {text!r} in {timeout} s:\n{self.log()}"
            time.sleep(0.2)

    def outcome(self, *, timeout: float) -> dict[str, Any]:
        assert self.run is not None
        self.run.wait(timeout)
        assert (self.folder / "outcome.json").exists(), self.log()
        return read(self.folder / "outcome.json")


@contextmanager
def deployment(folder: Path, number: int) -> Iterator[Deployment]:
    (folder / "home").mkdir()
    with _on_a_port_of_its_own(folder / "home") as connection:
        address = connection.removeprefix("at-").replace("-", ":").replace("127:0:0:1", "127.0.0.1")
        deployed = Deployment(folder, connection, address, number)
        try:
            for index in range(number):
                deployed.start(index)
            yield deployed
        finally:
            for process in [*deployed.nodes.values(), *([deployed.run] if deployed.run else [])]:
                _end(process)


@contextmanager
def _on_a_port_of_its_own(home: Path, *options: str) -> Iterator[str]:
    """A SuperLink, and the name of the connection to it in Flower's configuration."""
    port = free_port()
    connection = f"at-127-0-0-1-{port}"
    lines = ["[superlink]", f'default = "{connection}"', f"[superlink.{connection}]"]
    lines += [f'address = "127.0.0.1:{port}"', "insecure = true"]
    (home / "config.toml").write_text("\n".join(lines) + "\n")
    command = [str(BIN / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", str(port), *options]
    link = _started(command, home, home / "superlink.log")
    try:
        end = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            if link.poll() is not None or time.monotonic() > end:
                raise RuntimeError((home / "superlink.log").read_text())
            time.sleep(0.2)
        yield connection
    finally:
        _end(link)


def _flwr(command: Sequence[str], home: Path) -> None:
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]], env=environment(home), timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _started(command: Sequence[str], home: Path, log: Path) -> subprocess.Popen[bytes]:
    """In a process group of its own, so that its children end with it."""
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=environment(home), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def _end(process: subprocess.Popen[bytes]) -> None:
    """A process and its children, those first that clean up."""
    with suppress(subprocess.TimeoutExpired):
        process.terminate()
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def has_flower() -> bool:
    return shutil.which("flower-superlink", path=str(BIN)) is not None
