"""Ranks that do not do the same are stopped, all of them and at once; what rank 0 may not do, none does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Subset

import dpdl
from accountants import Gaussian, NeighboringRelation
from dpdl.budget import Budget
from dpdl.errors import PrivacyError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.watchdog import Watchdog
from tests.distributed.launch import launch
from tests.distributed.test_ranks import BATCH, WIDTH, data, plan, train

Answer = dict[str, Any]


def a_run(*, dataset: Any = None, seed: int | None = None, steps: int = 40, **more: Any) -> dpdl.Private:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))  # two layers of the same shapes
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(dataset or data(), batch_size=int(BATCH))
    execution = dpdl.Execution(insecure_seed=seed, self_check=False)
    return dpdl.make_private(model, optimizer, loader, plan(steps=steps), execution=execution, **more)


def one_step(run: dpdl.Private) -> None:
    x, y = next(iter(run.loader))
    F.cross_entropy(run.model(x), y).backward()
    run.optimizer.step()


def refusal(attempt: Callable[[], object]) -> tuple[str, float]:
    begun = time.monotonic()
    try:
        attempt()
    except PrivacyError as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - begun
    return "nothing was refused", time.monotonic() - begun


# ── one file ────────────────────────────────────────────────────────────────────────────────────────


def in_one_file(rank: int, folder: str) -> Answer:
    path, checkpoint = Path(folder) / "data.ledger", Path(folder) / "run.pt"
    ledger = LedgerFile(path)
    run = a_run(ledger=ledger, steps=6)
    train(run, 4)
    run.optimizer.ledger.record(Gaussian(30.0), label="mean")
    if rank == 0:
        dpdl.save_checkpoint(checkpoint, run.model, run.optimizer)
    train(run, 5)
    found: Answer = {"first": run.optimizer.report(1e-5).to_json()}
    ledger = LedgerFile(path, reserve=4)
    run = a_run(ledger=ledger, steps=6)
    if rank == 1:
        time.sleep(0.5)  # by now rank 0 has the next step recorded
    dpdl.load_checkpoint(checkpoint, run.model, run.optimizer)
    found["resumed at"] = run.optimizer.steps_taken
    train(run, 6)
    counts = {entry.label: entry.count for entry in ledger.entries}
    return {**found, "counts": counts, "runs": len(ledger.runs), "last": run.optimizer.report(1e-5).to_json()}


def test_a_file_holds_each_release_once_and_ranks_resume_at_the_same_step(tmp_path: Path) -> None:
    answers = launch(in_one_file, 2, tmp_path, str(tmp_path))
    assert isinstance(answers[0], dict), answers[0]
    assert answers[0] == answers[1]
    assert answers[0]["resumed at"] == 5
    assert answers[0]["counts"] == {"step": 6, "mean": 1}
    assert answers[0]["runs"] == 1


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────


def differing(rank: int, folder: str) -> Answer:
    found: Answer = {}
    ledger = Ledger(relation=NeighboringRelation.ADD_OR_REMOVE, budget=Budget(epsilon=8.0, delta=1e-5))
    run = a_run(ledger=ledger if rank == 0 else None)
    found["budget"] = refusal(lambda: train(run, 40))
    found["budget, steps"] = run.optimizer.steps_taken

    budget = Budget(epsilon=run.optimizer.epsilon(1e-5), delta=1e-5)
    file = LedgerFile(Path(folder) / "watched.ledger", budget=budget)
    run = a_run(ledger=file, watchdog=Watchdog(save_to=Path(folder) / "last.pt"))
    found["watchdog"] = refusal(lambda: train(run, 40))
    found["watchdog, steps"] = (run.optimizer.steps_taken, file.releases)

    own = LedgerFile(Path(folder) / f"rank{rank}.ledger")
    found["two files"] = refusal(lambda: a_run(ledger=own))

    order = torch.randperm(60, generator=torch.Generator().manual_seed(rank)).tolist()
    found["order"] = refusal(lambda: a_run(dataset=Subset(data(), order)))

    run = a_run()
    for name, p in run.model.named_parameters():
        p.requires_grad_(name.startswith(f"{rank}."))  # rank 0 trains one layer, rank 1 the other
    found["frozen"] = refusal(lambda: one_step(run))
    found["frozen, steps"] = run.optimizer.steps_taken

    run = a_run()
    if rank == 0:
        run.optimizer.ledger.record(Gaussian(30.0), label="mean")
    found["recorded on one"] = refusal(lambda: one_step(run))

    paths = []
    for seed in (None, 3):
        run = a_run(seed=seed)
        for until in (2, 3):
            train(run, until)
            paths.append(Path(folder) / f"{rank} {seed} {until}.pt")
            dpdl.save_checkpoint(paths[-1], run.model, run.optimizer)
    run = a_run()
    stale = paths[rank]
    found["two checkpoints"] = refusal(lambda: dpdl.load_checkpoint(stale, run.model, run.optimizer))
    found["two checkpoints, steps"] = run.optimizer.steps_taken
    run = a_run(seed=3)
    load: Callable[[], object] = lambda: dpdl.load_checkpoint(paths[3], run.model, run.optimizer)  # noqa: E731
    found["loaded on one"] = refusal(load if rank == 0 else lambda: one_step(run))
    found["loaded on one, steps"] = run.optimizer.steps_taken
    return found


def test_a_difference_or_refusal_on_one_rank_stops_all_at_once(tmp_path: Path) -> None:
    answers = launch(differing, 2, tmp_path, str(tmp_path))
    assert isinstance(answers[0], dict), answers[0]
    expected = {
        "budget": ("BudgetExceededError", "One more release would overspend"),
        "watchdog": ("BudgetExceededError", "The budget is spent"),
        "two files": ("WrapError", "not the ledger file of rank 0"),
        "order": ("WrapError", "another data"),
        "frozen": ("WrapError", "another set of trained parameters"),
        "recorded on one": ("WrapError", "another ledger"),
        "two checkpoints": ("WrapError", "another saved state"),
        "loaded on one": ("StepError", "Rank 1 is at a step, rank 0 at loading"),
    }
    for name, (kind, words) in expected.items():
        for answer in answers:
            text, seconds = answer[name]
            assert text.startswith(kind), (name, text)
            assert words in text, (name, text)
            assert seconds < 20, (name, "the timeout was waited for")
    steps = {name: value for name, value in answers[0].items() if name.endswith("steps")}
    assert steps == {name: answers[1][name] for name in steps}
    assert steps["budget, steps"] > 1
    assert steps["watchdog, steps"] == (steps["budget, steps"],) * 2
    assert {steps[f"{name}, steps"] for name in ("frozen", "two checkpoints", "loaded on one")} == {0}
    assert (tmp_path / "last.pt").exists()
    assert "saved in" in answers[0]["watchdog"][0]
