"""Which releases are the same: only those that one key has drawn at one place. All others count, however often read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import dpdl
from accountants import Gaussian, NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import BudgetExceededError, CheckpointError, LedgerError, ParameterError, WrapError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.tally import Segment
from dpdl.watchdog import Watchdog
from tests.small_run import examples, network, released, same, train_on, weights_of

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE
STEPS = 30
MEAN = Gaussian(20.0)


def start(ledger: Any = None, *, seed: int | None = None, noise: float = 1.0, **more: Any) -> dpdl.Private:
    model = network()
    loader = DataLoader(TensorDataset(*examples()), batch_size=4, shuffle=True)
    plan = dpdl.PrivacyPlan.for_loader(loader, steps=STEPS, noise_multiplier=noise, max_grad_norm=1.0)
    execution = dpdl.Execution(engine="loop", insecure_seed=seed, accumulate_dtype=torch.float64, self_check=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return dpdl.make_private(model, optimizer, loader, plan, execution=execution, ledger=ledger, **more)


def train(private: dpdl.Private, until: int) -> dpdl.Private:
    while private.optimizer.steps_taken < until:
        for batch in private.loader:
            train_on(private, batch)
            if private.optimizer.steps_taken == until:
                break
    return private


def saved(path: Path, private: dpdl.Private) -> Path:
    dpdl.save_checkpoint(path, private.model, private.optimizer)
    return path


def loaded(path: Path, private: dpdl.Private) -> dpdl.Private:
    dpdl.load_checkpoint(path, private.model, private.optimizer)
    return private


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data.ledger"


def two_checkpoints(folder: Path, ledger: Any = None, *, seed: int | None = None) -> tuple[Path, Path]:
    """Of one run, after 3 steps and after 6."""
    private = train(start(ledger, seed=seed), 3)
    early = saved(folder / "early.pt", private)
    return early, saved(folder / "late.pt", train(private, 6))


# ── branches of a secure run ────────────────────────────────────────────────────────────────────────


def test_this_processs_branch_is_kept_when_another_one_is_loaded(tmp_path: Path) -> None:
    for taken in (5, 6, 8):  # fewer than the saved state has, as many, more
        early, late = two_checkpoints(tmp_path)
        private = train(loaded(early, start()), taken)
        assert loaded(late, private).optimizer.steps_taken == 6 + taken - 3
        spent = private.optimizer.plan
        assert private.optimizer.epsilon(1e-5) == pytest.approx(plan_of(spent, 6 + taken - 3))


def plan_of(plan: dpdl.PrivacyPlan, steps: int) -> float:
    book = Ledger(relation=ADD_OR_REMOVE)
    for _ in range(steps):
        book.record(plan.event(1))
    return book.epsilon(1e-5)


def test_steps_taken_before_another_runs_state_was_loaded_stay_counted(tmp_path: Path) -> None:
    _, late = two_checkpoints(tmp_path)
    assert loaded(late, train(start(), 6)).optimizer.steps_taken == 12


def test_loading_the_same_state_again_counts_nothing_twice(tmp_path: Path) -> None:
    early, late = two_checkpoints(tmp_path)
    private = start()
    for path in (late, early, late, late):
        loaded(path, private)
    assert private.optimizer.steps_taken == 6


@pytest.mark.parametrize("account", ["file", "memory"])
def test_branches_that_were_made_elsewhere_add_up(tmp_path: Path, file: Path, account: str) -> None:
    early, late = two_checkpoints(tmp_path)
    ledger: Any = LedgerFile(file) if account == "file" else Ledger(relation=ADD_OR_REMOVE)
    train(loaded(early, start(ledger)), 6)  # numbers 3 to 5, drawn with another key than those of `late`
    second = loaded(late, start(ledger))
    assert ledger.releases == 9
    assert second.optimizer.steps_taken == 9


def test_what_users_record_on_two_branches_adds_up(tmp_path: Path) -> None:
    early = saved(tmp_path / "early.pt", train(start(seed=3), 1))
    paths = []
    for noise in (50.0, 1.0):
        private = loaded(early, start(seed=3))
        private.optimizer.ledger.record(Gaussian(noise), label="mean")
        paths.append(saved(tmp_path / f"{noise}.pt", private))
    both = start(seed=3)
    for path in paths:
        loaded(path, both)
    assert [both.optimizer.ledger.counts[Gaussian(noise)] for noise in (50.0, 1.0)] == [1, 1]


def test_a_run_knows_what_the_file_has_of_it(tmp_path: Path, file: Path) -> None:
    ledger = LedgerFile(file)
    first = train(start(ledger), 3)
    early = saved(tmp_path / "early.pt", first)
    second = train(loaded(early, start(LedgerFile(file))), 5)
    late = saved(tmp_path / "late.pt", train(first, 6))
    loaded(late, second)
    assert second.optimizer.steps_taken == ledger.releases == 8
    assert second.optimizer.epsilon(1e-5) == ledger.epsilon(1e-5)


def test_something_else_at_an_address_does_not_stand_for_a_release() -> None:
    ledger = Ledger(relation=ADD_OR_REMOVE)
    for event in (Gaussian(50.0), Gaussian(1.0), Gaussian(1.0)):
        ledger.adopt((Segment(run="a", branch="b", label="mean", event=event, first=0, count=1),))
    assert dict(ledger.counts) == {Gaussian(50.0): 1, Gaussian(1.0): 1}
    assert Ledger.from_json(ledger.to_json()).to_json() == ledger.to_json()


# ── insecure seeds ──────────────────────────────────────────────────────────────────────────────────


def test_what_a_user_records_in_a_seeded_run_is_a_new_release_each_time(tmp_path: Path, file: Path) -> None:
    checkpoint = saved(tmp_path / "run.pt", train(start(LedgerFile(file), seed=3), 2))
    for expected in (3, 4):
        ledger = LedgerFile(file)
        private = loaded(checkpoint, start(ledger, seed=3))
        private.optimizer.ledger.record(MEAN, label="mean")
        assert ledger.releases == expected
    assert private.optimizer.ledger.counts[MEAN] == 2  # both are this run's


def gone_back(folder: Path, ledger: Any = None) -> dpdl.Private:
    """A seeded run that took steps 3 and 4, loaded its state of before, and took another step."""
    private = train(start(ledger, seed=3), 3)
    checkpoint = saved(folder / "run.pt", private)
    return train(loaded(checkpoint, train(private, 5)), 6)


def test_a_seeded_run_that_goes_back_within_a_process_draws_with_another_key(tmp_path: Path, file: Path) -> None:
    """Otherwise it would add the noise of step 5 to the weights of step 3, and another process to those of step 5."""
    ledger = LedgerFile(file)
    back = released(gone_back(tmp_path, ledger))
    assert ledger.releases == 6
    straight = loaded(tmp_path / "run.pt", start(ledger, seed=3))
    assert straight.optimizer.steps_taken == 4  # three, and the one after going back, which is not taken again
    train(straight, 6)
    assert ledger.releases == 6  # steps 3 and 4 again, to the last bit
    train(straight, 7)
    assert ledger.releases == 7
    assert not same(dict(back), dict(released(straight)))


def test_going_back_is_as_reproducible_as_the_seed(tmp_path: Path) -> None:
    assert same(weights_of(gone_back(tmp_path).model), weights_of(gone_back(tmp_path).model))


def test_two_runs_under_one_seed_in_one_ledger_are_refused(tmp_path: Path, file: Path) -> None:
    """2 (sum + noise) - (sum + 2 noise) is the sum."""
    for ledger in (LedgerFile(file), Ledger(relation=ADD_OR_REMOVE)):
        first = train(start(ledger, seed=3, noise=1.0), 1)
        second = start(ledger, seed=3, noise=2.0)
        batch = next(iter(second.loader))
        with pytest.raises(LedgerError, match="same insecure_seed"):
            train_on(second, batch)
        assert (ledger.releases, second.optimizer.steps_taken) == (1, 0)
        train(first, 2)
        train(start(ledger, seed=4), 1)
        train(start(ledger), 1)
        assert ledger.releases == 4


# ── a run's own ledger ──────────────────────────────────────────────────────────────────────────────


def test_nobody_but_the_run_records_its_steps() -> None:
    own = train(start(), 1).optimizer.ledger
    own.record(MEAN)
    assert own.entries[-1].label == "release"
    assert own.count("step") == 1
    before = own.to_json()
    with pytest.raises(ParameterError, match="run's own steps"):
        own.record(MEAN, label="step")
    with pytest.raises(ParameterError, match="new release each time"):
        own.record(MEAN, label="mean", number=0)
    assert own.to_json() == before


def test_a_ledger_within_another_one_is_refused(file: Path) -> None:
    middle = Ledger(relation=ADD_OR_REMOVE, within=LedgerFile(file), run="team")
    with pytest.raises(WrapError, match=r"lies within another one \(the ledger data\.ledger\)"):
        start(middle)
    segment = Segment(run="", label="mean", event=MEAN, first=0, count=2)
    middle.adopt((segment,))
    assert [(entry.run, entry.count) for entry in LedgerFile(file).entries] == [("team", 2)]


def test_a_watchdogs_budget_goes_with_the_run(tmp_path: Path) -> None:
    budget = Budget(epsilon=plan_of(start().optimizer.plan, 3), delta=1e-5)
    first = start(watchdog=Watchdog(budget=budget, save_to=tmp_path / "run.pt"))
    with pytest.raises(BudgetExceededError, match="step 3 of 30"):
        train(first, STEPS)
    with pytest.raises(BudgetExceededError, match="budget of the run"):
        first.optimizer.ledger.record(Gaussian(0.5), label="mean")
    second = loaded(tmp_path / "run.pt", start())
    with pytest.raises(BudgetExceededError, match="budget of the run"):
        train(second, STEPS)
    assert second.optimizer.steps_taken == 3
    weaker = start(watchdog=Watchdog(budget=Budget(epsilon=99.0, delta=1e-5)))
    with pytest.raises(CheckpointError, match="budget of its own"):
        loaded(tmp_path / "run.pt", weaker)
    with pytest.raises(LedgerError, match="weaker"):
        Watchdog(budget=Budget(epsilon=99.0, delta=1e-5)).attach(second.model, second.optimizer)
