"""A split network in one process: all its parties, wired as over a network, with the same party objects.

run = SplitRun(graph, {"client": opt_client, "server": opt_server}, {"x": x, "y": y}, plan)
run.run()
print(run.report(delta=1e-5))
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor

from dpdl.claims import AdversaryReport
from dpdl.errors import ParameterError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.split.channel import Channel, Handler
from dpdl.split.client import SplitClient
from dpdl.split.clip import Clip
from dpdl.split.columns import Columns
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.drivers import default_driver
from dpdl.split.graph import SplitGraph
from dpdl.split.outlet import Outlet
from dpdl.split.server import SplitServer

__all__ = ["SplitRun"]


@final
class SplitRun:
    """All parties of a split network in one process.

    Args:
        graph: with all modules and losses.
        optimizers: party to the optimizer of its parts' parameters, for each party that trains.
        data: all columns, by name: a party is given its own; or party to its `Columns`.
        plan: what all parties are held to.
        clip: how rows are clipped; by default the plan's norm in equal parts.
        release: the door through which rows leave a party; one for all, or one for each by name. By default they leave
            as they are.
        driver: who begins the steps; by default the owner of the data.
        client: what the driver is called where there are several clients.
        servers: parties that exist already, from another run with them: several clients train one server.
        ledger: where what is spent on the driver's records adds up.
        execution: speed and memory.
        connect: how a handler becomes a channel; a `LocalChannel` writes packets as bytes and counts them.

    Guarantee:
        The claims of `report`, per adversary; the plan alone covers those who get the trained network.

    Raises:
        ParameterError, ModelError, WrapError: something does not fit; nothing was changed.
    """

    def __init__(
        self,
        graph: SplitGraph,
        optimizers: Mapping[str, torch.optim.Optimizer],
        data: Mapping[str, Tensor] | Mapping[str, Columns],
        plan: PrivacyPlan,
        *,
        clip: Clip | None = None,
        release: Outlet | Mapping[str, Outlet] | None = None,
        driver: str | None = None,
        client: str | None = None,
        servers: Mapping[str, SplitServer] | None = None,
        ledger: Ledger | LedgerFile | None = None,
        execution: Execution | None = None,
        connect: Callable[[Handler], Channel] = DirectChannel,
    ) -> None:
        driver = driver or default_driver(graph)
        calls = graph.calls(driver)
        existing = dict(servers or {})
        own = [party for party in calls if party not in existing]
        if unknown := sorted((set(optimizers) | set(existing)) - set(calls)):
            raise ParameterError(f"{unknown} are none of the graph's parties {list(calls)}.")
        columns = {party: _columns_of(graph, party, data) for party in own}
        doors = {party: release.get(party) if isinstance(release, Mapping) else release for party in own}
        self.graph, self.servers = graph, existing
        for party in reversed(list(calls)):  # those that are asked before those that ask them
            if party in existing or party == driver:
                continue
            self.servers[party] = SplitServer(
                graph,
                party,
                plan={client or driver: plan},
                optimizer=optimizers.get(party),
                data=columns[party],
                channels={child: connect(self.servers[child].handle) for child in calls[party]},
                driver=driver,
                clip=clip,
                release=doors[party],
                execution=execution,
            )
        for party, server in existing.items():
            if party in (servers or {}):
                _admit(server, client or driver, plan, clip)
        self.channels = {child: connect(self.servers[child].handle) for child in calls[driver]}
        self.client = SplitClient(
            graph,
            driver,
            plan=plan,
            optimizer=optimizers.get(driver),
            data=columns[driver],
            channels=self.channels,
            name=client,
            clip=clip,
            release=doors[driver],
            ledger=ledger,
            execution=execution,
        )

    @property
    def ledger(self) -> Ledger:
        """What has been spent on the driver's records."""
        return self.client.ledger

    @property
    def steps_taken(self) -> int:
        """Steps recorded so far."""
        return self.client.steps_taken

    def run(self, steps: int | None = None) -> None:
        """Take some steps of the plan, or all that are left; errors as `SplitClient.run`."""
        self.client.run(steps)

    def step(self) -> None:
        """One step; errors as `SplitClient.step`."""
        self.client.step()

    def predict(
        self, columns: Mapping[str, Tensor] | Tensor | None = None, *, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Split inference: arguments as in `SplitClient.predict`."""
        return self.client.predict(columns, rows=rows)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon spent so far at `delta`, against who gets the trained network."""
        return self.client.epsilon(delta)

    def report(self, delta: float) -> AdversaryReport:
        """What may be claimed, adversary by adversary.

        Args:
            delta: in (0, 1), at which epsilon is said.
        """
        return self.client.report(delta)


def _admit(server: SplitServer, client: str, plan: PrivacyPlan, clip: Clip | None) -> None:
    if client not in [one.name for one in server.party.clients]:
        server.party.admit(client, plan, clip)


def _columns_of(graph: SplitGraph, party: str, data: Mapping[str, Tensor] | Mapping[str, Columns]) -> Columns | None:
    if isinstance(given := data.get(party), Columns):
        return given
    names = [name for name, owner in graph.columns.items() if owner == party]
    tensors = {name: tensor for name, tensor in data.items() if name in names and isinstance(tensor, Tensor)}
    if missing := sorted(set(names) - set(tensors)):
        raise ParameterError(f"data has no column {missing} of '{party}'. Name the columns as the graph does.")
    return Columns(tensors) if tensors else None
