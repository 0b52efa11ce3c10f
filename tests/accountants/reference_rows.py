"""Reading rows of certified epsilons: mechanisms as plain records, made into events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from accountants import Composed, Event, Gaussian, Laplace, PoissonSampled, SampledWithoutReplacement

MECHANISMS = {
    "gaussian": lambda m: Gaussian(m["sigma"]),
    "poisson_gaussian": lambda m: PoissonSampled(m["q"], Gaussian(m["sigma"])),
    "laplace": lambda m: Laplace(m["b"]),
    "poisson_laplace": lambda m: PoissonSampled(m["q"], Laplace(m["b"])),
    # sigma is in units of what replacing moves, two clip norms
    "wor_gaussian": lambda m: SampledWithoutReplacement(m["batch"], m["n"], Gaussian(2 * m["sigma"])),
}


def event_of(mechanisms: Sequence[Mapping[str, Any]]) -> Event:
    """The composition that the records describe."""
    return Composed([MECHANISMS[m["mech"]](m) * m["count"] for m in mechanisms])
