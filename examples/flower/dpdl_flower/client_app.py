"""Flower's side of a client: which part of the data the node holds, and where its ledger is."""

from flwr.app import Context

from dpdl.federated.client import DPClient
from dpdl.federated.flower import client_app, ledger_path, partition, release_inventory
from dpdl_flower.task import make_client


def client(context: Context) -> DPClient:
    """The node's client, for one message."""
    return make_client(*partition(context), settings=context.run_config, ledger=ledger_path(context))


app = client_app(client, mods=[release_inventory(on_unprotected="refuse")])
