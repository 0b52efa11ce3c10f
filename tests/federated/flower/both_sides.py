"""One round, by Flower's strategies and mods on numpy arrays, and by our server: what the tests of faults compare."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flowers
from torch import Tensor, nn

from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.messages import FitReply
from dpdl.federated.server import FederatedServer
from tests.federated.flower.grid import arrays_of, context

Arrays = Mapping[str, Any]


# ── Flower's side ───────────────────────────────────────────────────────────────────────────────────


def record(arrays: Arrays) -> ArrayRecord:
    return ArrayRecord({name: Array(np.asarray(values)) for name, values in arrays.items()})


def replies_of(updates: Iterable[Arrays], state: Arrays, counts: Sequence[int] = ()) -> list[Message]:
    """Weights after training, as Flower's clients send them."""
    request = Message(content=RecordDict(), dst_node_id=2, message_type="train")
    found = []
    for index, update in enumerate(updates):
        weights = {name: state[name] + change for name, change in update.items()}
        metrics = MetricRecord({"num-examples": counts[index] if counts else 1})
        found.append(Message(RecordDict({"arrays": record(weights), "metrics": metrics}), reply_to=request))
    return found


def aggregated(strategy: Any, updates: Iterable[Arrays], state: Arrays, counts: Sequence[int] = ()) -> Arrays:
    """One round's step of the global weights by a strategy of Flower's that clips at the server."""
    strategy.current_arrays = record(state)
    result, _ = strategy.aggregate_train(1, replies_of(updates, state, counts))
    assert result is not None
    return {name: array.numpy() - state[name] for name, array in result.items()}


def fixed(noise: float, clients: int, **settings: Any) -> Any:
    return flowers.DifferentialPrivacyServerSideFixedClipping(flowers.FedAvg(), noise, 1.0, clients, **settings)


def adaptive(noise: float, clients: int, norm: float, **settings: Any) -> Any:
    return flowers.DifferentialPrivacyServerSideAdaptiveClipping(flowers.FedAvg(), noise, clients, norm, **settings)


def through(some_mod: Any, before: Arrays, after: Arrays, **settings: float) -> Arrays:
    """What a client's weights become on their way through a mod."""
    app = ClientApp(mods=[some_mod])

    @app.train()
    def train(message: Message, node: Context) -> Message:
        content = RecordDict({"arrays": record(after), "metrics": MetricRecord({"num-examples": 3})})
        return Message(content, reply_to=message)

    content = RecordDict({"arrays": record(before), "config": ConfigRecord({"clipping_norm": 1.0, **settings})})
    reply = app(Message(content=content, dst_node_id=2, message_type="train"), context())
    assert reply.has_content(), reply.error.reason
    return arrays_of(reply.content)


# ── ours ────────────────────────────────────────────────────────────────────────────────────────────


def private_server(state: Mapping[str, Tensor] | nn.Module, **changes: Any) -> FederatedServer:
    settings: dict[str, Any] = {
        "clients": 10,
        "sampling": "all",
        "rounds": 100,
        "noise_multiplier": 1.0,
        "max_update_norm": 1.0,
        "relation": "zero_out",
    }
    return FederatedServer(state, plan=ClientLevelPlan(**(settings | changes)), insecure_seed=5)


def step(server: FederatedServer, updates: Mapping[str, Mapping[str, Tensor]], **weights: float) -> dict[str, Tensor]:
    """One round's step of the global weights. Who has no update has not answered."""
    before = server.state
    server.open_round([f"client-{index}" for index in range(server.plan.clients)] if server.plan else list(updates))
    server.close_round(
        FitReply(client=name, round=server.round, update=update, weight=weights.get(name, 1.0))
        for name, update in updates.items()
    )
    return {name: server.state[name] - before[name] for name in before}
