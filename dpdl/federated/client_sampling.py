"""Who is asked in a round: every client by its own coin, a cohort of a fixed size, or everybody.

    chosen = PoissonClients(0.1).select(names, round, stream)

The accountant's claim depends on which of them it is, and only Poisson sampling amplifies under adding or removing a
client: a cohort of a fixed size has to leave somebody else out to take a client in (`dpdl.federated.client_level_plan`
has the claims). Randomness is cryptographic and addressed by the round's message number: whoever could predict a cohort
would know whom a round's noise has to hide.

Public: the rate, the size, who is available. Private, where the claim is amplified: who was chosen, and how many.

References:
    McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models, 2018. arXiv:1710.06963,
    section 2.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np

from accountants import arguments
from dpdl.errors import ParameterError
from dpdl.sampling import PoissonSampler
from dpdl.secure_random import RandomStream

__all__ = ["ClientSampling", "EveryClient", "FixedSizeClients", "PoissonClients"]


class ClientSampling(ABC):
    """Chooses a round's clients among those who are available.

    Three are given: `PoissonClients`, `FixedSizeClients` and `EveryClient`. Without a plan a server takes any; with a
    `ClientLevelPlan` it takes the plan's own, because the accountant's event belongs to one distribution of cohorts:
    one of your own makes no claim.

    Guarantee:
        Deterministic in the set of names, the round and the stream: who asks first changes nothing, and a round that is
        opened again, after it was abandoned, draws the same clients. What the choice does to the guarantee is said by
        `ClientLevelPlan`.

    References:
        McMahan, Ramage, Talwar, Zhang, 2018 (the module has it), section 2: what a round's cohort is.
    """

    @abstractmethod
    def select(self, names: Sequence[str], round: int, stream: RandomStream) -> tuple[str, ...]:
        """The chosen ones, by name, possibly none.

        The order in which names come does not matter: the same names, round and stream give the same choice.

        Args:
            names: of the clients that are available, each once.
            round: the number of the stream's message that this draw uses.
            stream: used for nothing else.

        Raises:
            ParameterError: so many cannot be chosen, or a name stands twice.
        """


@final
@dataclass(frozen=True)
class PoissonClients(ClientSampling):
    """Each client independently, with the same probability.

    The size of a cohort is random, of mean q N, and may be 0. That is what amplifies: given all the others' coins, one
    client is in with probability q, whatever the cohort is. It holds as long as nobody learns who took part, nor how
    many.

    Args:
        rate: q in (0, 1].

    Guarantee:
        Each of the N names is chosen with probability q, rounded down by less than 2^-64, independently of the others.

    Raises:
        ParameterError: rate is out of range.

    Example:
        >>> PoissonClients(0.5).select(["ann", "bob", "cho", "dag"], 1, RandomStream.from_insecure_seed(7))
        ('ann', 'bob', 'cho')
    """

    rate: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "rate", arguments.sample_rate(self.rate))
        if self.rate == 0:
            raise ParameterError("rate must be > 0, got 0: nobody would ever be chosen.")

    def select(self, names: Sequence[str], round: int, stream: RandomStream) -> tuple[str, ...]:
        """Those whose coin says so; the coins are `dpdl.sampling.PoissonSampler`'s."""
        ordered = in_order(names)
        drawn = PoissonSampler(len(ordered), self.rate, stream).draw(round)
        return tuple(ordered[index] for index in drawn)


@final
@dataclass(frozen=True)
class FixedSizeClients(ClientSampling):
    """A uniform choice of `size` clients, without replacement.

    Every client draws 128 bits, and the smallest numbers win.

    Args:
        size: m >= 1, clients in each round.

    Guarantee:
        Uniform over the cohorts of m among n available clients, up to n^2 2^-129 in total variation (two equal
        numbers). Under adding or removing a client it amplifies nothing, as `ClientLevelPlan` says.

    Raises:
        ParameterError: size is no positive whole number; in `select`, fewer clients are available.

    Example:
        >>> FixedSizeClients(2).select(["ann", "bob", "cho", "dag"], 1, RandomStream.from_insecure_seed(7))
        ('bob', 'dag')
    """

    size: int

    def __post_init__(self) -> None:
        size = arguments.positive_whole("size", self.size, remedy="Give the clients of a round, for example 10.")
        object.__setattr__(self, "size", size)

    def select(self, names: Sequence[str], round: int, stream: RandomStream) -> tuple[str, ...]:
        """`size` of them, in the order of their names."""
        ordered = in_order(names)
        if len(ordered) < self.size:
            raise ParameterError(
                f"{self.size} clients cannot be chosen among the {len(ordered)} that are available. Wait for more, or "
                "plan smaller cohorts. Poisson sampling has no such lower limit."
            )
        keys = stream.words(2 * len(ordered), message=round).reshape(-1, 2)
        smallest = np.lexsort((keys[:, 1], keys[:, 0]))[: self.size]
        return tuple(ordered[index] for index in np.sort(smallest))


@final
@dataclass(frozen=True)
class EveryClient(ClientSampling):
    """Everybody who is available.

    No amplification: a client that is there is in the round with certainty, and every round composes in full. For a few
    owners of much data (hospitals), whose names are no secret; with a `ClientLevelPlan` it is `sampling="all"`.

    Guarantee:
        No randomness is used, so nothing about cohorts has to be kept secret.

    Example:
        >>> EveryClient().select(["bob", "ann"], 1, RandomStream.from_insecure_seed(7))
        ('ann', 'bob')
    """

    def select(self, names: Sequence[str], round: int, stream: RandomStream) -> tuple[str, ...]:
        """All names, in order; no randomness is used."""
        return tuple(in_order(names))


def in_order(names: Sequence[str]) -> list[str]:
    """The names sorted, each of which must be a text that stands there once.

    Raises:
        ParameterError: they are not.
    """
    if isinstance(names, str):
        raise ParameterError(f"names must be a list of names, got the text {names!r}.")
    for name in names:
        if not isinstance(name, str) or not name:
            raise ParameterError(f"the name of a client must be a non-empty text, got {name!r}.")
    ordered = sorted(names)
    for first, second in itertools.pairwise(ordered):
        if first == second:
            raise ParameterError(f"two clients have the name {first!r}: one of them could be drawn twice as often.")
    return ordered
