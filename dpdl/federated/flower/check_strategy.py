"""Why a Flower strategy does not keep what its accountant says: a check before a run.

    for finding in check_strategy(strategy, sampling="poisson", delta=1e-5, rounds=100, state=model.state_dict()):
        print(finding)

The strategies that Flower ships clip and add noise, but sum with weights, count on everybody's answer, and draw cohorts
of a fixed size. What an accountant says of them holds only if all that is as it assumes. The check knows Flower's own
classes; where it can, it asks the object itself (`_geometric_update` is called on a copy to see which way it goes),
so that a version that has mended something is not blamed for it. An empty result means that none of these faults is
there, not that a claim is proved; `DPStrategy` and the server's `ClientLevelPlan` are what makes claims.

Read in flwr 1.41; docs/flower.md has the list.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from accountants import Event, arguments
from dpdl.errors import ParameterError
from dpdl.federated.flower import strategy_faults
from dpdl.federated.flower.client_faults import arrays_passed_by, local_noise, reported_epsilons
from dpdl.federated.flower.findings import Case, Finding, Sampling
from dpdl.federated.flower.strategy import DPStrategy

__all__ = ["check_strategy"]


def check_strategy(
    strategy: Strategy,
    *,
    accountant: object | None = None,
    sampling: Sampling | None = None,
    delta: float = 1e-5,
    rounds: int = 1,
    population: int | None = None,
    weights: Sequence[float] = (),
    mods: Sequence[object] = (),
    state: Mapping[str, Tensor] | ArrayRecord | None = None,
    reported: Sequence[float] = (),
    per_round: Event | None = None,
) -> tuple[Finding, ...]:
    """Explain what is unsound about a Flower strategy and the account that is kept of it.

    Args:
        strategy: as it is given to Flower.
        accountant: whatever accounts for it; by default the strategy's own.
        sampling: how the accountant, or you, say that clients are drawn.
        delta: at which epsilons are told.
        rounds: how many there will be.
        population: how many clients there are.
        weights: those of the clients in the mean ("num-examples"), if they are known.
        mods: of the ClientApp.
        state: the model's, by name, to see which of its arrays Flower's clipping and noise pass by.
        reported: epsilons that a client has reported, round by round.
        per_round: what the client does in a round, as an event, to say what the reported epsilons should have been.

    Returns:
        What is wrong; empty if nothing of the kind is.

    Guarantee:
        None: what it does not know of a strategy it does not find.

    Raises:
        ParameterError: the strategy is none of Flower's, or an argument is out of range.
    """
    if not isinstance(strategy, Strategy):
        raise ParameterError(
            f"strategy must be one of flwr.serverapp.strategy, got {type(strategy).__name__}. Those of "
            "flwr.server.strategy are of the older API, and have no accountant at all."
        )
    if sampling not in (None, "poisson", "fixed_size", "all"):
        raise ParameterError(f"sampling must be 'poisson', 'fixed_size' or 'all', got {sampling!r}.")
    case = Case(
        strategy=strategy,
        accountant=getattr(strategy, "accountant", None) if accountant is None else accountant,
        sampling=sampling,
        delta=arguments.delta(delta),
        rounds=arguments.positive_whole("rounds", rounds, remedy="Give the rounds of the whole run."),
        population=population,
        weights=tuple(float(weight) for weight in weights),
        mods=tuple(mods),
        state={} if state is None else dict(state),
        reported=tuple(float(epsilon) for epsilon in reported),
        per_round=per_round,
    )
    return tuple(finding for check in _CHECKS for finding in check(case))


def _no_privacy(case: Case) -> Iterator[Finding]:
    if isinstance(case.strategy, DPStrategy):
        if case.strategy.server.plan is None:
            yield Finding(
                code="F12",
                severity="unprotected",
                subject="FederatedServer",
                message="It has no ClientLevelPlan: no promise about clients to whoever gets the model. What clients "
                "promise about records stands in their own reports.",
                remedy="Give FederatedServer(plan=ClientLevelPlan(...)), if clients are to be protected.",
            )
        return
    if case.flowers is None:
        yield Finding(
            code="F12",
            severity="unprotected",
            subject=case.name,
            message="Nothing is clipped or noised: no promise about clients to anybody.",
            remedy="Use DPStrategy with a ClientLevelPlan.",
        )
    elif case.noise_multiplier == 0:
        yield Finding(
            code="F12",
            severity="unprotected",
            subject=case.name,
            message="noise_multiplier is 0: clipping alone protects nobody.",
            remedy="Give noise; ClientLevelPlan.calibrated(epsilon=..., delta=...) says how much.",
        )


_CHECKS: tuple[Callable[[Case], Iterator[Finding]], ...] = (
    strategy_faults.adaptive_clipping,
    strategy_faults.weights,
    arrays_passed_by,
    strategy_faults.odd_updates,
    strategy_faults.dropouts,
    local_noise,
    strategy_faults.sampling,
    strategy_faults.account,
    reported_epsilons,
    _no_privacy,
)
