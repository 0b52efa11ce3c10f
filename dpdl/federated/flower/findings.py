"""What `check_strategy` looks at, and what it finds: one fault of a strategy and accountant pair, and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flwr.serverapp import PrivacyConfig
from flwr.serverapp.strategy import Strategy
from flwr.serverapp.strategy.dp_adaptive_clipping import DifferentialPrivacyAdaptiveBase
from flwr.serverapp.strategy.dp_fixed_clipping import DifferentialPrivacyFixedClippingBase

from accountants import Event, PRVAccountant

__all__ = ["Case", "Finding", "Sampling", "Severity"]

Sampling = Literal["poisson", "fixed_size", "all"]
Severity = Literal["unsound", "unprotected", "fragile", "loose"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of a strategy and its account, as `check_strategy` finds it; prints as a line.

    Attributes:
        code: "F1" to "F12", as docs/flower.md numbers them; "per-round epsilon" for one of an example.
        severity: "unsound": more leaves than is claimed. "unprotected": something leaves that no claim is about.
            "fragile": training breaks off. "loose": the claim holds, and a better one could be made.
        subject: the class, mod or argument that it is about.
        message: what is wrong, with the numbers at hand.
        remedy: what to do.
    """

    code: str
    severity: Severity
    subject: str
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.code} ({self.severity}), {self.subject}: {self.message} {self.remedy}"


_FLOWERS = (DifferentialPrivacyFixedClippingBase, DifferentialPrivacyAdaptiveBase)


@dataclass(frozen=True, kw_only=True)
class Case:
    """All that is known of a run; the fields are the arguments of `check_strategy`."""

    strategy: Strategy
    accountant: Any
    sampling: Sampling | None
    delta: float
    rounds: int
    population: int | None
    weights: tuple[float, ...]
    mods: tuple[object, ...]
    state: Mapping[str, Any]
    reported: tuple[float, ...]
    per_round: Event | None

    @property
    def name(self) -> str:
        """What to call the strategy."""
        return type(self.strategy).__name__

    @property
    def flowers(self) -> Any:
        """The strategy if it is one of Flower's private ones; None if not."""
        return self.strategy if isinstance(self.strategy, _FLOWERS) else None

    @property
    def noise_multiplier(self) -> float:
        """What a round of Flower's strategy claims; with adaptive clipping, of the sum and the bits together."""
        noise = float(self.flowers.noise_multiplier)
        if noise > 0 and isinstance(self.strategy, DifferentialPrivacyAdaptiveBase):
            return float((noise**-2 + (2 * self.strategy.clipped_count_stddev) ** -2) ** -0.5)
        return noise

    def epsilon(self, event: Event) -> float:
        """Of all rounds."""
        return PRVAccountant().compose(event * self.rounds).epsilon(self.delta)

    @property
    def method(self) -> str | None:
        """How the accountant says that clients are drawn: Flower's name for it; None if it does not say."""
        config = getattr(self.accountant, "config", None)
        return str(config.sampling_method.value) if isinstance(config, PrivacyConfig) else None
