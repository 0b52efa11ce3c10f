"""What ways of training cost, side by side, with all that was assumed: as text, and as plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["CostReport", "SchemeCost", "shown"]

_SCHEMA = "dpdl.split.cost/1"
_STEP = 1000.0  # from a unit to the next: decimal, as in published tables
_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


@dataclass(frozen=True, kw_only=True)
class SchemeCost:
    """One way of training, from the first step to the last.

    Attributes:
        name: "split", "federated", "large batch".
        client_sent, client_received: bytes of one client.
        total_bytes: that cross the network, each counted once.
        client_flops: of one client.
        server_flops: of the server.
    """

    name: str
    client_sent: float
    client_received: float
    total_bytes: float
    client_flops: float
    server_flops: float

    @property
    def client_bytes(self) -> float:
        """Sent and received, of one client."""
        return self.client_sent + self.client_received


@dataclass(frozen=True, kw_only=True)
class CostReport:
    """Ways of training the same network on the same records.

    Attributes:
        clients: how many.
        schemes: one each.
        break_even: for each other way, the least number of clients with which split learning moves less; None: never.
        assumptions: all that the figures rest on.
    """

    clients: int
    schemes: tuple[SchemeCost, ...]
    break_even: Mapping[str, int | None]
    assumptions: tuple[str, ...]

    def scheme(self, name: str) -> SchemeCost:
        """The way of that name."""
        return next(scheme for scheme in self.schemes if scheme.name == name)

    def __str__(self) -> str:
        lines = [f"{'':<12}{'a client, bytes':>17}{'all, bytes':>14}{'a client, FLOPs':>18}{'all clients, FLOPs':>21}"]
        lines += [
            f"{one.name:<12}{shown(one.client_bytes, 'B'):>17}{shown(one.total_bytes, 'B'):>14}"
            f"{shown(one.client_flops, ''):>18}{shown(one.client_flops * self.clients, ''):>21}"
            for one in self.schemes
        ]
        for name, clients in self.break_even.items():
            found = "with no number of clients" if clients is None else f"from {clients:,} clients on"
            lines.append(f"split moves fewer bytes in all than {name}: {found}")
        return "\n".join([*lines, "assumed:", *(f"  - {text}" for text in self.assumptions)])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        schemes = {one.name: {**asdict(one), "client_bytes": one.client_bytes} for one in self.schemes}
        return {
            "schema": _SCHEMA,
            "clients": self.clients,
            "schemes": schemes,
            "break_even_clients": dict(self.break_even),
            "assumptions": list(self.assumptions),
        }

    def to_json(self) -> str:
        """The report as JSON, with its schema."""
        return json.dumps(self.to_dict(), indent=2)


def shown(value: float, unit: str) -> str:
    """A number with a decimal prefix and four digits."""
    for prefix in _PREFIXES[:-1]:
        if value < _STEP:
            return f"{value:.4g} {prefix}{unit}".rstrip()
        value /= _STEP
    return f"{value:.4g} {_PREFIXES[-1]}{unit}".rstrip()
