"""A round that was begun and not answered tells without noise: it is spent, ends the claims, and is never lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dpdl
from dpdl.errors import ParameterError, StepError
from dpdl.federated.client import DPClient
from dpdl.federated.messages import FitReply, Refusal
from dpdl.federated.report import federated_report
from dpdl.federated.unanswered import Unanswered, unanswered_rounds_of
from tests.federated.clients.worlds import DELTA, N, Untouched, client, records, request, same, sgd, weights


def of_kind(kind: str, folder: Path) -> Any:
    return dpdl.LedgerFile(folder / "l") if kind == "file" else dpdl.Ledger(relation="add_or_remove")


def raising(error: Exception) -> Any:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        raise error

    return loss


def refused(ward: DPClient, number: int = 1, **asked: Any) -> Refusal:
    answer = ward.answer(request(number, **asked))
    assert isinstance(answer, Refusal)
    return answer


def claims_hold(ward: DPClient) -> list[bool]:
    return [claim.guaranteed for claim in ward.report(DELTA).claims]


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_a_server_that_makes_rounds_fail_gets_one_failure_and_no_claim(kind: str, tmp_path: Path) -> None:
    """A loss that raises on NaN, and weights under which one record alone overflows: a search for its value."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(1, 2), nn.Linear(2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sigmoid(self.b(self.a(1e30 * x))).squeeze(-1)  # overflows for weights that pass as weights

    def weights_at(threshold: float) -> dict[str, Tensor]:
        weight = torch.finfo(torch.float32).max / 1e30 / threshold
        scaled = torch.full((2, 1), weight)
        return {"a.weight": scaled, "a.bias": torch.zeros(2), "b.weight": torch.tensor([[1.0, -1.0]])} | {
            "b.bias": torch.zeros(1)
        }

    x = 1 + 0.5 * torch.rand(64, 1, generator=torch.Generator().manual_seed(1))
    x[17] = 2.71828
    ward = client(
        of_kind(kind, tmp_path),
        model=Net,
        dataset=TensorDataset(x, (x[:, 0] > 1.2).float()),
        loss_fn=F.binary_cross_entropy,
        noise_multiplier=20.0,
        batch_size=None,
        sample_rate=0.9,
        steps=8,
    )
    answers = [
        ward.answer(request(number, weights_at(threshold)))
        for number, threshold in enumerate((3.0, 2.5, 2.9, 2.6, 2.8), start=1)
    ]
    kinds = [answer.reason if isinstance(answer, Refusal) else "reply" for answer in answers]
    assert kinds[0] in ("reply", "failed", "request"), kinds
    assert kinds.count("failed") <= 1
    if "failed" not in kinds:  # weights of that size are refused, whatever the threshold
        assert set(kinds) == {"request"}
        assert ward.ledger.releases == 0
        pytest.fail("the attack's weights were refused: choose a stronger one")
    at = kinds.index("failed")
    assert set(kinds[at + 1 :]) <= {"request"}
    assert ward.ledger.releases == 8 * (at + 1)
    assert claims_hold(ward) == [False] * 3
    assert "begun and not answered" in str(ward.report(DELTA))


def test_weights_that_no_training_has_made_are_refused_unread() -> None:
    state = weights()
    for size in (2e9, 1e30, -1e300):
        bad = {**state, "0.weight": torch.full_like(state["0.weight"], size)}
        assert refused(client(dataset=Untouched()), state=bad).reason == "request"
    ward = client(dataset=Untouched())
    assert ward.ledger.releases == 0
    assert ward.unanswered == Unanswered()


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_all_failures_are_refused_in_the_same_words_and_spend_the_same(kind: str, tmp_path: Path) -> None:
    said = set()
    errors = (ValueError("patient 17"), RuntimeError(), dpdl.errors.LossError("3 records"), OSError(28, "full"))
    for number, error in enumerate((*errors, dpdl.errors.BudgetExceededError("taken"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        ward = client(of_kind(kind, folder), loss_fn=raising(error))
        said.add(refused(ward))
        assert ward.ledger.releases == 3
    late = client(train=lambda model, optimizer, loader, steps: None)
    said.add(refused(late))
    assert late.ledger.releases == 3
    assert len(said) == 1
    assert said.pop().reason == "failed"


def test_an_interrupt_has_left_a_mark_as_well(tmp_path: Path) -> None:
    ward = client(tmp_path / "l", loss_fn=raising(KeyboardInterrupt()))  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt):
        ward.answer(request())
    assert ward.unanswered.new == 1
    assert ward.ledger.releases == 3


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_another_client_of_that_data_knows_and_the_owner_lets_it_go_on(kind: str, tmp_path: Path) -> None:
    ledger = of_kind(kind, tmp_path)
    refused(client(ledger, loss_fn=raising(ValueError())))
    other = client(dpdl.LedgerFile(tmp_path / "l") if kind == "file" else ledger, name="other")
    assert other.unanswered == Unanswered(new=1)
    assert refused(other).reason == "request"
    assert "go_on()" in refused(other).message
    with pytest.raises(StepError):
        other.fit(weights())
    assert ledger.releases == 3
    other.go_on()
    assert isinstance(other.answer(request()), FitReply)
    assert (other.unanswered, claims_hold(other)) == (Unanswered(seen=1), [False] * 3)
    for wrong in ("", " ", "a\nb", 3):
        with pytest.raises(ParameterError, match="not_the_data"):
            other.go_on(not_the_data=wrong)  # type: ignore[arg-type]
    other.go_on(not_the_data="power cut of 3 May")
    assert claims_hold(other) == [True] * 3
    assert "1 were not, which the owner puts down to 'power cut of 3 May'" in str(other.report(DELTA))
    refused(client(ledger, loss_fn=raising(ValueError())), 2)
    assert other.unanswered == Unanswered(new=1, excused=("power cut of 3 May",))
    assert claims_hold(other) == [False] * 3


def test_a_client_stops_after_as_many_failures_as_it_was_told() -> None:
    ward = client(loss_fn=raising(ValueError()), max_failures=3)
    reasons = [refused(ward, number).reason for number in range(1, 6)]
    assert reasons == ["failed"] * 3 + ["request"] * 2
    assert ward.ledger.releases == 9


def test_a_stopped_client_still_sends_what_it_has_sent(tmp_path: Path) -> None:
    ledger = dpdl.LedgerFile(tmp_path / "l")
    first = client(ledger, replies=tmp_path / "r").answer(request())
    refused(client(ledger, loss_fn=raising(ValueError())), 2)
    again = client(ledger, replies=tmp_path / "r").answer(request())
    assert isinstance(first, FitReply)
    assert isinstance(again, FitReply)
    assert same(first.update, again.update)


def dies(folder: Path) -> None:
    def loss(output: Tensor, target: Tensor) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        return output

    client(folder / "l", loss_fn=loss).answer(request())


def test_kill_9_leaves_the_mark_that_a_later_process_finds(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=dies, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    ward = client(tmp_path / "l", dataset=Untouched())
    assert ward.unanswered == Unanswered(new=1)
    assert refused(ward).reason == "request"
    assert claims_hold(ward) == [False] * 3


def test_a_round_under_way_is_no_failure_to_others(tmp_path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def slow(output: Tensor, target: Tensor) -> Tensor:
        entered.set()
        leave.wait(60)
        return F.cross_entropy(output, target)

    first, second = client(tmp_path / "l", loss_fn=slow), client(tmp_path / "l", name="second")
    answers: list[object] = []
    thread = threading.Thread(target=lambda: answers.append(first.answer(request())))
    thread.start()
    assert entered.wait(60)
    assert second.unanswered == Unanswered()
    assert isinstance(second.answer(request()), FitReply)
    leave.set()
    thread.join()
    assert isinstance(answers[0], FitReply)
    assert second.unanswered == Unanswered()
    assert list((tmp_path / "l.unanswered").iterdir()) == []


def test_a_mark_that_cannot_be_left_keeps_the_round_from_beginning(tmp_path: Path) -> None:
    (tmp_path / "l.unanswered").write_text("in the way")
    ward = client(tmp_path / "l", dataset=Untouched())
    assert refused(ward).reason == "request"
    assert ward.ledger.releases == 0


def test_an_excuse_that_was_cut_off_by_a_kill_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ward = client(tmp_path / "l", loss_fn=raising(ValueError()))
    refused(ward)

    def killed(self: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            ward.go_on(not_the_data="power cut")
    assert claims_hold(ward) == [False] * 3


def test_weights_that_diverge_are_no_failure_of_the_data() -> None:
    ward = client(optimizer=sgd(lr=1e300), steps=6, noise_multiplier=1e10)
    assert refused(ward).reason == "failed"
    assert ward.ledger.releases == 6
    assert ward.unanswered == Unanswered()
    assert claims_hold(ward) == [True] * 3


def test_a_federation_with_a_failed_round_promises_nothing_of_that_client() -> None:
    ward, well = client(loss_fn=raising(ValueError())), client(name="well")
    refused(ward)
    assert isinstance(well.answer(request()), FitReply)
    for shared in (False, True):
        report = federated_report(server=None, clients=[ward, well], delta=DELTA, shared_persons=shared)
        for adversary in report.adversaries:
            assert any(not claim.guaranteed for claim in report.against(adversary))
            assert "begun and not answered" in " ".join(claim.because for claim in report.against(adversary))


def stopping(model: Any, optimizer: Any, loader: Any, steps: int) -> None:
    """Takes one step less than it should where it sees an outlier."""
    taken = 0
    while taken < steps:
        for x, y in loader:
            if taken == steps - 1 and x.numel() and x.max() > 5:
                return
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            taken += 1
            if taken == steps:
                break


def test_a_loop_that_stops_early_is_not_answered_unless_it_was_declared() -> None:
    x, y = records()
    x[5] = 9.0
    outlier = TensorDataset(x, y)
    ward = client(train=stopping, dataset=outlier, batch_size=N)
    assert refused(ward).reason == "failed"
    assert ward.ledger.releases == 3
    assert claims_hold(ward) == [False] * 3
    assert isinstance(client(train=stopping, batch_size=N).answer(request()), FitReply)
    declared = client(train=stopping, dataset=outlier, batch_size=N, may_stop_early=True)
    assert isinstance(declared.answer(request()), FitReply)
    assert declared.ledger.releases == 3
    assert "does not stop early because of what is in the data" in str(declared.report(DELTA))


def test_the_most_steps_can_be_set() -> None:
    assert refused(client(max_steps=3, dataset=Untouched()), steps=4).reason == "request"
    assert isinstance(client(max_steps=3).answer(request(steps=3)), FitReply)


def test_a_budget_does_not_cover_kinds_chosen_by_looking() -> None:
    budget = dpdl.Budget(epsilon=4.0, delta=DELTA)
    ward = client(dpdl.Ledger(relation="add_or_remove", budget=budget))
    assert "provided that kinds of releases and their order were fixed beforehand" in str(ward.report(DELTA))


def test_marks_of_one_ledger_are_one_set() -> None:
    one, other = (dpdl.Ledger(relation="add_or_remove") for _ in range(2))
    with pytest.raises(ValueError, match="seven"), unanswered_rounds_of(one).under_way("round"):
        raise ValueError("seven")
    assert unanswered_rounds_of(one).look() == Unanswered(new=1)
    assert unanswered_rounds_of(other).look() == Unanswered()
