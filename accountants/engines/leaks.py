"""What is revealed beyond the greatest finite loss: with some probability everything, and that is delta exactly."""

from __future__ import annotations

import math

from accountants.components.component import DIRECTIONS
from accountants.reduction.normal_form import NormalForm

_ROUNDING = 1e-14  # relative, a step
_BEYOND = 1e-12  # relative, of the greatest loss


def delta_beyond_losses(form: NormalForm, epsilon: float) -> tuple[float, float] | None:
    """Bounds on delta at an epsilon that no finite loss exceeds; None if some may, or no witness attains it.

    Args:
        form: what to bound; every component has pairs.
        epsilon: >= 0.
    """
    worst, steps = 0.0, 0
    for direction in DIRECTIONS:
        greatest = log_kept = 0.0
        for component, count in form.counts:
            pair = component.pair(direction)
            if pair is None or math.isinf(pair.support[1]) or component.witness(direction) != pair:
                return None
            most = pair.support[1]
            greatest += count * most
            log_kept += count * math.log1p(-pair.infinite) if pair.infinite < 1 else -math.inf
            steps += count
        if epsilon < greatest * (1 + _BEYOND):
            return None
        worst = max(worst, -math.expm1(log_kept))
    slack = worst * min(_ROUNDING * (1 + steps), 1.0)
    return worst - slack, min(1.0, worst + slack)
