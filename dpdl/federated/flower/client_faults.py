"""What is wrong on a client's side: arrays that Flower's noise passes by, its local noise, epsilons that start anew."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

from flwr.clientapp.mod import LocalDpMod

from accountants import Gaussian, PRVAccountant
from dpdl.federated.flower.findings import Case, Finding

__all__ = ["arrays_passed_by", "local_noise", "reported_epsilons"]


def arrays_passed_by(case: Case) -> Iterator[Finding]:
    """F4, F5: scalars and whole numbers."""
    if case.flowers is None and not any(isinstance(mod, LocalDpMod) for mod in case.mods):
        return
    scalars, whole = [], []
    for name, values in case.state.items():
        shape, kind = tuple(values.shape), str(values.dtype).removeprefix("torch.")
        if "int" in kind or kind == "bool":
            whole.append(name)
        elif shape == ():
            scalars.append(name)
    if scalars:
        yield Finding(
            code="F4",
            severity="unprotected",
            subject=", ".join(scalars),
            message="Arrays of shape () are neither clipped nor noised by Flower's mods: numpy gives a scalar, which "
            "in-place operations do not change.",
            remedy="Make them of shape (1,), or use DPStrategy.",
        )
    if whole:
        yield Finding(
            code="F5",
            severity="unsound",
            subject=", ".join(whole),
            message="Whole numbers: noise is cut to whole numbers too, which is none below 1, and counters dominate "
            "the norm that everything is clipped by.",
            remedy="Keep them out of what is sent, or use DPStrategy: dpdl sends parameters only.",
        )


def local_noise(case: Case) -> Iterator[Finding]:
    """F8: LocalDpMod."""
    for mod in case.mods:
        if not isinstance(mod, LocalDpMod):
            continue
        if not mod.epsilon or not 0 < mod.delta < 1.25:
            message = f"epsilon {mod.epsilon:g} or delta {mod.delta:g} gives no noise that is a number."
        else:
            deviation = mod.sensitivity * math.sqrt(2 * math.log(1.25 / mod.delta)) / mod.epsilon
            true = 2 * mod.clipping_norm
            held = case.epsilon(Gaussian(deviation / true)) if deviation > 0 else math.inf
            if held <= mod.epsilon and case.rounds == 1 and case.delta <= mod.delta:
                continue
            message = (
                f"It claims epsilon {mod.epsilon:g}. Its noise, {deviation:.4g}, comes from a formula that is proved "
                f"for epsilon < 1 only, and from sensitivity {mod.sensitivity:g}, which is a number of its own: two "
                f"updates clipped to {mod.clipping_norm:g} differ by up to {true:g}. In {case.rounds} rounds that is "
                f"epsilon {held:.4g} at delta {case.delta:g}."
            )
        yield Finding(
            code="F8",
            severity="unsound",
            subject="LocalDpMod",
            message=message,
            remedy="Use LocalUpdateDP(client, max_update_norm=..., noise_multiplier=..., ledger=...).",
        )


def reported_epsilons(case: Case) -> Iterator[Finding]:
    """An accountant that is made anew each round, as in Flower's example with Opacus."""
    if len(case.reported) < 2 or all(later > earlier for earlier, later in pairwise(case.reported)):
        return
    truth = ""
    if case.per_round is not None:
        spent = PRVAccountant().compose(case.per_round * len(case.reported)).epsilon(case.delta)
        truth = f" After {len(case.reported)} rounds it is {spent:.4g} at delta {case.delta:g}."
    yield Finding(
        code="per-round epsilon",
        severity="unsound",
        subject="a client's reported epsilon",
        message=f"It does not grow ({case.reported[0]:g}, ..., {case.reported[-1]:g}) although each round trains on "
        f"the same data: the accountant is made anew in each.{truth}",
        remedy="Use client_app with a DPClient: its ledger is a file and adds up all rounds.",
    )
