"""The oracle: the whole network in one piece, one row at a time, plain autograd. Shares no code with dpdl."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tests.split.core.networks import Case

Sums = dict[str, Tensor]  # "<part>/<parameter>" to a tensor


def parameters(case: Case, frozen: Iterable[str] = ("frozen",)) -> Sums:
    return {
        f"{part}/{name}": p
        for part, module in case.modules.items()
        if part not in frozen
        for name, p in module.named_parameters()
    }


def gradients_of_row(case: Case, row: int) -> Sums:
    named = parameters(case)
    columns = {name: tensor[row : row + 1] for name, tensor in case.data.items()}
    found = torch.autograd.grad(case.loss(case.modules, columns), list(named.values()))
    return dict(zip(named, found, strict=True))


def clipped_sums(case: Case, rows: Iterable[int], *, part: Mapping[str, float] | None, joint: float | None) -> Sums:
    """Gradients of rows, clipped by parts or together, added up."""
    sums = {name: torch.zeros_like(p) for name, p in parameters(case).items()}
    for row in rows:
        gradients = gradients_of_row(case, row)
        for name, gradient in gradients.items():
            if joint is not None:
                together, bound = list(gradients.values()), joint
            else:
                assert part is not None
                own = name.split("/")[0]
                together = [g for other, g in gradients.items() if other.split("/")[0] == own]
                bound = part[own]
            norm = math.sqrt(sum(float((g**2).sum()) for g in together))
            sums[name] = sums[name] + gradient * min(1.0, bound / norm if norm else math.inf)
    return sums


def step(case: Case, sums: Sums, noise: Mapping[str, Tensor] | None, *, divisor: float, rate: float) -> None:
    """One step of plain gradient descent on a noisy sum."""
    with torch.no_grad():
        for name, p in parameters(case).items():
            total = sums[name] + (0 if noise is None else noise[name])
            p -= rate * total / divisor


def distance(found: Sums, expected: Sums) -> float:
    """The largest difference, relative to the largest number."""
    assert set(found) == set(expected)
    scale = max(float(t.detach().abs().max()) for t in expected.values())
    return max(float((found[name] - expected[name]).detach().abs().max()) for name in expected) / (scale or 1.0)
