"""Federated learning of a split network: clients side by side, and an average of weights.

    fed = SplitFed({"north": run_north, "south": run_south}, version=1)
    fed.round(steps=5)

Version 1: every client trains with a copy of the other parties of its own, and all halves are averaged. Version 2: all
clients train one copy of the other parties, one client after another in random order, and the clients' halves are
averaged [1, sections 3.1 and 3.2]. Either way a client is a split run, under its own plan and ledger, and an average of
what noisy steps have made is post-processing: nothing more is spent. The factors of the average must be public.

References:
    [1] Thapa et al., SplitFed: When Federated Learning Meets Split Learning, AAAI 2022. arXiv:2004.12088
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from dpdl.errors import ParameterError
from dpdl.secure_random import RandomStream
from dpdl.split.party import Party
from dpdl.split.session import SplitRun

__all__ = ["SplitFed", "average"]


@final
class SplitFed:
    """Several split runs that average their weights.

    Args:
        runs: client to its run. All begin with the first one's weights.
        version: 1: the runs share no party. 2: all parties but the client are the same objects in all runs.
        factors: client to its public share in the average; by default the same for all.
        insecure_seed: makes version 2's order reproducible.

    Guarantee:
        Each run's own claims: averages of weights are post-processing, and cost nothing more.

    Raises:
        ParameterError: the runs are not of that version, their parts are not equal, or a factor is not positive;
            nothing was changed.

    References:
        Thapa et al., SplitFed: When Federated Learning Meets Split Learning, AAAI 2022. arXiv:2004.12088,
        sections 3.1 and 3.2.
    """

    def __init__(
        self,
        runs: Mapping[str, SplitRun],
        *,
        version: Literal[1, 2],
        factors: Mapping[str, float] | None = None,
        insecure_seed: int | None = None,
    ) -> None:
        if version not in (1, 2):
            raise ParameterError(f"version must be 1 or 2, got {version!r}.")
        if len(runs) < 2:
            raise ParameterError(f"Federated learning needs at least two clients, got {list(runs)}.")
        self._runs, self._version = dict(runs), version
        self._factors = dict.fromkeys(runs, 1.0) if factors is None else dict(factors)
        if set(self._factors) != set(runs) or not all(factor > 0 for factor in self._factors.values()):
            raise ParameterError(f"factors are positive numbers for {list(runs)}, got {self._factors}.")
        self._refuse_other_version()
        self._randomness = (
            RandomStream.from_os() if insecure_seed is None else RandomStream.from_insecure_seed(insecure_seed)
        ).child("order of clients")
        self._rounds = 0
        self._refuse_unequal()
        first = next(iter(self._runs.values()))
        for party, start in [(party, party.weights()) for party in self._averaged(first)]:
            for run in self._runs.values():
                _same_party(self._averaged(run), party.name).load_weights(start)

    def order(self) -> tuple[str, ...]:
        """In which order the clients train in the next round; public."""
        if self._version == 1:
            return tuple(self._runs)
        drawn = np.argsort(self._randomness.words(len(self._runs), message=self._rounds))
        return tuple(list(self._runs)[position] for position in drawn)

    def round(self, *, steps: int) -> None:
        """Each client takes `steps` steps; then weights are averaged.

        Raises:
            PrivacyError: as `SplitRun.run`. Steps that were taken stay spent, and nothing is averaged.
        """
        for name in self.order():
            self._runs[name].run(steps)
        self._rounds += 1
        shares = [self._factors[name] for name in self._runs]
        first = next(iter(self._runs.values()))
        for party in self._averaged(first):
            every = [_same_party(self._averaged(run), party.name) for run in self._runs.values()]
            mean = average([one.weights() for one in every], shares)
            for one in every:
                one.load_weights(mean)

    def _averaged(self, run: SplitRun) -> list[Party]:
        """The parties of a run that each run has for itself."""
        others = [server.party for server in run.servers.values()] if self._version == 1 else []
        return [run.client.party, *others]

    def _refuse_unequal(self) -> None:
        forms = {
            name: {
                party.name: {key: (t.shape, t.dtype) for key, t in party.weights().items()}
                for party in self._averaged(run)
            }
            for name, run in self._runs.items()
        }
        first = next(iter(self._runs))
        for name, form in forms.items():
            if form != forms[first]:
                raise ParameterError(
                    f"The parts of client '{name}' are not those of '{first}', so there is no average of them. Build "
                    "all runs from equal modules."
                )

    def _refuse_other_version(self) -> None:
        others = [list(run.servers.values()) for run in self._runs.values()]
        shared = {id(server) for server in others[0]}
        if self._version == 2 and any({id(server) for server in found} != shared for found in others):
            raise ParameterError(
                "Version 2 of SplitFed trains one copy of the other parties: give the second run and those after it "
                "servers=first.servers."
            )
        if self._version == 1 and len({id(server) for found in others for server in found}) < sum(map(len, others)):
            raise ParameterError(
                "Version 1 of SplitFed trains a copy of the other parties for each client, but runs share some. Build "
                "each run with copy.deepcopy of the modules, and without servers."
            )


def average(weights: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """The weighted mean of equal sets of tensors; whole numbers are those of the first.

    Args:
        weights: each name to a tensor.
        shares: positive, in any unit.
    """
    total = sum(shares)
    mean: dict[str, Tensor] = {}
    for name, first in weights[0].items():
        if not first.is_floating_point():
            mean[name] = first
            continue
        wide = [one[name].to(torch.float64) * (share / total) for one, share in zip(weights, shares, strict=True)]
        mean[name] = torch.stack(wide).sum(0).to(first.dtype)
    return mean


def _same_party(parties: list[Party], name: str) -> Party:
    return next(party for party in parties if party.name == name)
