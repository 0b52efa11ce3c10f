"""The runner plays rounds as the server says, records what happened, and spends nothing by itself."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import BudgetExceededError, ParameterError
from dpdl.federated import runner
from dpdl.federated.inventory import UNPROTECTED, Inventory, Release
from dpdl.federated.messages import FitReply, FitRequest, Refusal
from dpdl.federated.runner import accuracy_on, run_federated
from dpdl.federated.virtual_clients import VirtualClients
from tests.federated.runner.fakes import AddingClient, BareClient, MeanServer

REPORTED: list[dict[str, Any]] = []


@pytest.fixture(autouse=True)
def _fake_report(monkeypatch: pytest.MonkeyPatch) -> None:
    def report(**arguments: Any) -> AdversaryReport:
        REPORTED.append(arguments)
        return AdversaryReport(
            title="fake", adversaries=("server",), claims=(Claim(against="server", unit="record", because="fake"),)
        )

    REPORTED.clear()
    monkeypatch.setattr(runner, "federated_report", report)


def zeros() -> dict[str, Tensor]:
    return {"weight": torch.zeros(2)}


def run(server: MeanServer, clients: Any, **settings: Any) -> Any:
    return run_federated(server, clients, progress=False, **{"rounds": 3, **settings})  # type: ignore[arg-type]


def test_rounds_are_opened_asked_for_and_closed_and_the_state_comes_out() -> None:
    server = MeanServer(zeros())
    clients = [AddingClient("a", 1.0), AddingClient("b", 3.0)]
    result = run(server, clients, steps=5)
    assert server.calls == ["open", "request", "close"] * 3
    assert result.state["weight"].tolist() == [6.0, 6.0]
    assert [request.round for request in clients[0].requests] == [1, 2, 3]
    assert {request.steps for request in clients[0].requests} == {5}
    assert clients[1].requests[1].state["weight"].tolist() == [2.0, 2.0]
    assert result.stopped is None
    server.state["weight"].add_(1)
    assert result.state["weight"].tolist() == [6.0, 6.0]


def test_only_the_chosen_are_asked_or_even_made() -> None:
    server = MeanServer(zeros(), choose=lambda round, names: [names[round]])
    clients = VirtualClients(lambda index, _: AddingClient(f"client-{index}", index), 5000)
    result = run(server, clients)
    assert clients.made == ("client-1", "client-2", "client-3")
    assert [record.chosen for record in result.history.rounds] == [("client-1",), ("client-2",), ("client-3",)]
    assert [client.name for client in REPORTED[0]["clients"]] == ["client-1", "client-2", "client-3"]
    assert result.history.rounds[-1].client_epsilon == {"client-1": 0.5, "client-2": 0.5, "client-3": 0.5}


def test_a_round_that_nobody_is_chosen_for_is_a_round() -> None:
    server = MeanServer(zeros(), choose=lambda round, names: [])
    result = run(server, [AddingClient("a", 1.0)])
    assert server.calls == ["open", "request", "close"] * 3
    assert result.history.rounds[-1].client_epsilon == {}
    assert result.history.rounds[-1].largest_epsilon is None


def test_refusals_are_counted_by_reason_handed_to_the_server_and_stay_in_the_report() -> None:
    server = MeanServer(zeros())
    clients = [AddingClient("a", 1.0), AddingClient("b", 1.0, rounds_left=1), AddingClient("c", 1.0, rounds_left=0)]
    result = run(server, clients)
    assert [dict(r.refused) for r in result.history.rounds] == [
        {"budget": ("c",)},
        {"budget": ("b", "c")},
        {"budget": ("b", "c")},
    ]
    assert [r.answered for r in result.history.rounds] == [("a", "b"), ("a",), ("a",)]
    assert server.outcomes == {"a": "accepted", "b": "budget", "c": "budget"}
    assert [client.name for client in REPORTED[0]["clients"]] == ["a", "b", "c"]
    assert result.history.of_client("b") == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_an_update_that_the_server_does_not_take_is_no_answer() -> None:
    result = run(MeanServer(zeros()), [AddingClient("a", 1.0), AddingClient("b", math.nan)], rounds=1)
    assert result.history.rounds[0].answered == ("a",)
    assert dict(result.history.rounds[0].refused) == {"not finite": ("b",)}


def test_what_replies_carried_is_handed_to_the_report_once_each() -> None:
    first = Inventory((Release(name="weight", kind="parameter", mechanism="noise"),))
    second = Inventory((Release(name="loss", kind="metric", mechanism=UNPROTECTED),))

    class Changing(AddingClient):
        def answer(self, request: FitRequest) -> FitReply | Refusal:
            self.releases = second if request.round == 2 else first
            return super().answer(request)

    run(MeanServer(zeros()), [Changing("a", 1.0), AddingClient("b", 1.0, rounds_left=0)], shared_persons=True)
    assert REPORTED[0]["inventories"] == {"a": (first, second)}
    assert REPORTED[0]["shared_persons"] is True


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_round_that_breaks_off_is_taken_back_and_the_server_can_go_on(error: type[BaseException]) -> None:
    class Broken(AddingClient):
        def answer(self, request: FitRequest) -> FitReply | Refusal:
            raise error("broken")

    server = MeanServer(zeros())
    with pytest.raises(error, match="broken"):
        run(server, [AddingClient("a", 1.0), Broken("b", 1.0)])
    assert server.calls == ["open", "request", "abandon"]
    assert [r.round for r in run(server, [AddingClient("a", 1.0)]).history.rounds] == [1, 2, 3]


def test_a_budget_that_another_run_spent_meanwhile_ends_the_run_with_the_closed_rounds() -> None:
    client = AddingClient("a", 1.0)
    server = MeanServer(zeros(), spent_at_close=[3])
    result = run(server, [client], rounds=5, every=5)
    assert "another run" in result.stopped
    assert server.calls[-1] == "abandon"
    assert [r.round for r in result.history.rounds] == [1, 2]
    assert result.history.rounds[-1].client_epsilon == {"a": 1.5}  # the round that was taken back is spent there


def test_every_looks_now_and_then_and_always_at_the_end() -> None:
    looked: list[float] = []

    def evaluate(state: Mapping[str, Tensor]) -> dict[str, float]:
        looked.append(float(state["weight"][0]))
        return {"accuracy": looked[-1] / 10}

    result = run(MeanServer(zeros()), [AddingClient("a", 1.0)], rounds=7, every=3, evaluate=evaluate)
    assert looked == [3.0, 6.0, 7.0]
    assert [r.round for r in result.history.rounds if r.evaluation] == [3, 6, 7]
    assert result.history.of_client("a") == [(3, 1.5), (6, 3.0), (7, 3.5)]
    assert result.history.last_evaluation == {"accuracy": 0.7}


def test_an_evaluation_may_be_one_number() -> None:
    result = run(MeanServer(zeros()), [AddingClient("a", 1.0)], evaluate=lambda state: 0.5)
    assert result.history.last_evaluation == {"score": 0.5}


def test_a_client_without_an_epsilon_guarantees_nothing() -> None:
    result = run(MeanServer({}), [BareClient()])
    assert result.history.rounds[-1].client_epsilon == {"bare": math.inf}


@pytest.mark.parametrize("amplified", [None, False, True])
def test_the_servers_epsilon_is_of_its_noise_and_participation_secret_if_its_claim_is_amplified(
    amplified: bool | None,
) -> None:
    result = run(MeanServer(zeros(), amplified=amplified), [AddingClient("a", 1.0)])
    expected = [None] * 3 if amplified is None else [0.25, 0.5, 0.75]
    assert [r.server_epsilon for r in result.history.rounds] == expected
    assert result.history.secret_participation is (amplified is True)


def test_a_spent_server_ends_the_run_with_what_was_done() -> None:
    result = run(MeanServer(zeros(), allowed=2), [AddingClient("a", 1.0)], rounds=5, every=5)
    assert "budget is spent" in result.stopped
    assert len(result.history.rounds) == 2
    assert result.history.of_client("a") == [(2, 1.0)]
    assert result.state["weight"].tolist() == [2.0, 2.0]


def test_a_server_that_is_spent_from_the_start_raises_and_nobody_is_asked() -> None:
    client = AddingClient("a", 1.0)
    with pytest.raises(BudgetExceededError):
        run(MeanServer(zeros(), allowed=0), [client])
    assert client.requests == []


def test_stop_ends_after_the_round_and_looks_at_it() -> None:
    client = AddingClient("a", 1.0)
    result = run(MeanServer(zeros()), [client], rounds=9, every=9, stop=lambda: client.taken == 2)
    assert len(result.history.rounds) == 2
    assert "2 of 9" in result.stopped
    assert result.history.of_client("a") == [(2, 1.0)]


def test_a_second_call_goes_on_where_the_server_is() -> None:
    server = MeanServer(zeros())
    clients = [AddingClient("a", 1.0)]
    run(server, clients)
    again = run(server, clients)
    assert [r.round for r in again.history.rounds] == [4, 5, 6]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rounds": 0}, "rounds"),
        ({"every": 0}, "every"),
        ({"delta": 2.0}, "delta"),
        ({"clients": []}, "no clients"),
        ({"clients": [AddingClient("a", 1), AddingClient("a", 2)]}, "'a'"),
    ],
)
def test_what_cannot_be_is_refused_before_a_round(settings: dict[str, Any], words: str) -> None:
    server = MeanServer(zeros())
    with pytest.raises(ParameterError, match=words):
        run(server, settings.pop("clients", [AddingClient("a", 1)]), **settings)
    assert server.calls == []


def test_the_bar_shows_rounds_numbers_and_refusals() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=160)
    clients = [AddingClient("a", 1.0), AddingClient("b", 1.0, rounds_left=0)]
    server = MeanServer(zeros(), amplified=False)
    run_federated(server, clients, rounds=2, progress=console, evaluate=lambda state: 0.25)  # type: ignore[arg-type]
    shown = out.getvalue()
    for words in ("2/2", "score 0.25", "clients' epsilon <= 1.00", "server's epsilon <= 0.50", "2 refusals"):
        assert words in shown, words


def test_without_a_bar_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    run(MeanServer(zeros()), [AddingClient("a", 1.0)])
    assert capsys.readouterr() == ("", "")


def test_accuracy_on_tests_the_state_and_not_the_model_that_it_was_given() -> None:
    model = nn.Linear(2, 2, bias=False)
    before = model.weight.detach().clone()
    evaluate = accuracy_on(model, torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), torch.tensor([0, 1, 1]))
    assert evaluate({"weight": torch.eye(2)}) == {"accuracy": pytest.approx(2 / 3)}
    assert evaluate({"weight": -torch.eye(2)}) == {"accuracy": pytest.approx(1 / 3)}
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"server": nn.Linear(1, 1)}, "server must be a FederatedServer"),
        ({"clients": 3}, "clients must be clients"),
        ({"clients": ["a client's name"]}, "a client has a name and answers requests"),
        ({"evaluate": 0.5}, "evaluate must be a function"),
        ({"stop": False}, "stop must be a function"),
    ],
)
def test_odd_arguments_are_refused_before_anything_is_asked(changed: dict[str, Any], told: str) -> None:
    server = MeanServer(zeros())
    arguments: dict[str, Any] = {"server": server, "clients": [AddingClient("a", 1.0)], "rounds": 1, "progress": False}
    arguments |= changed
    with pytest.raises(ParameterError, match=told):
        run_federated(arguments.pop("server"), arguments.pop("clients"), **arguments)
    assert server.calls == []
