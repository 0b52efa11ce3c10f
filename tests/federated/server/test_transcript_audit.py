"""Neighbouring federations on a toy net, run many times, as each adversary sees them.

With the victim and without it; a test on what the adversary saw tells the two apart with some true and false positive
rates, and (epsilon, delta) bounds these: TPR <= e^epsilon FPR + delta. Clopper-Pearson bounds on both rates, on runs
that the test was not chosen on, give a lower bound of epsilon at 95 %. It must stay below the claim, and pass it when a
fault is planted.

The net is linear, y = w x, and a client's update a long step of gradient descent on its one example. The victim's
example lies along a direction of its own, so that its update is clipped and points there whatever the weights are: the
worst case, in which a Gaussian mechanism's claim is attained.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdl.audit.many_runs import bound_from_runs
from dpdl.federated import round_release
from dpdl.federated.adaptive_clipping import AdaptiveClipping
from dpdl.federated.aggregation import ClippedUpdates
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.messages import FitReply, FitRequest
from dpdl.federated.server import FederatedServer

DELTA = 0.05  # of the audit: with few runs, a larger one leaves more of epsilon to be seen
CONFIDENCE = 0.95
CLIENTS = 5
VICTIM = "victim"
OTHERS = [f"other-{number}" for number in range(CLIENTS - 1)]
ANSWERING = OTHERS[:1]  # the others drop out


@dataclass
class View:
    """What the adversaries see of one federation."""

    states: list[Tensor] = field(default_factory=list)
    raw: list[FitReply] = field(default_factory=list)  # the server
    took_part: list[bool] = field(default_factory=list)  # another client: it sees the models of these rounds
    chosen: list[int] = field(default_factory=list)  # what may not be published


def local_step(request: FitRequest, name: str) -> FitReply:
    """One step of gradient descent on the client's one example, with a weight that it would like to have."""
    w = request.state["w"]
    x, y = (torch.tensor([1.0, 0.0]), 1e4) if name == VICTIM else (torch.tensor([0.0, 1.0]), 0.5)
    gradient = 2 * (w @ x - y) * x
    return FitReply(client=name, round=request.round, update={"w": -0.5 * gradient}, weight=5.0)


def federation(plan: ClientLevelPlan, *, with_victim: bool, seed: int) -> View:
    server = FederatedServer({"w": torch.zeros(2)}, plan=plan, insecure_seed=seed)
    view = View(states=[server.state["w"]])
    for _ in range(plan.rounds):
        chosen = server.open_round([*OTHERS, VICTIM] if with_victim else OTHERS)
        request = server.request()
        replies = [local_step(request, name) for name in chosen if name in (VICTIM, *ANSWERING)]
        server.close_round(replies)
        view.raw += replies
        view.took_part.append(ANSWERING[0] in chosen)
        view.chosen.append(len(chosen))
        view.states.append(server.state["w"])
    return view


def of_consumers(view: View) -> float:
    """The likelihood ratio of un-sampled rounds of equal noise: how far the victim's coordinate went."""
    return float(view.states[-1][0] - view.states[0][0])


def of_other_clients(view: View) -> float:
    """The same, by a client that sees the models of the rounds in which it took part, and the last one."""
    received = [state for state, chosen in zip(view.states, view.took_part, strict=False) if chosen]
    return float(view.states[-1][0] - received[0][0]) if received else 0.0


def of_server(view: View) -> float:
    return max((float(reply.update["w"].norm()) for reply in view.raw), default=0.0)


def of_whoever_is_told_counts(view: View) -> float:
    return float(max(view.chosen))


def observed(plan: ClientLevelPlan, runs: int) -> tuple[list[View], list[View]]:
    """Federations with the victim, and without."""
    with_victim, without = (
        [federation(plan, with_victim=victim, seed=2 * run + victim) for run in range(runs)] for victim in (True, False)
    )
    return with_victim, without


def audited(views: tuple[list[View], list[View]], statistic: Callable[[View], float], delta: float = DELTA) -> float:
    """A lower bound of epsilon, at 95 %: the test is chosen on one half of the runs, its rates taken on the other."""
    with_victim, without = ({"score": np.array([statistic(view) for view in each])} for each in views)
    return bound_from_runs(with_victim, without, delta=delta, confidence=CONFIDENCE).epsilon_lower


def everybody(**changes: Any) -> ClientLevelPlan:
    settings: dict[str, Any] = {"clients": CLIENTS, "rounds": 1, "noise_multiplier": 1.0, "max_update_norm": 0.5}
    return ClientLevelPlan(**{**settings, "sampling": "all", **changes})


def claimed(plan: ClientLevelPlan, adversary: str) -> float:
    """What a server claims after all rounds of a plan; infinite if nothing."""
    server = FederatedServer({"w": torch.zeros(2)}, plan=plan)
    for _ in range(plan.rounds):
        server.open_round(OTHERS)
        server.close_round()
    found = {claim.against: claim for claim in server.claims(DELTA)}[adversary].epsilon
    return math.inf if found is None else found


# ── faults ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    mechanism, add = round_release.gaussian_mechanism, ClippedUpdates.add

    def halved(clipped: Any, *, noise_multiplier: float, **rest: Any) -> Any:
        return mechanism(clipped, noise_multiplier=noise_multiplier / 2, **rest)

    def by_replies(clipped: Any, *, noise_multiplier: float, **rest: Any) -> Any:
        """As if the mean were over those who replied, and the noise of the mean for all who were asked."""
        return mechanism(clipped, noise_multiplier=noise_multiplier * max(1, clipped.examples) / CLIENTS, **rest)

    def unbounded(self: Any, reply: FitReply) -> str:
        bound, self._max_weight = self._max_weight, math.inf
        outcome = add(self, reply)
        self._max_weight = bound
        return outcome

    def plant(fault: str) -> None:
        if fault == "noise halved":
            monkeypatch.setattr(round_release, "gaussian_mechanism", halved)
        if fault == "dropouts lower the noise":
            monkeypatch.setattr(round_release, "gaussian_mechanism", by_replies)
        if fault == "weights unbounded":
            monkeypatch.setattr(ClippedUpdates, "add", unbounded)

    return plant


FAULTS = ["noise halved", "dropouts lower the noise", "weights unbounded"]
SEEN_BY = {"model consumers": of_consumers, "other clients": of_other_clients}
RUNS = 600


def test_what_is_seen_stays_below_the_claim() -> None:
    views = observed(everybody(), RUNS)
    for adversary, statistic in SEEN_BY.items():
        assert 0.3 < audited(views, statistic) < claimed(everybody(), adversary) < 1.6


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault: str, faulty: Callable[[str], None]) -> None:
    claim = claimed(everybody(), "model consumers")
    faulty(fault)
    assert audited(observed(everybody(), RUNS), of_consumers) > claim


def test_the_server_sees_everything_and_is_promised_nothing() -> None:
    views = observed(everybody(), 200)
    assert audited(views, of_server) > claimed(everybody(), "model consumers")
    assert claimed(everybody(), "server") == math.inf


def test_counts_tell_what_the_guarantee_does_not_cover() -> None:
    views = observed(everybody(), 200)
    assert audited(views, of_whoever_is_told_counts) > claimed(everybody(), "model consumers")


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"rounds": 4, "noise_multiplier": 2.0},
        {"rounds": 3, "sampling": "poisson", "sample_rate": 0.5},
        {"rounds": 2, "sampling": "fixed_size", "cohort": 4, "noise_multiplier": 1.0},
        {"rounds": 3, "noise_multiplier": 1.5, "adaptive_clipping": AdaptiveClipping(bit_noise_multiplier=1.5)},
    ],
)
def test_with_many_runs_what_is_seen_stays_below_the_claim(changes: dict[str, Any]) -> None:
    plan = everybody(**changes)
    views = observed(plan, 2000)
    for adversary, statistic in SEEN_BY.items():
        assert 0.1 < audited(views, statistic) < claimed(plan, adversary)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_with_many_runs_a_planted_fault_is_seen(fault: str, faulty: Callable[[str], None]) -> None:
    plan = everybody(rounds=4, noise_multiplier=2.0)
    claim = claimed(plan, "model consumers")
    faulty(fault)
    assert audited(observed(plan, 1200), of_consumers) > claim
