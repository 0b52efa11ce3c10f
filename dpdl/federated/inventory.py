"""What leaves a client: every tensor and every metric, with the mechanism that covers it, or UNPROTECTED."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["UNPROTECTED", "Inventory", "Release"]

UNPROTECTED = "UNPROTECTED"  # in place of a mechanism, where there is none


@dataclass(frozen=True, kw_only=True)
class Release:
    """One thing that leaves: a tensor, or a number.

    It is the word of whoever made the reply, to be compared with what the mechanism's ledger holds; it proves nothing.

    Attributes:
        name: the tensor's or the metric's.
        kind: "parameter", "buffer", "metric" or "count".
        mechanism: what covers it, in words; `UNPROTECTED` if nothing does.
        shape: of the tensor; () for a number.
    """

    name: str
    kind: str
    mechanism: str
    shape: tuple[int, ...] = ()

    @property
    def protected(self) -> bool:
        """Whether a mechanism covers it."""
        return self.mechanism != UNPROTECTED


@dataclass(frozen=True)
class Inventory:
    """All that one reply releases; iterates over it, and prints as a table.

    Attributes:
        releases: one for each tensor, metric and count in the reply, those that nothing covers included.

    Example:
        >>> sent = Inventory((Release(name="loss", kind="metric", mechanism=UNPROTECTED),))
        >>> print(sent, len(sent.unprotected))
        loss  metric     UNPROTECTED 1
    """

    releases: tuple[Release, ...] = ()

    @property
    def unprotected(self) -> tuple[Release, ...]:
        """What leaves without a mechanism."""
        return tuple(release for release in self.releases if not release.protected)

    def __iter__(self) -> Iterator[Release]:
        return iter(self.releases)

    def __len__(self) -> int:
        return len(self.releases)

    def __str__(self) -> str:
        width = max((len(release.name) for release in self.releases), default=0)
        return "\n".join(f"{r.name:<{width}}  {r.kind:<9}  {r.mechanism}" for r in self.releases)

    def to_list(self) -> list[dict[str, Any]]:
        """Plain values, one mapping for each release."""
        return [
            {"name": r.name, "kind": r.kind, "mechanism": r.mechanism, "shape": list(r.shape)} for r in self.releases
        ]

    @classmethod
    def from_list(cls, values: list[Mapping[str, Any]]) -> Inventory:
        """What `to_list` wrote."""
        return cls(
            tuple(
                Release(name=v["name"], kind=v["kind"], mechanism=v["mechanism"], shape=tuple(v["shape"]))
                for v in values
            )
        )
