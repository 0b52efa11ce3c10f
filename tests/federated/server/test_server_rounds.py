"""Rounds of the server: whose answers count, what the mean is, and that the noise is the plan's whoever replies."""

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from accountants import NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, LedgerError, ParameterError, PlanExhaustedError, StepError, WrapError
from dpdl.federated.client_sampling import EveryClient, FixedSizeClients, PoissonClients
from dpdl.federated.messages import Refusal
from dpdl.federated.server import FederatedServer
from dpdl.federated.server_optimizers import FedAdam
from dpdl.ledger import Ledger
from tests.federated.server.small_federation import names, norm_of, plan, reply, server, std_is, update, zeros

LARGE = {"w": torch.zeros(20_000)}


def play(ours: FederatedServer, *, rounds: int) -> None:
    for _ in range(rounds):
        ours.open_round(names(10))
        ours.close_round()


def added(ours: FederatedServer, before: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: ours.state[name] - before[name] for name in ours.trained}


# ── the mean ────────────────────────────────────────────────────────────────────────────────────────


def test_without_noise_the_model_moves_by_the_clipped_sum_over_the_fixed_denominator() -> None:
    ours = server(plan=plan(max_update_norm=2.0))
    before = ours.state
    ours.open_round(names(10))
    sent = [update(size, seed=i) for i, size in enumerate((1.0, 2.0, 8.0))]
    ours.close_round([reply(f"client-{i}", change) for i, change in enumerate(sent)])
    for name, moved in added(ours, before).items():
        expected = (sent[0][name] + sent[1][name] + sent[2][name] / 4) / 10
        assert torch.allclose(moved, expected, atol=1e-6)


@pytest.mark.parametrize("answering", [10, 7, 3, 0])
@pytest.mark.parametrize(
    "changes", [{}, {"sample_rate": 0.4}, {"cohort": 4}, {"max_weight": 3.0}, {"expected_weight": 2.0}]
)
def test_the_noise_is_the_plans_whoever_replies(answering: int, changes: dict[str, Any]) -> None:
    its_plan = plan(noise_multiplier=1.3, max_update_norm=0.5, **changes)
    ours = server(state=LARGE, plan=its_plan)
    chosen = ours.open_round(names(10))
    for name in chosen[:answering]:
        ours.add(reply(name, LARGE))
    summary = ours.close_round()
    cohort = {"sample_rate": 4, "cohort": 4}.get(next(iter(changes), ""), 10)
    std = 1.3 * 0.5 * changes.get("max_weight", 1.0) / (cohort * changes.get("expected_weight", 1.0))
    noise = ours.state["w"]
    assert std_is(std, noise)
    assert not std_is(0.9 * std, noise)
    assert not std_is(1.1 * std, noise)
    assert summary.noise_std / summary.denominator == pytest.approx(std)


def test_every_round_gets_fresh_noise() -> None:
    ours = server(state=LARGE, plan=plan(noise_multiplier=1.0), seed=None)
    drawn = []
    for _ in range(3):
        before = ours.state["w"]
        ours.open_round(names(10))
        ours.close_round()
        drawn.append(ours.state["w"] - before)
    std = float(drawn[0].std())
    for i, first in enumerate(drawn):
        for second in drawn[:i]:
            assert abs(float(first @ second)) / (std**2 * math.sqrt(first.numel())) < 4.5


def test_without_a_plan_it_is_the_weighted_mean_of_those_who_reply() -> None:
    ours = server()
    ours.open_round(names(4))
    sent = [update(5.0, seed=i) for i in range(2)]
    summary = ours.close_round([reply("client-0", sent[0], weight=30), reply("client-2", sent[1], weight=10)])
    for name in zeros():
        assert torch.allclose(ours.state[name], 0.75 * sent[0][name] + 0.25 * sent[1][name], atol=1e-6)
    assert summary.private.counts == {"accepted": 2, "lost": 2}
    assert ours.epsilon(1e-5) == math.inf
    assert ours.ledger is None


def test_without_a_plan_a_round_without_replies_changes_nothing() -> None:
    ours = server(optimizer=FedAdam())
    ours.open_round(names(4))
    ours.close_round([Refusal(client="client-1", round=1, reason="failed")])
    assert norm_of(ours.state) == 0
    assert ours.round == 1


def test_any_optimizer_gets_the_noisy_mean_alone() -> None:
    plain, adam = (server(plan=plan(noise_multiplier=1.0), optimizer=optimizer) for optimizer in (None, FedAdam(0.5)))
    for ours in (plain, adam):
        ours.open_round(names(10))
        ours.close_round([reply("client-0", update(1.0))])
    rule = FedAdam(0.5)
    expected = rule.step(zeros(), {name: tensor.double() for name, tensor in plain.state.items()})
    for name, tensor in adam.state.items():
        assert torch.allclose(tensor, expected[name], atol=1e-6)


# ── whose answers count ─────────────────────────────────────────────────────────────────────────────


def test_each_chosen_clients_first_answer_to_this_round_counts_and_no_other() -> None:
    ours = server(plan=plan(sample_rate=0.5))
    chosen = ours.open_round(names(10))
    others = [name for name in names(10) if name not in chosen]
    change = update(1.0)
    assert ours.add(reply(chosen[0], change)) == "accepted"
    assert ours.add(reply(chosen[0], change)) == "duplicate"
    assert ours.add(Refusal(client=chosen[0], round=1, reason="failed")) == "duplicate"
    assert ours.add(reply(others[0], change)) == "not chosen"
    assert ours.add(reply("nobody", change)) == "not chosen"
    assert ours.add(reply(chosen[1], change, round=0)) == "another round"
    assert ours.add(Refusal(client=chosen[1], round=1, reason="budget")) == "budget"
    assert ours.add(reply(chosen[1], change)) == "duplicate"
    assert ours.add(Refusal(client=chosen[2], round=1, reason="accepted")) == "failed"
    summary = ours.close_round()
    assert summary.private.refused == {"duplicate": 3, "not chosen": 2, "another round": 1}
    assert summary.private.counts == {"accepted": 1, "budget": 1, "failed": 1, "lost": len(chosen) - 3}
    for name, tensor in ours.state.items():
        assert torch.allclose(tensor, change[name] / 5, atol=1e-6)


def test_a_late_reply_is_refused_in_the_next_round() -> None:
    ours = server(plan=plan())
    for number in (1, 2):
        ours.open_round(names(10))
        assert ours.add(reply("client-0", update(1.0), round=1)) == ("accepted" if number == 1 else "another round")
        ours.close_round()
    assert norm_of(ours.state) == pytest.approx(0.1, abs=1e-6)


def test_an_answer_that_is_none_is_refused_before_any_is_added() -> None:
    ours = server(plan=plan())
    ours.open_round(names(10))
    with pytest.raises(ParameterError, match="got dict"):
        ours.close_round([reply("client-0", update(1.0)), {}])  # type: ignore[list-item]
    with pytest.raises(ParameterError, match="got NoneType"):
        ours.add(None)  # type: ignore[arg-type]
    assert ours.close_round().private.counts == {"lost": 10}


def test_updates_are_added_as_they_come_and_not_kept() -> None:
    ours = server(plan=plan())
    ours.open_round(names(10))
    change = update(1.0)
    gone = weakref.ref(change["weight"])
    ours.add(reply("client-0", change))
    del change
    gc.collect()
    assert gone() is None
    ours.close_round()


def test_added_one_by_one_or_all_at_once_is_the_same() -> None:
    one, all_at_once = server(plan=plan(noise_multiplier=1.0)), server(plan=plan(noise_multiplier=1.0))
    replies = [reply(name, update(1.0, seed=i)) for i, name in enumerate(names(10))]
    one.open_round(names(10)), all_at_once.open_round(names(10))
    for each in replies[:6]:
        one.add(each)
    one.close_round(replies[6:])
    all_at_once.close_round(replies)
    assert all(torch.equal(one.state[name], all_at_once.state[name]) for name in zeros())


# ── order, refusals, requests ───────────────────────────────────────────────────────────────────────


def test_calls_out_of_order_are_refused() -> None:
    ours = server(plan=plan())
    for call in (ours.request, ours.close_round, ours.abandon_round, lambda: ours.add(reply("a", {}))):
        with pytest.raises(StepError, match="no round is open"):
            call()
    ours.open_round(names(10))
    with pytest.raises(StepError, match="Round 1 is open"):
        ours.open_round(names(10))
    with pytest.raises(StepError, match="Round 1 is open"):
        ours.load_state_dict(ours.state_dict())


def test_an_abandoned_round_spends_nothing_and_is_opened_again_with_the_same_clients() -> None:
    ours = server(plan=plan(sample_rate=0.5), seed=None)
    chosen = ours.open_round(names(10))
    ours.add(reply(chosen[0], update(1.0)))
    ours.abandon_round()
    assert (ours.round, ours.ledger.releases) == (0, 0)
    assert ours.open_round(names(10)) == chosen
    assert ours.close_round().private.counts == {"lost": len(chosen)}


def test_the_request_is_of_the_open_round_and_its_tensors_are_nobody_elses() -> None:
    ours = server(plan=plan(), federation="wards")
    ours.open_round(names(10))
    request = ours.request(steps=7, config={"lr": 0.1})
    assert (request.round, request.steps, request.federation, request.config) == (1, 7, "wards", {"lr": 0.1})
    request.state["weight"].fill_(99)
    assert norm_of(ours.state) == 0
    assert norm_of(ours.request().state) == 0


def test_a_round_that_would_overspend_is_refused_before_it() -> None:
    budget = Budget(epsilon=2.0, delta=1e-5)
    ours = server(plan=plan(noise_multiplier=5.0, rounds=100), ledger=Ledger(relation=RELATION, budget=budget))
    with pytest.raises(BudgetExceededError):
        play(ours, rounds=100)
    before = ours.state
    rounds = ours.round
    assert rounds > 1
    with pytest.raises(BudgetExceededError):
        ours.open_round(names(10))
    assert (ours.round, ours.ledger.releases) == (rounds, rounds)
    assert all(torch.equal(ours.state[name], before[name]) for name in zeros())
    assert ours.epsilon(1e-5) <= 2.0
    with pytest.raises(StepError, match="no round is open"):
        ours.request()


RELATION = NeighboringRelation.ADD_OR_REMOVE


def test_a_round_whose_budget_was_taken_since_it_was_opened_releases_nothing() -> None:
    event = plan(noise_multiplier=5.0).event()
    once = Budget(epsilon=1.001 * plan(noise_multiplier=5.0, rounds=1).epsilon(1e-5), delta=1e-5)
    account = Ledger(relation=RELATION, budget=once)
    ours = server(plan=plan(noise_multiplier=5.0), ledger=account)
    ours.open_round(names(10))
    account.record(event, label="somebody else's")
    with pytest.raises(BudgetExceededError):
        ours.close_round()
    assert norm_of(ours.state) == 0
    assert ours.round == 1
    ours.abandon_round()


def test_the_round_is_recorded_before_noise_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = server(plan=plan(noise_multiplier=1.0), seed=None)
    recorded = []

    def failing(*_: object, **__: object) -> None:
        recorded.append(ours.ledger.releases)
        raise MemoryError

    ours.open_round(names(10))
    with monkeypatch.context() as patched:
        patched.setattr("dpdl.federated.round_release.gaussian_mechanism", failing)
        with pytest.raises(MemoryError):
            ours.close_round()
    assert recorded == [1]
    assert norm_of(ours.state) == 0
    ours.open_round(names(10))  # the same round once more, at another position
    ours.close_round()
    assert (ours.round, ours.ledger.releases) == (1, 2)


def test_rounds_past_the_plan_are_refused() -> None:
    ours = server(plan=plan(rounds=1, noise_multiplier=1.0))
    ours.open_round(names(10))
    ours.close_round()
    with pytest.raises(PlanExhaustedError, match="1 rounds are taken"):
        ours.open_round(names(10))


def test_the_ledger_composes_all_rounds() -> None:
    its_plan = plan(clients=1000, sample_rate=0.01, rounds=50, noise_multiplier=1.0)
    ours = server(plan=its_plan)
    for _ in range(50):
        ours.open_round(names(1000))
        ours.close_round()
    assert ours.epsilon(1e-5) == its_plan.epsilon(1e-5)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"plan": plan(), "sampling": PoissonClients(0.5)}, ParameterError, "the plan accounts for EveryClient"),
        ({"plan": plan(cohort=3), "sampling": FixedSizeClients(4)}, ParameterError, "the plan accounts for"),
        ({"plan": plan(), "max_weight": 2.0}, ParameterError, "the plan's noise is for 1.0"),
        ({"max_weight": 0.0}, ParameterError, "max_weight must be > 0"),
        ({"max_weight": math.inf}, ParameterError, "max_weight must be > 0"),
        ({"ledger": Ledger(relation=RELATION)}, ParameterError, "without a plan"),
        ({"plan": plan(), "ledger": "clients.ledger"}, WrapError, r"Give LedgerFile\(path\)"),
        ({"plan": plan(), "ledger": Ledger(relation=NeighboringRelation.ZERO_OUT)}, LedgerError, "differ by"),
        ({"plan": 1.0}, ParameterError, "plan must be a ClientLevelPlan"),
        ({"sampling": "poisson"}, ParameterError, "sampling must be a ClientSampling"),
        ({"optimizer": torch.optim.SGD}, ParameterError, "optimizer must be a ServerOptimizer"),
        ({"federation": ""}, ParameterError, "federation"),
        ({"seed": -1}, ParameterError, "insecure_seed"),
    ],
)
def test_arguments_that_contradict_each_other_are_refused(
    settings: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        server(**settings)


def test_what_agrees_with_the_plan_may_be_said_again() -> None:
    ours = server(plan=plan(cohort=3, max_weight=2.0), sampling=FixedSizeClients(3), max_weight=2.0)
    assert len(ours.open_round(names(10))) == 3
    assert server().sampling == EveryClient()


@pytest.mark.parametrize(
    ("changes", "available", "says"),
    [
        ({}, 11, "11 clients are available, and the plan is for 10"),
        ({"cohort": 3, "relation": "zero_out"}, 9, "9 of the plan's 10 clients"),
        ({"cohort": 3}, 2, "3 clients cannot be chosen"),
    ],
)
def test_numbers_of_clients_that_the_plan_does_not_account_for_are_refused(
    changes: dict[str, Any], available: int, says: str
) -> None:
    ours = server(plan=plan(**changes))
    with pytest.raises(ParameterError, match=says):
        ours.open_round(names(available))
    assert ours.round == 0
    assert len(server(plan=plan(cohort=3)).open_round(names(9))) == 3  # nothing is amplified there


def test_what_is_published_says_nothing_of_who_took_part() -> None:
    told = []
    for answering in (2, 9):
        ours = server(plan=plan(noise_multiplier=1.0))
        ours.open_round(names(10))
        summary = ours.close_round([reply(name, update(3.0)) for name in names(answering)])
        told.append(summary.to_publish())
        assert f"{answering} accepted" in str(summary).partition("not to be published")[2]
        assert summary.private.clipped == answering
    assert told[0] == told[1]
    assert set(told[0]) == {"round", "max_update_norm", "noise_std", "denominator", "next_max_update_norm"}


def test_an_update_that_counts_as_zero_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    ours = server(plan=plan())
    ours.open_round(names(10))
    ours.close_round([reply("client-0", {"weight": torch.zeros(3, 4)})])
    assert "has no 'bias'" in caplog.text
