"""What the server's noise promises, adversary by adversary, of one client as a whole.

Against the server itself: nothing. It has every update as it came, before clipping and noise, and is trusted to do its
part; what a client's own noise promises against it (`DPClient`, `LocalUpdateDP`) is in that client's claims.

Other clients see each round's global model, as those who get the model at the end do, and besides whether they
themselves were chosen. Under Poisson sampling, and where everybody takes part, that says nothing of the others. A
cohort of a fixed size has fewer places for others if one is taken: there, what is claimed against clients who pool what
they know is without amplification; under adding or removing a client, where the places themselves tell how many there
are, nothing.
"""

from __future__ import annotations

import math

from accountants import Gaussian, NeighboringRelation
from dpdl.budget import composed
from dpdl.claims import Claim
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.ledger import Ledger
from dpdl.noise import total_variation
from dpdl.privacy_report import rounded_up, shown_delta
from dpdl.run_state import STEP

__all__ = ["MODEL_CONSUMERS", "OTHER_CLIENTS", "SERVER", "UNIT", "claims_of"]

SERVER, OTHER_CLIENTS, MODEL_CONSUMERS = "server", "other clients", "model consumers"
UNIT = "client"

_LARGEST_EXPONENT = 700.0  # e to a larger one is not a double


def claims_of(
    plan: ClientLevelPlan | None, ledger: Ledger | None, *, delta: float, coordinates: int, secure: bool
) -> tuple[Claim, ...]:
    """One claim against each of the server, other clients, and model consumers.

    Args:
        plan: None for a server without noise.
        ledger: the federation's releases so far; with a plan.
        delta: in (0, 1).
        coordinates: how many numbers a round releases.
        secure: whether randomness came from keys that nobody knows.
    """
    if plan is None or ledger is None:
        bare = "the server adds no noise"
        return (
            Claim(against=SERVER, unit=UNIT, because=f"it has every update as the client sent it; {bare}"),
            *(Claim(against=each, unit=UNIT, because=bare) for each in (OTHER_CLIENTS, MODEL_CONSUMERS)),
        )
    epsilon = ledger.epsilon(delta)
    because = (
        f"updates clipped over all their tensors, weights of at most {plan.max_weight:g}, noise of "
        f"{plan.noise_multiplier:.6g} times the sum's sensitivity in each of {ledger.count('step'):,} of "
        f"{plan.rounds:,} rounds, {plan.sampling.replace('_', ' ')} sampling of clients"
    )
    shared = _assumptions(plan, ledger, delta=delta, epsilon=epsilon, coordinates=coordinates, secure=secure)
    secret = ("nobody learns who took part: no counts, names, times or traffic",) if plan.amplified else ()
    return (
        Claim(
            against=SERVER, unit=UNIT, because="it has every update as the client sent it, before clipping and noise"
        ),
        _against_clients(plan, ledger, epsilon, delta, because, (*secret, *shared)),
        Claim(
            against=MODEL_CONSUMERS,
            unit=UNIT,
            because=because,
            epsilon=epsilon,
            delta=delta,
            relation=plan.relation_phrase,
            assumes=(*secret, *shared),
        ),
    )


def _against_clients(
    plan: ClientLevelPlan, ledger: Ledger, epsilon: float, delta: float, because: str, assumes: tuple[str, ...]
) -> Claim:
    if plan.cohort is not None and plan.neighbours is NeighboringRelation.ADD_OR_REMOVE:
        return Claim(
            against=OTHER_CLIENTS,
            unit=UNIT,
            because="in a cohort of a fixed size, how often they are chosen tells them how many others there are",
        )
    if plan.cohort is not None and plan.amplified:
        counts = dict(ledger.counts)
        rounds = counts.pop(plan.event(), 0)
        bare = Gaussian(plan.noise_multiplier)
        counts[bare] = counts.get(bare, 0) + rounds
        epsilon = composed(counts, plan.neighbours).epsilon(delta)
        because = f"{because}, not amplified: who is chosen of a fixed number tells of the others"
        assumes = assumes[1:]  # who took part need not be secret
    return Claim(
        against=OTHER_CLIENTS,
        unit=UNIT,
        because=because,
        epsilon=epsilon,
        delta=delta,
        relation=plan.relation_phrase,
        assumes=assumes,
    )


def _assumptions(
    plan: ClientLevelPlan, ledger: Ledger, *, delta: float, epsilon: float, coordinates: int, secure: bool
) -> tuple[str, ...]:
    taken = ledger.count(STEP)
    counts = dict(ledger.counts)
    counts[plan.event()] = counts.get(plan.event(), 0) + max(0, plan.rounds - taken)
    everything = composed(counts, plan.neighbours).epsilon(delta)
    numbers = coordinates + (plan.adaptive_clipping is not None)
    more = min(1.0, (1 + math.exp(min(epsilon, _LARGEST_EXPONENT))) * total_variation(taken * numbers))
    length = (
        "the number of rounds was fixed in advance"
        if taken >= plan.rounds
        else f"the number of rounds was not chosen by looking at the models; if it was, the claim is that of all "
        f"{plan.rounds:,}, epsilon <= {rounded_up(everything)} at delta = {shown_delta(delta)}"
    )
    account = ledger.within
    others = (
        ()
        if account is None or set(account.runs) <= {ledger.run}
        else (
            f"what else was released of these clients adds up; {account.name} has epsilon <= "
            f"{rounded_up(account.interval(delta).upper)} altogether",
        )
    )
    seed = () if secure else ("nobody knows the insecure_seed from which draws and noise came",)
    return (
        "the server clips, adds its noise, and publishes models and public summaries alone",
        "one person's data is with one client, and who is available, or answers, does not depend on another's data",
        length,
        f"noise is added on a grid, whose distance from exact Gaussians adds at most {more:.1g} to delta",
        *others,
        *seed,
    )
