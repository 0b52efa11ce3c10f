"""What the server promises of a client, to whom; what it does not promise is said."""

import math
from typing import Any

import pytest

from accountants import Gaussian, PRVAccountant
from dpdl.claims import Claim
from dpdl.ledger import Ledger
from tests.federated.server.small_federation import names, plan, server

DELTA = 1e-5


def claims(rounds: int = 3, *, seed: int | None = None, ledger: Any = None, **changes: Any) -> dict[str, Claim]:
    its_plan = plan(**{"noise_multiplier": 3.0, **changes})
    ours = server(plan=its_plan, seed=seed, ledger=ledger)
    for _ in range(rounds):
        ours.open_round(names(10))
        ours.close_round()
    found = ours.claims(DELTA)
    assert {claim.unit for claim in found} == {"client"}
    assert ours.epsilon(DELTA) == PRVAccountant(relation=its_plan.relation).compose(its_plan.event() * rounds).epsilon(
        DELTA
    )
    return {claim.against: claim for claim in found}


def spent(event: Any, rounds: int, relation: str = "add_or_remove") -> float:
    return PRVAccountant(relation=relation).compose(event * rounds).epsilon(DELTA)


def test_against_the_server_nothing_is_promised_by_its_own_noise() -> None:
    claim = claims()["server"]
    assert not claim.guaranteed
    assert "before clipping and noise" in str(claim)


def test_against_consumers_and_other_clients_it_is_what_the_ledger_has() -> None:
    found = claims(sample_rate=0.5)
    expected = spent(plan(noise_multiplier=3.0, sample_rate=0.5).event(), 3)
    for adversary in ("model consumers", "other clients"):
        assert found[adversary].epsilon == expected
        assert found[adversary].relation == "adding or removing one client"
        assert any("nobody learns who took part" in each for each in found[adversary].assumes)
    assert not any("who took part" in each for each in claims()["model consumers"].assumes)


def test_a_cohort_of_fixed_size_is_not_amplified_against_those_who_may_be_in_it() -> None:
    found = claims(cohort=2, relation="zero_out")
    assert found["model consumers"].epsilon < found["other clients"].epsilon
    assert found["other clients"].epsilon == spent(Gaussian(3.0), 3, "zero_out")
    assert not any("who took part" in each for each in found["other clients"].assumes)
    found = claims(cohort=2)
    assert found["model consumers"].epsilon == spent(Gaussian(1.5), 3)
    assert not found["other clients"].guaranteed


@pytest.mark.parametrize("against", ["server", "other clients", "model consumers"])
def test_without_a_plan_or_noise_there_is_no_guarantee(against: str) -> None:
    without_plan = {claim.against: claim for claim in server().claims(DELTA)}
    assert not without_plan[against].guaranteed
    assert not claims(noise_multiplier=0.0)[against].guaranteed
    assert "NO GUARANTEE" in str(without_plan[against])


def test_what_it_assumes_is_said() -> None:
    early, late = claims(2)["model consumers"], claims(5)["model consumers"]
    assert "the claim is that of all 5" in str(early)
    assert "fixed in advance" in str(late)
    assert "insecure_seed" not in str(late)
    assert "insecure_seed" in str(claims(seed=3)["model consumers"])


def test_what_else_is_in_the_clients_ledger_is_said() -> None:
    account = Ledger(relation=plan().neighbours)
    assert "altogether" not in str(claims(ledger=account)["model consumers"])
    account.record(Gaussian(1.0), label="survey", run="statistics")
    text = str(claims(ledger=account)["model consumers"])
    assert "altogether" in text
    assert math.isfinite(account.epsilon(DELTA))
