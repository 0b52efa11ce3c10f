"""What a round came to: what may be published, and, apart from it, what may not.

    summary = server.close_round(answers)
    print(summary)                  # with what is private, for the operator of the server
    summary.to_publish()            # without

Published may be what is computed from the plan and from noisy releases. Counts, names and everything else about who
took part are not covered by the guarantee: under Poisson sampling the claim rests on nobody knowing who took part, and
even the size of a cohort is told by one client more or less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["PrivateRound", "RoundSummary"]


@dataclass(frozen=True, kw_only=True)
class PrivateRound:
    """About who took part. No guarantee covers it: it stays with the operator of the server.

    Attributes:
        outcomes: what became of each chosen client's answer: "accepted", "not finite", "malformed", the reason of its
            refusal ("budget", "request", "failed", ...), or "lost".
        refused: answers that were not looked at, by reason: "duplicate", "not chosen", "another round".
        clipped: accepted updates that were scaled down; None if there is no plan.
        weights_lowered: accepted replies whose weight was above the plan's; None if there is no plan.
        excluded_tensors: tensors in accepted replies that are in the model and are not averaged (buffers).
        problem: what was wrong with the latest update that counts as zero.
    """

    outcomes: Mapping[str, str]
    refused: Mapping[str, int] = field(default_factory=dict)
    clipped: int | None = None
    weights_lowered: int | None = None
    excluded_tensors: int = 0
    problem: str = ""

    @property
    def chosen(self) -> int:
        """How many clients were asked."""
        return len(self.outcomes)

    @property
    def counts(self) -> dict[str, int]:
        """How many of the chosen clients' answers became what."""
        found: dict[str, int] = {}
        for outcome in self.outcomes.values():
            found[outcome] = found.get(outcome, 0) + 1
        return found

    def __str__(self) -> str:
        parts = [f"{self.chosen} asked", *(f"{count} {outcome}" for outcome, count in sorted(self.counts.items()))]
        parts += [f"{count} more refused ({reason})" for reason, count in sorted(self.refused.items())]
        if self.clipped is not None:
            parts.append(f"{self.clipped} clipped")
        if self.weights_lowered:
            parts.append(f"{self.weights_lowered} weights lowered")
        if self.excluded_tensors:
            parts.append(f"{self.excluded_tensors} tensors left out")
        if self.problem:
            parts.append(f"of one that counts as zero: {self.problem}")
        return ", ".join(parts)


@dataclass(frozen=True, kw_only=True)
class RoundSummary:
    """One closed round, as `FederatedServer.close_round` returns it.

    All but `private` is computed from the plan and from noisy releases, so `to_publish` costs nothing. Printed, it
    shows `private` as well: for the operator of the server.

    Attributes:
        round: its number, from 1.
        max_update_norm: the norm that clipped its updates; None if there is no plan, as the next four.
        noise_std: standard deviation of the noise on the sum, in each coordinate.
        denominator: what the noisy sum was divided by.
        next_max_update_norm: the norm of the next round.
        unclipped_fraction: noisy, if clipping is adaptive, else None. Those who did not answer count as at the
            quantile.
        private: what may not be published.
    """

    round: int
    private: PrivateRound
    max_update_norm: float | None = None
    noise_std: float | None = None
    denominator: float | None = None
    next_max_update_norm: float | None = None
    unclipped_fraction: float | None = None

    def to_publish(self) -> dict[str, Any]:
        """What is computed from the plan and from noisy releases, as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "private" and value is not None}

    def __str__(self) -> str:
        shown = ", ".join(f"{name.replace('_', ' ')} {value:.6g}" for name, value in self.to_publish().items())
        return f"{shown}; not to be published: {self.private}"
