"""A server that is saved, killed and resumed forgets no spending and draws no noise twice."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, CheckpointError, LedgerError, PlanExhaustedError
from dpdl.federated import round_release
from dpdl.federated.adaptive_clipping import AdaptiveClipping
from dpdl.federated.client_sampling import PoissonClients
from dpdl.federated.server import FederatedServer
from dpdl.federated.server_optimizers import FedAdam, FedYogi
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from tests.federated.server.small_federation import names, plan, reply, server, update, zeros

NOISY = plan(noise_multiplier=5.0, rounds=6, sample_rate=0.5, adaptive_clipping=AdaptiveClipping())


def play(ours: FederatedServer, rounds: int) -> FederatedServer:
    for _ in range(rounds):
        chosen = ours.open_round(names(10))
        number = ours.round
        ours.close_round([reply(name, update(1.0, seed=number), round=number) for name in chosen])
    return ours


def same(first: FederatedServer, second: FederatedServer) -> bool:
    return all(torch.equal(first.state[name], second.state[name]) for name in zeros())


def make(path: Path | None = None, **settings: Any) -> FederatedServer:
    ledger = None if path is None else LedgerFile(path)
    return server(**{"plan": NOISY, "optimizer": FedAdam(), "ledger": ledger, **settings})


def test_under_a_seed_it_goes_on_as_if_it_had_not_been_killed(tmp_path: Path) -> None:
    whole = play(make(), 6)
    first = play(make(tmp_path / "ledger"), 3)
    torch.save(first.state_dict(), tmp_path / "server.pt")
    second = make(tmp_path / "ledger")
    second.load_state_dict(torch.load(tmp_path / "server.pt", weights_only=True))
    play(second, 3)
    assert same(second, whole)
    assert second.max_update_norm == whole.max_update_norm
    assert second.round == 6
    assert LedgerFile(tmp_path / "ledger").releases == second.ledger.releases == 6
    assert second.epsilon(1e-5) == whole.epsilon(1e-5)


def answered(ours: FederatedServer, size: float) -> dict[str, torch.Tensor]:
    """The model after one more round, with these answers."""
    chosen, number = ours.open_round(names(10)), ours.round
    ours.close_round([reply(name, update(size), round=number) for name in chosen])
    return ours.state


def make_large(ledger: Any) -> FederatedServer:
    return server(plan=plan(noise_multiplier=1000.0, rounds=6), ledger=ledger)


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_under_a_seed_another_round_from_the_same_state_has_other_noise_and_counts(kind: str, tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "l") if kind == "file" else Ledger(relation="add_or_remove")
    saved = make_large(ledger).state_dict()
    states = []
    for size in (0.5, 0.1, 0.1):
        ours = make_large(ledger)
        ours.load_state_dict(saved)
        states.append(answered(ours, size))
    for one, other in ((0, 1), (1, 2)):
        difference = torch.cat([(states[one][n] - states[other][n]).flatten() for n in states[one]])
        assert float(difference.norm()) > 10
    assert ledger.releases == 3


@pytest.mark.parametrize("kind", ["file", "memory"])
def test_under_a_seed_two_live_servers_of_one_state_do_not_draw_one_round(kind: str, tmp_path: Path) -> None:
    ledger = LedgerFile(tmp_path / "l") if kind == "file" else Ledger(relation="add_or_remove")
    saved = make_large(ledger).state_dict()
    first, second = make_large(ledger), make_large(ledger)
    for each in (first, second):
        each.load_state_dict(saved)
    play(first, 2)
    with pytest.raises(LedgerError, match="Load the saved state again"):
        second.open_round(names(10))


def test_under_a_seed_the_noise_is_of_the_sum_whatever_a_ledger_knows() -> None:
    one, other = (answered(make_large(None), size) for size in (0.5, 0.1))
    assert float(torch.cat([(one[n] - other[n]).flatten() for n in one]).norm()) > 10


def test_a_secure_server_draws_fresh_noise_and_keeps_what_was_lost_spent(tmp_path: Path) -> None:
    first = play(make(tmp_path / "ledger", seed=None), 3)
    saved = first.state_dict()
    play(first, 2)  # rounds that the saved state does not know
    second = make(tmp_path / "ledger", seed=None)
    second.load_state_dict(saved)
    assert (second.round, second.ledger.releases) == (3, 5)
    play(second, 1)
    assert not same(first, second)
    assert LedgerFile(tmp_path / "ledger").releases == second.ledger.releases == 6
    assert second.epsilon(1e-5) == NOISY.epsilon(1e-5)
    with pytest.raises(PlanExhaustedError):
        second.open_round(names(10))


def test_two_servers_that_go_on_from_one_state_draw_different_noise() -> None:
    saved = play(make(seed=None), 2).state_dict()
    ours = [make(seed=None) for _ in range(2)]
    for each in ours:
        each.load_state_dict(saved)
        play(each, 1)
    assert not same(*ours)


def test_no_key_is_saved() -> None:
    ours = make(seed=None)
    ours.open_round(names(10))
    key = ours._noisy.run._randomness._key  # type: ignore[union-attr]
    assert key.hex() not in repr(ours.state_dict())
    assert repr(key) not in repr(ours.state_dict())


def test_an_open_round_is_saved_as_not_yet_opened() -> None:
    ours = play(make(), 1)
    saved = ours.state_dict()
    chosen = ours.open_round(names(10))
    ours.add(reply(chosen[0], update(1.0), round=2))
    assert str(ours.state_dict()) == str(saved)


def test_without_a_plan_draws_go_on() -> None:
    whole = play(server(sampling=PoissonClients(0.5)), 4)
    first, second = play(server(sampling=PoissonClients(0.5)), 2), server(sampling=PoissonClients(0.5), seed=9)
    second.load_state_dict(first.state_dict())
    assert same(play(second, 2), whole)


def test_the_older_state_of_a_live_server_takes_nothing_back() -> None:
    ours = play(make(seed=None), 1)
    saved = ours.state_dict()
    play(ours, 2)
    ours.load_state_dict(saved)
    assert (ours.round, ours.ledger.releases) == (1, 3)


def changed(**values: Any) -> dict[str, Any]:
    return {**play(make(), 1).state_dict(), **values}


@pytest.mark.parametrize(
    "bad",
    [
        lambda: None,
        lambda: {},
        lambda: changed(schema="other"),
        lambda: changed(federation="other"),
        lambda: changed(round=-1),
        lambda: changed(round=True),
        lambda: changed(state={}),
        lambda: changed(private=None),
        lambda: changed(private={}),
        lambda: changed(private={**make().state_dict()["private"], "max_update_norm": -1.0}),
        lambda: changed(private={**make().state_dict()["private"], "plan": plan().to_json()}),
        lambda: changed(private={**make().state_dict()["private"], "run": {}}),
        lambda: play(make(optimizer=FedYogi()), 1).state_dict(),
        lambda: play(server(), 1).state_dict(),
    ],
)
def test_a_state_that_is_damaged_or_anothers_is_refused_and_nothing_changes(bad: Any) -> None:
    ours = play(make(), 2)
    before = str(ours.state_dict())
    with pytest.raises(CheckpointError):
        ours.load_state_dict(bad())
    assert str(ours.state_dict()) == before


def test_the_ledger_file_must_be_the_same(tmp_path: Path) -> None:
    saved = play(make(tmp_path / "ledger"), 1).state_dict()
    for other in (make(), make(tmp_path / "another")):
        with pytest.raises(CheckpointError, match="ledger"):
            other.load_state_dict(saved)


def test_a_second_server_under_the_same_seed_in_one_ledger_is_refused(tmp_path: Path) -> None:
    play(make(tmp_path / "ledger"), 1)
    with pytest.raises(LedgerError, match="insecure_seed"):
        make(tmp_path / "ledger").open_round(names(10))
    make(tmp_path / "ledger", federation="another").open_round(names(10))  # has a key of its own


def test_two_federations_share_the_budget_of_one_file(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    LedgerFile(path, budget=Budget(epsilon=plan(noise_multiplier=5.0, rounds=3).epsilon(1e-5), delta=1e-5))
    first, second = (
        server(plan=plan(noise_multiplier=5.0), ledger=LedgerFile(path), federation=name, seed=None)
        for name in ("first", "second")
    )
    play(first, 2), play(second, 1)
    for each in (first, second):
        with pytest.raises(BudgetExceededError):
            each.open_round(names(10))
    assert LedgerFile(path).releases == 3


def killed_at_its_third_release(folder: Path) -> None:
    """In a process of its own: saved after two rounds, killed in the third, when it is recorded."""
    ours = play(make(folder / "ledger", seed=None), 2)
    torch.save(ours.state_dict(), folder / "server.pt")
    round_release.gaussian_mechanism = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    ours.open_round(names(10))
    ours.close_round()


def test_killed_between_the_record_and_the_release_the_round_stays_spent(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=killed_at_its_third_release, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    ours = make(tmp_path / "ledger", seed=None)
    ours.load_state_dict(torch.load(tmp_path / "server.pt", weights_only=True))
    assert (ours.round, ours.ledger.releases) == (2, 3)
    play(ours, 3)
    assert ours.epsilon(1e-5) == NOISY.epsilon(1e-5)
    with pytest.raises(PlanExhaustedError):
        ours.open_round(names(10))
