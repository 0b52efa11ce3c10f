"""Federated learning: clients that train with differential privacy, and a server that adds client-level privacy.

server = FederatedServer(model, optimizer=FedAvg())
run = run_federated(server, VirtualClients(make_client, 5), rounds=10)
print(run.report)

`dpdl.federated.flower` carries the same over Flower.
"""

from dpdl.federated.adaptive_clipping import AdaptiveClipping
from dpdl.federated.client import DPClient
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.client_report import ClientSpending
from dpdl.federated.client_sampling import ClientSampling, EveryClient, FixedSizeClients, PoissonClients
from dpdl.federated.history import History
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.messages import Client, FitReply, FitRequest, Refusal
from dpdl.federated.normalisation import Normalisation
from dpdl.federated.partition import by_owner, dirichlet, iid, shards
from dpdl.federated.plain_client import PlainClient
from dpdl.federated.private_moments import PrivateMoments
from dpdl.federated.reply_store import ReplyStore
from dpdl.federated.report import federated_report
from dpdl.federated.round_summary import RoundSummary
from dpdl.federated.runner import FederatedRun, accuracy_on, run_federated
from dpdl.federated.server import FederatedServer
from dpdl.federated.server_optimizers import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, ServerOptimizer
from dpdl.federated.unanswered import UnansweredRounds, unanswered_rounds_of
from dpdl.federated.virtual_clients import VirtualClients

__all__ = [
    "UNPROTECTED",
    "AdaptiveClipping",
    "Client",
    "ClientLevelPlan",
    "ClientSampling",
    "ClientSpending",
    "DPClient",
    "EveryClient",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedYogi",
    "FederatedRun",
    "FederatedServer",
    "FitReply",
    "FitRequest",
    "FixedSizeClients",
    "History",
    "Inventory",
    "LocalUpdateDP",
    "Normalisation",
    "PlainClient",
    "PoissonClients",
    "PrivateMoments",
    "Refusal",
    "Release",
    "ReplyStore",
    "RoundSummary",
    "ServerOptimizer",
    "UnansweredRounds",
    "VirtualClients",
    "accuracy_on",
    "by_owner",
    "dirichlet",
    "federated_report",
    "iid",
    "run_federated",
    "shards",
    "unanswered_rounds_of",
]
