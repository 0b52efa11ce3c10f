"""The same federation in one process, without Flower: python -m dpdl_flower.in_process clients=10 insecure-seed=1"""

import sys
import tempfile
import time
import tomllib
from pathlib import Path

from dpdl.federated.runner import run_federated
from dpdl.federated.virtual_clients import VirtualClients
from dpdl_flower.task import DPClient, Settings, make_client, make_server, write_outcome


def settings_of(changes: list[str]) -> Settings:
    """The app's settings from pyproject.toml, with changes such as "rounds=5"."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    settings = dict(project["tool"]["flwr"]["app"]["config"])
    for change in changes:
        name, _, value = change.partition("=")
        settings[name] = type(settings[name])(value)
    return settings


def main(changes: list[str]) -> None:
    """All rounds, with ledgers in a folder that is gone afterwards unless one is named."""
    settings = settings_of(changes)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(str(settings["ledger-folder"] or temporary))

        def client(index: int, number: int) -> DPClient:
            return make_client(index, number, settings=settings, ledger=folder / f"client-{index}.ledger")

        server = make_server(settings)
        clients = VirtualClients(client, int(settings["clients"]))
        began = time.monotonic()
        run = run_federated(server, clients, rounds=int(settings["rounds"]))
        write_outcome(settings, server, seconds=round(time.monotonic() - began, 1))
        sys.stdout.write(f"{run.report}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
