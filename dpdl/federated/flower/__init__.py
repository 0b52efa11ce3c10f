"""Flower carries the messages: clients and a server of `dpdl.federated` on its message API; its own faults, checked.

Needs the extra `federated` (flwr 1.41).
"""

try:
    import flwr  # noqa: F401
except ImportError as error:
    raise ImportError("dpdl.federated.flower needs Flower. Install dpdl[federated].") from error

from dpdl.federated.flower.check_strategy import check_strategy
from dpdl.federated.flower.client_app import client_app, ledger_path, partition
from dpdl.federated.flower.findings import Finding
from dpdl.federated.flower.mods import inventory_of, release_inventory, update_clipping
from dpdl.federated.flower.moments import ask_moments
from dpdl.federated.flower.strategy import DPStrategy

__all__ = [
    "DPStrategy",
    "Finding",
    "ask_moments",
    "check_strategy",
    "client_app",
    "inventory_of",
    "ledger_path",
    "partition",
    "release_inventory",
    "update_clipping",
]
