"""What a server is made of, checked before there is one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from accountants import arguments
from dpdl.errors import CheckpointError, ParameterError, WrapError
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.client_sampling import ClientSampling
from dpdl.federated.client_settings import checked_name
from dpdl.federated.server_optimizers import ServerOptimizer
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile

__all__ = ["SCHEMA", "checked_state", "refuse_contradictions", "refuse_other_numbers", "refuse_wrong_parts"]

SCHEMA = "dpdl.federated_server/1"  # of a saved server


def refuse_wrong_parts(
    *, sampling: object, optimizer: object, plan: object, ledger: object, federation: object, trained: object
) -> None:
    """Raise unless each part is of its kind, or is not given.

    Raises:
        ParameterError: one is something else.
        WrapError: the ledger is none, or a run's own.
    """
    for name, value, kind in (
        ("sampling", sampling, ClientSampling),
        ("optimizer", optimizer, ServerOptimizer),
        ("plan", plan, ClientLevelPlan),
    ):
        if value is not None and not isinstance(value, kind):
            raise ParameterError(f"{name} must be a {kind.__name__}, got {type(value).__name__}.")
    if ledger is not None and not isinstance(ledger, (Ledger, LedgerFile)):
        raise WrapError(f"ledger must be a Ledger or a LedgerFile, got {type(ledger).__name__}. Give LedgerFile(path).")
    if isinstance(ledger, Ledger) and ledger.within is not None:
        raise WrapError(f"ledger lies within {ledger.within.name}, as a run's own does. Give that one.")
    checked_name(federation, of="name of a federation")
    if trained is not None and (isinstance(trained, str) or not isinstance(trained, Iterable)):
        raise ParameterError(f"trained must be names of tensors, got {trained!r}. Give a list, or leave it out.")


def refuse_contradictions(
    *, plan: ClientLevelPlan | None, sampling: object, ledger: object, max_weight: float | None
) -> None:
    """Raise if the plan says one thing and another argument something else.

    Raises:
        ParameterError: it does, or a bound is out of range.
    """
    if max_weight is not None:
        bound = arguments.real("max_weight", max_weight, remedy="Give a number such as 1.0, or leave it out.")
        if not 0 < bound < math.inf:
            raise ParameterError(f"max_weight must be > 0 and finite, got {max_weight!r}. Leave it out for no limit.")
    if plan is None:
        if ledger is not None:
            raise ParameterError("ledger is for noisy releases, and without a plan there are none. Give a plan.")
        return
    if sampling is not None and sampling != plan.client_sampling:
        raise ParameterError(
            f"sampling is {sampling}, but the plan accounts for {plan.client_sampling}. Leave sampling out: the plan's "
            "is used."
        )
    if max_weight is not None and max_weight != plan.max_weight:
        raise ParameterError(
            f"max_weight is {max_weight!r}, but the plan's noise is for {plan.max_weight!r}. Give it to the plan alone."
        )


def refuse_other_numbers(plan: ClientLevelPlan, available: int) -> None:
    """Raise if so many available clients do not fit what the plan accounts for.

    Raises:
        ParameterError: there are too many, or too few for the cohort's amplification.
    """
    if available > plan.clients:
        raise ParameterError(
            f"{available} clients are available, and the plan is for {plan.clients}: the sum would be divided by too "
            "little. Make a plan for as many clients as there may be."
        )
    if plan.cohort is not None and plan.amplified and available < plan.clients:
        raise ParameterError(
            f"{available} of the plan's {plan.clients} clients are available. A cohort of {plan.cohort} among fewer "
            "holds each with a larger probability than the plan accounts for. Wait for all, use Poisson sampling, or "
            "plan with the least number that will be available."
        )


def checked_state(state: object, *, federation: str, private: bool) -> Mapping[str, Any]:
    """What a server has saved, if it is this federation's.

    Raises:
        CheckpointError: it is not, or is damaged.
    """
    names = {"schema", "federation", "round", "state", "optimizer", "private", "randomness"}
    if not isinstance(state, Mapping) or set(state) != names or state["schema"] != SCHEMA:
        raise CheckpointError(
            f"Not the state of a federated server of schema {SCHEMA}. Load what state_dict() returned."
        )
    if state["federation"] != federation:
        raise CheckpointError(f"The state is of the federation {state['federation']!r}, this one is {federation!r}.")
    if type(state["round"]) is not int or state["round"] < 0:
        raise CheckpointError(f"The saved server is damaged: round {state['round']!r}.")
    if (state["private"] is not None) != private:
        raise CheckpointError(
            "The saved server and this one are not both with a plan: what was spent would be forgotten, or claimed "
            "without noise. Make the server with the plan that it was saved with."
        )
    return state
