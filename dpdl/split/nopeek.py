"""NoPeek: a penalty on the distance correlation of inputs and activations. A heuristic, no formal guarantee.

    no_peek = NoPeek(alpha=1.0)
    outlet = NoPeekOutlet(no_peek, inputs=lambda numbers: x[numbers], plan=plan, party="client")
    run = SplitRun(graph, optimizers, data, plan, release={"client": outlet})
    run.run()
    print(outlet)                     # NoPeek, alpha = 1: ... A heuristic: no formal guarantee.

The client minimises its network's loss + alpha * dCor_U(x, z), batch by batch [1]: what comes back at the cut is the
loss's gradient by z, and the penalty's is added to it before it goes through the client's part. Nobody else takes
part, or needs to know. Activations leave as they are, so a report of the run says NO GUARANTEE against the server.

Two things that differ from [1]. The distance correlation is the unbiased one (`dpdl.audit.distance_correlation`): the
biased one is near 1 for independent data, and what is minimised is then mostly the bias. And there is no differential
privacy beside it: the distance correlation compares the rows of a batch, so that a row's gradient tells of all others,
and clipping row by row bounds nothing. A plan with noise is refused.

A decoder recovers nearly as much with it as without, until accuracy breaks down: measure with
`dpdl.audit.decoder_attack`.

Private: inputs, rows, and the distance correlations that an outlet keeps.

References:
    [1] Vepakomma, Singh, Gupta, Raskar, NoPeek: Information leakage reduction to share activations in distributed deep
        learning, 2020. arXiv:2008.09161, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from dpdl.audit.distance_correlation import FEWEST_ROWS, distance_correlation
from dpdl.errors import ParameterError
from dpdl.plan import PrivacyPlan
from dpdl.split.outlet import Departed, Leaving, as_they_are

__all__ = ["HEURISTIC", "NoPeek", "NoPeekOutlet"]

# What every line about the penalty ends with.
HEURISTIC = "A heuristic: no formal guarantee."
_SHOWN = 10  # batches at either end of a run that a summary averages over


@dataclass(frozen=True, kw_only=True)
class NoPeek:
    """The penalty: alpha * max(0, dCor_U(x, z)) for a batch.

    Attributes:
        alpha: >= 0, its weight beside the loss's mean over rows; finite.

    Guarantee:
        None. A small distance correlation does not keep anybody from recovering inputs.

    Raises:
        ParameterError: alpha is out of range.

    References:
        Vepakomma, Singh, Gupta, Raskar, 2020 (the module has it). arXiv:2008.09161, section 3.
    """

    alpha: float

    def __post_init__(self) -> None:
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not 0 <= self.alpha < math.inf:
            raise ParameterError(f"alpha of NoPeek must be a finite number >= 0, got {self.alpha!r}.")

    def loss(self, x: Tensor, z: Tensor) -> Tensor:
        """The penalty of a batch, for any training loop.

        Args:
            x: inputs, shape [n, ...], floating point.
            z: activations, shape [n, ...].

        Returns:
            A scalar, differentiable by z; 0 for fewer than 4 rows, which have no unbiased distance correlation, and
            where that is below 0: there is nothing left to reduce.
        """
        if len(z) < FEWEST_ROWS:
            return (z * 0).sum()
        return self.alpha * distance_correlation(x, z).clamp_min(0)

    def __str__(self) -> str:
        return f"NoPeek, alpha = {self.alpha:g}. {HEURISTIC}"


@final
class NoPeekOutlet:
    """An `Outlet` that lets rows leave as they are, and adds the penalty's gradient to what comes back.

    Args:
        no_peek: the penalty.
        inputs: row numbers [n] to the inputs [n, ...] that they stand for.
        plan: the run's. Its noise multiplier must be 0.
        party: whose activations are penalised; the outlet may be shared, others' pass.

    Attributes:
        correlations: of each batch of 4 rows or more, in order, the unbiased squared distance correlation before its
            step. **Private**: un-noised functions of the data.

    Guarantee:
        None, as of `NoPeek`.

    Raises:
        ParameterError: the plan promises differential privacy.

    References:
        Vepakomma, Singh, Gupta, Raskar, 2020 (the module has it). arXiv:2008.09161, section 3.
    """

    mixes_rows = True  # the penalty compares them: a party refuses this outlet under any plan with noise

    def __init__(
        self, no_peek: NoPeek, *, inputs: Callable[[Tensor], Tensor], plan: PrivacyPlan, party: str = "client"
    ) -> None:
        if plan.noise_multiplier > 0:
            raise ParameterError(
                f"NoPeek under a plan with noise_multiplier {plan.noise_multiplier:g}: its penalty compares the rows "
                "of a batch, so that clipping row by row bounds nothing, and the plan's epsilon would be wrong. Train "
                "with noise and without NoPeek, or with noise_multiplier=0 and no claim."
            )
        self.no_peek = no_peek
        self.party = party
        self.correlations: list[float] = []
        self._inputs = inputs

    def __call__(self, leaving: Leaving) -> Departed:
        """The rows of `leaving` as they are; in training, what returns goes through the penalty.

        Raises:
            ParameterError: activations without row numbers, whose inputs nobody knows.
        """
        if (leaving.content, leaving.purpose, leaving.sender) != ("activations", "train", self.party):
            return as_they_are(leaving)
        if leaving.row_numbers is None:
            raise ParameterError(
                f"'{leaving.sender}' does not know which rows its activations of '{leaving.name}' are of, and NoPeek "
                "compares them with their inputs. Give the data to the party that computes the activations."
            )
        rows, x = leaving.rows, self._inputs(leaving.row_numbers)
        if len(x) != len(rows):
            raise ParameterError(f"inputs returned {len(x)} rows for {len(rows)} row numbers. Return one for each.")
        pending = [x]  # each receiver's gradient is pulled back by itself, and the penalty is there once

        def pull_back(gradient: Tensor) -> Tensor:
            return gradient + self._gradient(pending.pop(), rows).to(gradient) if pending else gradient

        return Departed(rows=rows, pull_back=pull_back)

    def _gradient(self, x: Tensor, rows: Tensor) -> Tensor:
        """Of n times the penalty: what comes back is of a sum over rows, which the step divides by their number."""
        if len(rows) < FEWEST_ROWS:
            return torch.zeros_like(rows)
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            correlation = distance_correlation(x.detach().to(leaf.device), leaf)
            (found,) = torch.autograd.grad(correlation, leaf)
        self.correlations.append(float(correlation.detach()))
        return found * (self.no_peek.alpha * len(rows)) if self.correlations[-1] > 0 else torch.zeros_like(rows)

    def __str__(self) -> str:
        if not self.correlations:
            return str(self.no_peek)
        first, last = self.correlations[:_SHOWN], self.correlations[-_SHOWN:]
        return (
            f"NoPeek, alpha = {self.no_peek.alpha:g}: squared distance correlation of inputs and activations "
            f"{sum(first) / len(first):.2f} in the first batches, {sum(last) / len(last):.2f} in the last. {HEURISTIC}"
        )
