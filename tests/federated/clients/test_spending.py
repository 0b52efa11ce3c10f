"""Spending adds up over rounds and federations as one composition, and a round that does not fit is refused unread."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from torch.utils.data import TensorDataset

import accountants
import dpdl
from accountants import Gaussian, PoissonSampled
from accountants import NeighboringRelation as Relation
from dpdl.errors import BudgetExceededError, LedgerError, ParameterError
from dpdl.federated.messages import FitReply, Refusal
from dpdl.federated.round_account import RoundAccount
from tests.federated.clients.worlds import DELTA, N, Untouched, client, ledger_file, records, request

RATE, STEPS = 1 / 8, 8
RESET = 3.79  # what the official Flower and Opacus example reports after any number of rounds
TRUE = {3: 5.41, 10: 8.90, 100: 31.3}  # what the same accountant says of all rounds together


def one_composition(steps: int, *, noise: float = 1.0, rate: float = RATE) -> float:
    return accountants.epsilon(noise_multiplier=noise, sample_rate=rate, steps=steps, delta=DELTA)


def peers(steps: int) -> tuple[float, float]:
    """Renyi's bound and the privacy-loss distribution's, by another library."""
    event = SelfComposedDpEvent(PoissonSampledDpEvent(RATE, GaussianDpEvent(1.0)), steps)
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    orders = [1 + x / 10.0 for x in range(1, 100)] + list(range(12, 64))  # Opacus' own
    renyi = RdpAccountant(orders, relation).compose(event).get_epsilon(DELTA)
    return float(renyi), float(PLDAccountant(relation).compose(event).get_epsilon(DELTA))


@pytest.mark.parametrize("rounds", [3, 10, 100])
def test_rounds_report_exactly_one_composed_accountant(rounds: int, tmp_path: Path) -> None:
    ward = client(ledger_file(tmp_path), noise_multiplier=1.0, sample_rate=RATE, steps=STEPS)
    for round in range(1, rounds + 1):
        assert isinstance(ward.answer(request(round)), FitReply)
    found = ward.epsilon(DELTA)
    assert found == one_composition(STEPS * rounds)
    renyi, distribution = peers(STEPS * rounds)
    assert found == pytest.approx(distribution, rel=2e-3)
    assert renyi == pytest.approx(TRUE[rounds], abs=0.06)
    assert found <= renyi
    assert peers(STEPS)[0] == pytest.approx(RESET, abs=0.02)
    assert found > 1.2 * one_composition(STEPS)  # which is where a client that forgets would stay
    again = client(ledger_file(tmp_path), noise_multiplier=1.0, sample_rate=RATE, steps=STEPS)
    assert again.epsilon(DELTA) == found
    assert again.spending(DELTA).rounds == {"federation": rounds}
    assert all(claim.epsilon == found for claim in again.report(DELTA).claims)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_two_federations_with_one_ledger_add_up(kind: str, tmp_path: Path) -> None:
    shared = ledger_file(tmp_path) if kind == "file" else dpdl.Ledger(relation="add_or_remove")
    a = client(shared, name="ward")
    b = client(shared, name="ward at the other place", noise_multiplier=2.0)
    for round in (1, 2):
        a.answer(request(round, federation="hearts"))
        b.answer(request(round, federation="lungs/left", steps=4))
    expected = accountants.PRVAccountant()
    expected.compose(6 * PoissonSampled(0.5, Gaussian(1.0)))
    expected.compose(8 * PoissonSampled(0.5, Gaussian(2.0)))
    assert a.epsilon(DELTA) == b.epsilon(DELTA) == pytest.approx(expected.epsilon(DELTA), rel=1e-9)
    assert a.spending(DELTA).rounds == {"hearts": 2, "lungs/left": 2}
    assert a.spending(DELTA).releases == 14


def test_one_client_in_two_federations_adds_up(tmp_path: Path) -> None:
    ward = client(ledger_file(tmp_path))
    for federation in ("hearts", "lungs"):
        assert isinstance(ward.answer(request(1, federation=federation)), FitReply)
    assert ward.epsilon(DELTA) == one_composition(6, rate=0.5)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_round_that_would_overspend_is_refused_before_data_is_touched(kind: str, tmp_path: Path) -> None:
    budget = dpdl.Budget(epsilon=one_composition(3, rate=0.5) * 1.01, delta=DELTA)
    shared = (
        dpdl.LedgerFile(tmp_path / "l", budget=budget)
        if kind == "file"
        else dpdl.Ledger(relation="add_or_remove", budget=budget)
    )
    assert isinstance(client(shared, steps=3).answer(request(1)), FitReply)
    before, text = shared.epsilon(DELTA), (tmp_path / "l").read_text() if kind == "file" else ""
    unread = client(shared, dataset=Untouched(), steps=3)
    refusal = unread.answer(request(2))
    assert isinstance(refusal, Refusal)
    assert (refusal.reason, refusal.client, refusal.round) == ("budget", "ward", 2)
    assert "overspend" in refusal.message
    assert str(tmp_path) not in refusal.message
    with pytest.raises(BudgetExceededError):
        unread.fit(request().state, round=2)
    assert shared.epsilon(DELTA) == before
    assert kind == "memory" or (tmp_path / "l").read_text() == text


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_round_is_refused_whole_where_some_of_its_steps_would_fit(kind: str, tmp_path: Path) -> None:
    budget = one_composition(5, rate=0.5) * 1.001
    ledger = (
        ledger_file(tmp_path, budget)
        if kind == "file"
        else dpdl.Ledger(relation="add_or_remove", budget=dpdl.Budget(epsilon=budget, delta=DELTA))
    )
    ward = client(ledger, steps=3)
    assert isinstance(ward.answer(request(1)), FitReply)
    refusal = client(ledger, dataset=Untouched(), steps=3).answer(request(2))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "budget"
    assert ledger.releases == 3
    assert isinstance(ward.answer(request(2, steps=2)), FitReply)  # a shorter one fits
    assert isinstance(ward.answer(request(3, steps=1)), Refusal)
    assert ward.epsilon(DELTA) <= budget
    assert ward.epsilon(DELTA) == one_composition(5, rate=0.5)


def test_a_rounds_steps_are_in_the_file_before_the_first_is_taken(tmp_path: Path) -> None:
    seen: list[int] = []

    class Watching(TensorDataset):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            seen.append(dpdl.LedgerFile(tmp_path / "ward.ledger").releases)
            return super().__getitem__(index)

    ward = client(ledger_file(tmp_path), dataset=Watching(*records()), steps=5)
    assert isinstance(ward.answer(request()), FitReply)
    assert set(seen) == {5}


def test_a_round_that_fails_has_spent_all_its_steps_and_the_refusal_says_nothing_more(tmp_path: Path) -> None:
    class Ending(TensorDataset):
        reads = 0

        def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
            Ending.reads += 1
            if Ending.reads > 3 * N:
                raise OSError(f"record {index} of patient 17 is unreadable")
            return super().__getitem__(index)

    ward = client(ledger_file(tmp_path), dataset=Ending(*records()), batch_size=N, steps=5)
    refusal = ward.answer(request())
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "failed"
    assert "17" not in refusal.message
    assert "OSError" not in refusal.message
    assert ward.ledger.releases == 5 == dpdl.LedgerFile(tmp_path / "ward.ledger").releases
    assert ward.epsilon(DELTA) == one_composition(5, rate=1.0)
    Ending.reads = -1000
    assert ward.answer(request()).reason == "request"  # type: ignore[union-attr]
    ward.go_on()
    assert isinstance(ward.answer(request()), FitReply)  # the federation goes on: a new attempt, paid for
    assert ward.ledger.releases == 10


def test_a_loop_that_takes_other_steps_fails_has_spent_all_and_takes_none_beyond(tmp_path: Path) -> None:
    def lazy(model: object, optimizer: object, loader: object, steps: int) -> None:
        return None

    def greedy(model, optimizer, loader, steps: int) -> None:  # type: ignore[no-untyped-def]
        for _ in range(steps + 1):
            for x, y in loader:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

    for train, folder in ((lazy, "a"), (greedy, "b")):
        (tmp_path / folder).mkdir()
        ledger = ledger_file(tmp_path / folder)
        assert client(ledger, train=train, steps=4).answer(request()).reason == "failed"  # type: ignore[union-attr]
        assert ledger.releases == 4


def test_an_adaptive_budget_is_the_claim(tmp_path: Path) -> None:
    budget = dpdl.Budget(epsilon=40.0, delta=DELTA, adaptive=True)
    ward = client(dpdl.LedgerFile(tmp_path / "l", budget=budget))
    assert isinstance(ward.answer(request()), FitReply)
    assert all(claim.epsilon == 40.0 for claim in ward.report(DELTA).claims)
    assert not any(claim.guaranteed for claim in ward.report(DELTA / 10).claims)


def test_the_ledger_must_be_one_and_of_the_same_relation(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="must be a Ledger"):
        client(3)
    with pytest.raises(LedgerError, match="differ by replacing"):
        client(dpdl.Ledger(relation="replace_one"))
    assert isinstance(client(tmp_path / "made").ledger, dpdl.LedgerFile)
    assert isinstance(client(str(tmp_path / "made")).answer(request()), FitReply)


def test_without_noise_nothing_is_claimed() -> None:
    ward = client(noise_multiplier=0.0)
    answer = ward.answer(request())
    assert isinstance(answer, FitReply)
    assert len(answer.releases.unprotected) == len(answer.releases)
    assert "NO GUARANTEE" in str(ward.report(DELTA))


def test_two_processes_at_the_edge_of_a_budget_do_not_overspend_it(tmp_path: Path) -> None:
    """Two clients with the same file, as two processes have it, ask at the same time for the last steps."""
    budget = one_composition(30, rate=0.5) * 1.0001
    ledger_file(tmp_path, budget)
    answers: list[object] = []

    def take_part(name: str) -> None:
        ward = client(tmp_path / "ward.ledger", name=name, steps=2)
        answers.extend(ward.answer(request(round)) for round in range(1, 21))

    threads = [threading.Thread(target=take_part, args=(name,)) for name in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    replies = sum(isinstance(answer, FitReply) for answer in answers)
    ledger = ledger_file(tmp_path)
    assert ledger.releases == 2 * replies <= 30
    assert replies >= 14
    assert ledger.epsilon(DELTA) <= budget


def test_an_overspent_round_stays_refused_and_an_answered_one_is_still_answered(tmp_path: Path) -> None:
    ward = client(ledger_file(tmp_path, one_composition(3, rate=0.5) * 1.01), steps=3)
    first = ward.answer(request(1))
    assert isinstance(ward.answer(request(2)), Refusal)
    again = ward.answer(request(1))
    assert isinstance(first, FitReply)
    assert isinstance(again, FitReply)
    assert ward.ledger.releases == 3


def test_arguments_out_of_range_are_refused_at_once() -> None:
    for changed in (
        {"noise_multiplier": -1.0},
        {"max_grad_norm": 0.0},
        {"batch_size": None},
        {"sample_rate": 1.5},
        {"steps": 0},
        {"proximal": -0.1},
        {"metrics": "loss"},
        {"metrics": ["accuracy"]},
        {"insecure_seed": -1},
        {"execution": dpdl.Execution(insecure_seed=3)},
        {"weight": float("nan")},
        {"name": ""},
        {"name": "ward\n  against server, record: epsilon <= 0.00"},
        {"max_failures": 0},
        {"max_steps": 0},
        {"max_steps": 2},
    ):
        with pytest.raises(ParameterError):
            client(**changed)  # type: ignore[arg-type]
    with pytest.raises(dpdl.errors.LoaderError):
        client(dataset=TensorDataset(torch.zeros(0, 3)))


def test_what_another_process_takes_between_the_look_and_the_claim_is_noticed(tmp_path: Path) -> None:
    budget = dpdl.Budget(epsilon=one_composition(5, rate=0.5) * 1.0001, delta=DELTA)
    account = RoundAccount(dpdl.LedgerFile(tmp_path / "l", budget=budget), relation=Relation.ADD_OR_REMOVE)
    other = dpdl.LedgerFile(tmp_path / "l")
    step = PoissonSampled(0.5, Gaussian(1.0))

    class Overtaken:
        def refuse(self, *_: object, **__: object) -> None:
            other.record(step, run="other")

    account._allowance = Overtaken()  # type: ignore[assignment]
    with pytest.raises(BudgetExceededError, match="Somebody else"):
        account.claim(step, 5, label="step", run="ours", branch="key", repeatable=False)
    assert other.releases == 1  # what could be had of ours was given back
    assert [entry.run for entry in other.entries] == ["other"]
