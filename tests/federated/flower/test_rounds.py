"""A federation over Flower's messages: the same numbers as in one process, whoever answers, refuses, or is gone."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, arrays_size_mod, fixedclipping_mod

from accountants import Gaussian, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, ChannelError, DataError, ParameterError
from dpdl.federated.client_sampling import PoissonClients
from dpdl.federated.flower import DPStrategy, client_app, ledger_path, partition
from dpdl.federated.local_updates import LocalUpdateDP
from dpdl.federated.messages import Client, FitRequest, Refusal
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from tests.federated.flower.grid import OneProcess, context
from tests.federated.flower.task import RATE, SIGMA, STEPS, ledger_of, make_client, plan, play, same_state, server


def app_of(**more: Any) -> ClientApp:
    """Clients whose ledgers are where their node's configuration says."""

    def client(context: Context) -> Client:
        return make_client(*partition(context), ledger=ledger_path(context), **more)

    return client_app(client)


def contexts(folder: Path, number: int) -> list[Context]:
    return [context(index, number, **{"ledger-folder": str(folder)}) for index in range(number)]


def grid_of(folder: Path, number: int, **more: Any) -> OneProcess:
    return OneProcess(app_of(), contexts(folder, number), **more)


@pytest.mark.parametrize("with_plan", [False, True], ids=["plain", "client-level"])
def test_the_numbers_are_those_of_one_process(tmp_path: Path, with_plan: bool) -> None:
    settings = {"plan": plan()} if with_plan else {"sampling": PoissonClients(0.7)}
    (tmp_path / "here").mkdir()
    (tmp_path / "flower").mkdir()
    here = server(**settings)
    clients = [make_client(index, 4, ledger=ledger_of(tmp_path / "here", index)) for index in range(4)]
    play(here, clients, rounds=4)

    there = server(**settings)
    result = DPStrategy(there, clients=4).start(grid_of(tmp_path / "flower", 4), num_rounds=4)
    assert same_state(here.state, there.state)
    assert there.round == 4
    assert torch.equal(torch.from_numpy(result.arrays["weight"].numpy()), here.state["weight"])
    for index, client in enumerate(clients):
        assert client.epsilon(1e-5) == LedgerFile(ledger_of(tmp_path / "flower", index)).epsilon(1e-5)


def test_another_seed_gives_other_numbers(tmp_path: Path) -> None:
    runs = []
    for seed in (2, 3):
        runs.append(server(insecure_seed=seed, sampling=PoissonClients(0.5)))
        (tmp_path / str(seed)).mkdir()
        DPStrategy(runs[-1], clients=4).start(grid_of(tmp_path / str(seed), 4), num_rounds=4)
    assert not same_state(runs[0].state, runs[1].state)


def test_who_is_silent_dead_or_gone_is_lost_and_the_noise_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="flwr")
    grid = grid_of(tmp_path, 4, silent=[101], dead=[102])
    strategy = DPStrategy(server(plan=plan(sample_rate=1.0)), clients=4)
    strategy.start(grid, num_rounds=1)
    del grid.contexts[103]  # a node that the second round does not see any more
    strategy.start(grid, num_rounds=1)
    assert "client-1 lost: no answer came in time" in caplog.text
    assert "client-2 lost: Flower's error 5: Error: Node Unavailable" in caplog.text
    assert "client-3 lost: it was not there" in caplog.text
    first, second = (summary.private.outcomes for summary in strategy.summaries)
    assert first == {"client-0": "accepted", "client-1": "lost", "client-2": "lost", "client-3": "accepted"}
    assert second == {"client-0": "accepted", "client-1": "lost", "client-2": "lost", "client-3": "lost"}
    assert {(summary.noise_std, summary.denominator) for summary in strategy.summaries} == {(0.5, 4.0)}


def test_a_node_that_starts_again_takes_its_clients_place(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 2)
    strategy = DPStrategy(server(), clients=2)
    strategy.start(grid, num_rounds=1)
    again = contexts(tmp_path, 2)[1]
    again.node_id = 999
    grid.contexts[999] = again  # the old one is still listed for a while
    strategy.start(grid, num_rounds=1)
    assert [message.metadata.dst_node_id for message in grid.sent if message.metadata.message_type == "train"] == [
        100,
        101,
        100,
        999,
    ]
    assert strategy.summaries[1].private.outcomes == {"client-0": "accepted", "client-1": "accepted"}


def test_a_client_without_budget_refuses_and_is_counted(tmp_path: Path) -> None:
    enough_for_one = 1.05 * PRVAccountant().compose(PoissonSampled(RATE, Gaussian(SIGMA)) * STEPS).epsilon(1e-5)
    LedgerFile(ledger_of(tmp_path, 1), budget=Budget(epsilon=enough_for_one, delta=1e-5))
    strategy = DPStrategy(server(), clients=2)
    result = strategy.start(grid_of(tmp_path, 2), num_rounds=2)
    assert strategy.summaries[1].private.outcomes == {"client-0": "accepted", "client-1": "budget"}
    assert dict(result.train_metrics_clientapp[2]) == {"asked": 2, "accepted": 1, "budget": 1}
    assert LedgerFile(ledger_of(tmp_path, 1)).epsilon(1e-5) <= enough_for_one


def test_the_servers_own_budget_ends_the_run(tmp_path: Path) -> None:
    enough = plan(rounds=2).epsilon(1e-5)
    ledger = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=Budget(epsilon=enough, delta=1e-5))
    strategy = DPStrategy(server(plan=plan(), ledger=ledger), clients=4)
    grid = grid_of(tmp_path, 4)
    result = strategy.start(grid, num_rounds=5)
    assert (strategy.server.round, sorted(result.train_metrics_clientapp)) == (2, [1, 2])
    assert strategy.stopped is not None
    asked = len(grid.sent)
    with pytest.raises(BudgetExceededError):
        strategy.start(grid, num_rounds=1)
    assert len(grid.sent) == asked  # refused before anybody was asked


def test_a_request_is_void_when_its_round_is_over(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 1)
    DPStrategy(server(), timeout=45.0).start(grid, num_rounds=1)
    _, request = grid.sent
    assert request.metadata.ttl == 45.0
    assert (request.metadata.message_type, request.metadata.group_id) == ("train", "1")


def test_enough_clients_are_waited_for(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="1 clients have said who they are in 1 seconds, where 2"):
        DPStrategy(server(), clients=2, patience=1.0).start(grid_of(tmp_path, 1), num_rounds=1)


def test_names_that_are_given_are_not_asked_for(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 2)
    DPStrategy(server(), names={100: "client-0", 101: "client-1"}).start(grid, num_rounds=1)
    assert {message.metadata.message_type for message in grid.sent} == {"train"}


def test_evaluation_is_the_servers(tmp_path: Path) -> None:
    strategy = DPStrategy(server())
    seen: list[int] = []

    def evaluate(round: int, arrays: ArrayRecord) -> MetricRecord:
        seen.append(round)
        return MetricRecord({"norm": float(abs(arrays["weight"].numpy()).sum())})

    result = strategy.start(grid_of(tmp_path, 1), num_rounds=2, evaluate_fn=evaluate)
    assert seen == [0, 1, 2]
    assert len({record["norm"] for record in result.evaluate_metrics_serverapp.values()}) == 3
    assert strategy.configure_evaluate(1, ArrayRecord(), ConfigRecord(), None) == []  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="clients do not evaluate"):
        strategy.start(grid_of(tmp_path, 1), evaluate_config=ConfigRecord())


def test_the_state_is_the_servers(tmp_path: Path) -> None:
    strategy = DPStrategy(server())
    with pytest.raises(ParameterError, match="another state"):
        strategy.start(grid_of(tmp_path, 1), ArrayRecord({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}))
    strategy.start(grid_of(tmp_path, 1), ArrayRecord(strategy.server.state), num_rounds=1)
    with pytest.raises(ParameterError, match="only bool, int, float and str"):
        strategy.start(grid_of(tmp_path, 1), num_rounds=1, train_config=ConfigRecord({"x": [1]}))
    assert strategy.server.round == 1
    strategy.start(grid_of(tmp_path, 1), num_rounds=1)  # no round is left open


def test_a_round_that_cannot_be_carried_is_taken_back(tmp_path: Path) -> None:
    class Broken(OneProcess):
        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            raise ConnectionError("the network is down")

    strategy = DPStrategy(server(), names={100: "client-0"})
    with pytest.raises(ConnectionError):
        strategy.start(Broken(app_of(), contexts(tmp_path, 1)), num_rounds=1)
    strategy.start(grid_of(tmp_path, 1), num_rounds=1)
    assert strategy.server.round == 1


def test_an_answer_in_anothers_name_is_a_failure(tmp_path: Path) -> None:
    def other_name(context: Context) -> Client:
        return make_client(0, 2, ledger=ledger_path(context))

    strategy = DPStrategy(server(), names={100: "client-0", 101: "client-1"})
    strategy.start(OneProcess(client_app(other_name), contexts(tmp_path, 2)), num_rounds=1)
    assert strategy.summaries[0].private.outcomes == {"client-0": "accepted", "client-1": "failed"}


def test_another_app_is_refused(tmp_path: Path) -> None:
    app = ClientApp()

    @app.query("dpdl_name")
    def who(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    with pytest.raises(DataError, match="Node 100 does not say who it is"):
        DPStrategy(server()).start(OneProcess(app, [context()]), num_rounds=1)


# ── what a client remembers ─────────────────────────────────────────────────────────────────────────


def test_spending_outlives_the_state_that_flower_keeps(tmp_path: Path) -> None:
    """A SuperNode that starts again has no `context.state`; the ledger has everything."""
    strategy = DPStrategy(server(), clients=1)
    for _ in range(3):
        strategy.start(grid_of(tmp_path, 1), num_rounds=1)  # a new grid: new contexts
    true = PRVAccountant().compose(PoissonSampled(RATE, Gaussian(SIGMA)) * 3 * STEPS).epsilon(1e-5)
    assert LedgerFile(ledger_of(tmp_path, 0)).epsilon(1e-5) == pytest.approx(true, rel=1e-3)


def test_an_older_copy_of_the_ledger_is_refused(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 1)
    strategy = DPStrategy(server(), clients=1)
    strategy.start(grid, num_rounds=1)
    shutil.copy(ledger_of(tmp_path, 0), tmp_path / "copy")
    strategy.start(grid, num_rounds=1)
    shutil.copy(tmp_path / "copy", ledger_of(tmp_path, 0))
    strategy.start(grid, num_rounds=1)
    assert strategy.summaries[-1].private.outcomes == {"client-0": "request"}


def test_another_ledger_in_mid_run_is_refused(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 1)
    strategy = DPStrategy(server(), clients=1)
    strategy.start(grid, num_rounds=1)
    ledger_of(tmp_path, 0).unlink()
    strategy.start(grid, num_rounds=1)
    assert strategy.summaries[-1].private.outcomes == {"client-0": "request"}


def test_another_federation_on_the_same_ledger_is_no_older_copy(tmp_path: Path) -> None:
    grids = [grid_of(tmp_path, 1), grid_of(tmp_path, 1)]
    strategies = [DPStrategy(server(federation=name), clients=1) for name in ("north", "south")]
    for _ in range(2):
        for strategy, grid in zip(strategies, grids, strict=True):
            strategy.start(grid, num_rounds=1)
    outcomes = [summary.private.outcomes for strategy in strategies for summary in strategy.summaries]
    assert outcomes == [{"client-0": "accepted"}] * 4


def test_what_another_run_gives_back_is_no_older_copy(tmp_path: Path) -> None:
    grid = grid_of(tmp_path, 1)
    strategy = DPStrategy(server(), clients=1)
    with LedgerFile(ledger_of(tmp_path, 0), reserve=16) as shared:
        shared.record(Gaussian(30.0), label="step", run="statistics", ahead=16)  # 16 are recorded, one is used
        strategy.start(grid, num_rounds=1)
    assert LedgerFile(ledger_of(tmp_path, 0)).releases == 1 + STEPS
    strategy.start(grid, num_rounds=1)
    assert strategy.summaries[-1].private.outcomes == {"client-0": "accepted"}


def test_a_ledger_in_memory_is_refused() -> None:
    app = client_app(lambda context: make_client(0, 1, ledger=Ledger(relation=NeighboringRelation.ADD_OR_REMOVE)))
    strategy = DPStrategy(server(), clients=1)
    strategy.start(OneProcess(app, [context(0, 1)]), num_rounds=1)
    assert strategy.summaries[0].private.outcomes == {"client-0": "request"}


def test_what_an_exception_says_stays_on_the_node(caplog: pytest.LogCaptureFixture) -> None:
    """Flower sends the text of exceptions to the server; this one quotes a row of data."""

    def breaks(context: Context) -> Client:
        raise ValueError("could not convert string to float: 'Jane Roe, 1971, diabetes'")

    with pytest.raises(ChannelError, match="Node 100: ValueError, see the node's own log"):
        DPStrategy(server(), patience=0.5).start(OneProcess(client_app(breaks), [context()]), num_rounds=1)
    app, node = client_app(breaks), context()
    strategy = DPStrategy(server(), names={100: "client-0"})
    with caplog.at_level(logging.INFO, logger="flwr"):
        strategy.start(OneProcess(app, [node]), num_rounds=1)
    assert strategy.summaries[0].private.outcomes == {"client-0": "failed"}
    sent = [record.getMessage() for record in caplog.records if record.name == "flwr"]
    assert any("ValueError, see the node's own log" in line for line in sent)
    assert not any("Jane" in line for line in sent)


def test_reasons_travel() -> None:
    class Says:
        name = "client-0"

        def answer(self, request: FitRequest) -> Refusal:
            return Refusal(client=self.name, round=request.round, reason="request", message="no such layer")

    strategy = DPStrategy(server(), clients=1)
    strategy.start(OneProcess(client_app(lambda context: Says()), [context()]), num_rounds=1)
    assert strategy.summaries[0].private.outcomes == {"client-0": "request"}


# ── where things are ────────────────────────────────────────────────────────────────────────────────


def test_the_node_decides_where_its_ledger_is() -> None:
    node = context(3, 5, ledger="/srv/own.ledger")
    node.run_config = {"ledger-folder": "/tmp/empty"}  # whoever submits a run would like it to be
    assert ledger_path(node) == Path("/srv/own.ledger")
    node = context(3, 5)
    node.run_config = {"ledger-folder": "/sim"}
    assert ledger_path(node) == Path("/sim/client-3.ledger")
    assert partition(node) == (3, 5)


def test_a_node_that_is_not_set_up_says_what_to_add() -> None:
    with pytest.raises(ParameterError, match="--node-config 'ledger="):
        ledger_path(context())
    with pytest.raises(ParameterError, match="is not absolute"):
        ledger_path(context(ledger="own.ledger"))
    for bad in ({"partition-id": 2}, {"partition-id": "0"}, {"num-partitions": None}):
        with pytest.raises(ParameterError, match="partition-id"):
            partition(context(0, 2, **bad))


@pytest.mark.parametrize("mod", [fixedclipping_mod, LocalDpMod(1.0, 1.0, 1.0, 1e-5)], ids=["clipping", "noise"])
def test_mods_that_take_updates_for_weights_are_refused(mod: Any) -> None:
    with pytest.raises(ParameterError, match="expects a reply to hold weights"):
        client_app(lambda context: make_client(0, 1, ledger="x"), mods=[mod])


def test_other_mods_see_the_messages(tmp_path: Path) -> None:
    seen = []

    def look(message: Message, node: Context, call_next: Any) -> Message:
        seen.append(message.metadata.message_type)
        return call_next(message, node)

    app = client_app(lambda node: make_client(*partition(node), ledger=ledger_path(node)), mods=[look, arrays_size_mod])
    strategy = DPStrategy(server(), clients=1)
    strategy.start(OneProcess(app, contexts(tmp_path, 1)), num_rounds=1)
    assert seen == ["train"]
    assert strategy.summaries[0].private.outcomes == {"client-0": "accepted"}


@pytest.mark.parametrize("bad", [{"clients": 0}, {"timeout": 0.0}, {"patience": -1.0}])
def test_arguments_out_of_range_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="clients must be at least 1"):
        DPStrategy(server(), **bad)


def test_messages_out_of_turn_are_refused() -> None:
    with pytest.raises(ParameterError, match="before configure_train"):
        DPStrategy(server()).aggregate_train(1, [])


def test_a_client_with_two_ledgers_keeps_both(tmp_path: Path) -> None:
    """DP-SGD for its records, noise on the update for the client: neither ledger is forgotten."""

    def both(node: Context) -> Client:
        records = ledger_path(node)
        inner = make_client(*partition(node), ledger=records)
        updates = LedgerFile(records.with_suffix(".updates"), relation="replace_one")
        return LocalUpdateDP(inner, max_update_norm=1.0, noise_multiplier=4.0, ledger=updates, insecure_seed=1)

    grid = OneProcess(client_app(both), contexts(tmp_path, 1))
    strategy = DPStrategy(server(), clients=1)
    strategy.start(grid, num_rounds=2)
    assert LedgerFile(ledger_of(tmp_path, 0)).releases == 2 * STEPS
    updates = tmp_path / "client-0.updates"
    assert LedgerFile(updates, relation="replace_one").releases == 2
    updates.unlink()
    strategy.start(grid, num_rounds=1)
    assert [summary.private.outcomes["client-0"] for summary in strategy.summaries] == ["accepted"] * 2 + ["request"]
